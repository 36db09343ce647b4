"""Use a finished run: features, predictions for new images, exports and the report.

Imports: config, core, models, data, training, runs. Must not import Ray, or train.
"""

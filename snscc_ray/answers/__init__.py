"""What a finished run says of images, old and new: features, predictions, exports, the report.

Imports: config, core, models, data, training, runs. Must not import Ray, or train.
"""

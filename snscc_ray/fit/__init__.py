"""`snscc fit`: cluster a user's own images, choosing every setting.

`choose` makes the recipe, `count` pretrains and counts the clusters, `fit` runs both.

Imports: config, core, models, data, training, runs, answers. Must not import Ray.
"""

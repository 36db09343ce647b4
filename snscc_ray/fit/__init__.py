"""`snscc fit`: own images, with every setting chosen for them.

`choose` makes the recipe, `count` estimates the number of clusters, `fit` ties both to a run.

Imports: config, core, models, data, training, runs, answers. Must not import Ray.
"""

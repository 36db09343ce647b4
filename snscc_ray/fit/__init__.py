"""`snscc fit`: cluster a user's own images, choosing every setting.

`choose` makes the recipe, which `overrides` changes. `count` pretrains and counts the clusters,
`fit` runs all on a machine: `here` is this process, and `cluster.run` has the workers of a cluster.

Imports: config, core, models, data, training, runs, answers. Must not import Ray.
"""

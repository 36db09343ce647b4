"""The building blocks: losses, views, clustering, random numbers, and safe files.

`losses/` holds the equations of the paper, `views` the augmentations, `clustering/` neighbours,
k-means, pseudo-labels and metrics, `rng` the random numbers, `distributed` every collective call.
`storage`, `checkpoints` and `claim` write files whole and lock folders; `display` shows progress.

Imports: config. Must not import Ray, or know of models, datasets or runs.
"""

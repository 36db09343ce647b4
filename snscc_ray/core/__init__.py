"""Building blocks: losses, views, clustering, random numbers, and safe files.

`losses/` holds the paper's equations, `views` the augmentations, `clustering/` neighbours,
k-means, pseudo-labels and metrics, `rng` the random numbers, `distributed` all collective calls.
`storage`, `tables` and `checkpoints` write files whole, `claim` locks folders, `display` shows
progress.

Imports: config. Must not import Ray, or know of models, datasets or runs.
"""

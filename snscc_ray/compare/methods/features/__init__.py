"""Methods made for the features of a trained network, one file each.

`inputs` checks and scales the features. Each method is one function of tensors, and
`cluster`, which calls it for a comparison. The function reads no labels and no images, computes on
the features' device, and repeats bit by bit for the same key.
"""

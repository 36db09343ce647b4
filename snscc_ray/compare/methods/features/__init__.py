"""Methods that cluster the cached features of a frozen network, one file each.

`inputs` checks and scales the features. Each method is one function of tensors. It reads no labels
and no images, computes on the features' device, and repeats bit by bit for the same key.
"""

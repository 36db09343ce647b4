"""Encoders, heads, and pretrained weights of other projects.

`encoders` holds the built-in networks and the heads, `libraries` the encoders of torchvision and
timm. `pretrained` loads `encoder.weights`; `importers` finds weights in foreign checkpoints.

Imports: config, core. Must not import Ray, or read images.
"""

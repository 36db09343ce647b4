"""Encoders, heads, and pretrained weights of other projects.

`encoders` holds the built-in networks and the heads, `libraries` the encoders of torchvision and
timm. `foreign` reads checkpoints of other projects, `transfer` finds an encoder's weights in them,
and `pretrained` says which encoder a user's text means and loads its weights.

Imports: config, core. Must not import Ray, or read images.
"""

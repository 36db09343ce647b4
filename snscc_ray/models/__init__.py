"""Encoders, heads, and pretrained weights of other projects.

`encoders` holds the built-in networks and the heads, `libraries` the encoders of torchvision and
timm. `foreign` reads checkpoints of other projects, and `pretrained` finds `encoder.weights` in
them and loads them.

Imports: config, core. Must not import Ray, or read images.
"""

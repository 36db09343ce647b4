"""Encoders and heads, and the weights that other projects trained for them.

`encoders` holds the built-in networks and the heads, `libraries` those of torchvision and timm,
`pretrained` what `encoder.weights` may name, `importers` finds weights in foreign checkpoints.

Imports: config, core. Must not import Ray, or read images.
"""

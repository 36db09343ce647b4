"""The three stages: Pretrain, Train, Boost. The pretext methods of Pretrain are in `pretext/`."""

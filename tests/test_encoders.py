from __future__ import annotations

import pytest
import torch

from snscc_ray.config import recipes
from snscc_ray.config.settings import EncoderSettings
from snscc_ray.models.encoders import (
    ClusterHeads,
    ClusterNet,
    PretextNet,
    build_encoder,
    out_features,
)

TRAIN = recipes.get("digits").train


@pytest.mark.parametrize(
    ("settings", "channels", "size", "features"),
    [
        (EncoderSettings(name="convnet", width=8), 1, 8, 32),
        (EncoderSettings(name="convnet", width=8), 3, 31, 32),
        (EncoderSettings(name="resnet18", stem="small"), 3, 32, 512),
        (EncoderSettings(name="resnet18", stem="standard"), 1, 96, 512),
        (EncoderSettings(name="resnet34", stem="small"), 3, 32, 512),
        (EncoderSettings(name="resnet50", stem="small"), 1, 16, 2048),
        (EncoderSettings(name="resnet50", stem="standard"), 3, 64, 2048),
    ],
)
def test_encoders_give_their_features(
    settings: EncoderSettings, channels: int, size: int, features: int
) -> None:
    encoder = build_encoder(settings, channels)
    assert out_features(encoder) == features
    assert encoder(torch.rand(2, channels, size, size)).shape == (2, features)


def test_the_small_stem_keeps_the_resolution() -> None:
    encoder = build_encoder(EncoderSettings(name="resnet18", stem="small"), 3)
    x = encoder.maxpool(encoder.conv1(torch.rand(1, 3, 32, 32)))
    assert x.shape[2:] == (32, 32)


def test_projections_are_unit_vectors() -> None:
    net = PretextNet(
        build_encoder(EncoderSettings(name="convnet", width=4), 1), recipes.get("digits").pretrain
    )
    z = net(torch.rand(5, 1, 8, 8))
    assert torch.allclose(z.norm(dim=1), torch.ones(5))


def test_heads_are_independent_and_one_can_be_kept() -> None:
    torch.manual_seed(0)
    heads = ClusterHeads(TRAIN, features=6, clusters=3, heads=4)
    h = torch.randn(7, 6)
    logits = heads(h)
    assert logits.shape == (4, 7, 3)
    logits[2].sum().backward()
    assert heads.weight.grad is not None
    assert [bool(g.abs().sum() > 0) for g in heads.weight.grad] == [False, False, True, False]
    heads.keep(2)
    assert torch.allclose(heads(h)[0], logits[2], atol=1e-5)


def test_a_prototype_at_a_feature_claims_it() -> None:
    heads = ClusterHeads(TRAIN, features=6, clusters=3, heads=1)
    centres = torch.randn(1, 3, 6)
    heads.start_at(centres)
    logits = heads(centres[0])[0]
    assert logits.argmax(1).tolist() == [0, 1, 2]
    assert torch.allclose(logits.diagonal(), torch.full((3,), TRAIN.head_scale))


def test_the_linear_head_is_affine() -> None:
    linear = TRAIN.model_copy(update={"head": "linear"})
    heads = ClusterHeads(linear, features=6, clusters=3, heads=2)
    assert heads.bias is not None
    a, b = torch.randn(2, 5, 6)
    middle = heads((a + b) / 2)
    assert torch.allclose(middle, (heads(a) + heads(b)) / 2, atol=1e-5)


def test_cluster_net_leaves_autocast_in_full_precision() -> None:
    net = ClusterNet(
        build_encoder(EncoderSettings(name="convnet", width=4), 1),
        ClusterHeads(TRAIN, features=16, clusters=3, heads=2),
    )
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = net(torch.rand(5, 1, 8, 8))
    assert z.dtype == logits.dtype == torch.float32
    assert torch.allclose(z.norm(dim=1), torch.ones(5))
    assert net.double()(torch.rand(5, 1, 8, 8).double())[0].dtype == torch.float64

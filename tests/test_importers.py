"""Checkpoints of other projects, made here with the names that those projects give to theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import EncoderSettings
from snscc_ray.models.encoders import build_encoder
from snscc_ray.models.transfer import import_weights, infer_encoder
from tests.conftest import equal_states

State = dict[str, Tensor]


def noisy(net: nn.Module) -> nn.Module:
    """No two entries of one shape equal, as they are after training."""
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 1)
    return net


def resnet(name: str, stem: str) -> nn.Module:
    net = getattr(torchvision.models, name)()
    if stem == "small":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return noisy(net)


def body(net: nn.Module) -> State:
    return {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def mlp(prefix: str, *numbers: int) -> State:
    return {
        f"{prefix}.{n}.{kind}": torch.rand(4, 4) for n in numbers for kind in ("weight", "bias")
    }


def copy_of(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def shortcut(state: State) -> State:
    return {name.replace(".downsample.", ".shortcut."): value for name, value in state.items()}


def scan_pretext(net: nn.Module) -> object:
    """simclr.py: torch.save({'optimizer', 'model', 'epoch'}); ContrastiveModel, resnet_cifar."""
    model = under("backbone.", shortcut(body(net))) | mlp("contrastive_head", 0, 2)
    optimizer = {"state": {0: {"momentum_buffer": torch.rand(64, 3, 3, 3)}}, "param_groups": []}
    return {"optimizer": optimizer, "model": model, "epoch": 500}


def scan_clusters(net: nn.Module) -> object:
    """scan.py: torch.save({'model': model.module.state_dict(), 'head': best_loss_head})."""
    return {"model": under("backbone.", shortcut(body(net))) | mlp("cluster_head", 0), "head": 0}


def solo_learn(net: nn.Module) -> object:
    """A Lightning checkpoint of solo/methods/byol.py."""
    state = under("momentum_backbone.", copy_of(body(net))) | under("backbone.", body(net))
    state |= {"classifier.weight": torch.rand(10, 512), "classifier.bias": torch.rand(10)}
    state |= mlp("projector", 0, 1, 3) | mlp("momentum_projector", 0, 1, 3) | mlp("predictor", 0, 3)
    loops = {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}}
    return {"epoch": 9, "pytorch-lightning_version": "2.1.2", "state_dict": state, "loops": loops}


def moco(net: nn.Module, *, version: int) -> object:
    """main_moco.py: torch.save({'epoch', 'arch', 'state_dict', 'optimizer'}); moco/builder.py."""
    state: State = {"module.queue": torch.rand(128, 16), "module.queue_ptr": torch.zeros(1)}
    for part, values in (("encoder_k", copy_of(body(net))), ("encoder_q", body(net))):
        prefix = f"module.{part}."
        state |= under(prefix, values)
        state |= mlp(f"{prefix}fc", 0, 2) if version == 2 else {f"{prefix}fc.weight": torch.rand(9)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}


def lightly(net: nn.Module) -> object:
    """examples/pytorch_lightning/byol.py: nn.Sequential(*list(resnet.children())[:-1])."""
    sequential = nn.Sequential(*list(net.children())[:-1]).state_dict()
    assert {"0.weight", "4.0.conv1.weight", "7.0.downsample.0.weight"} <= sequential.keys()
    state = under("backbone_momentum.", copy_of(sequential)) | under("backbone.", sequential)
    return {"state_dict": state | mlp("projection_head.layers", 0, 1, 3)}


def lightly_generator(net: nn.Module) -> object:
    """lightly/models/resnet.py has neither relu nor max-pool as parts, and calls them shortcut."""
    numbers = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    state = {
        ".".join([str(numbers.index(name.split(".")[0])), *name.split(".")[1:]]): value
        for name, value in shortcut(body(net)).items()
    }
    return {"state_dict": under("backbone.", state) | mlp("projection_head.layers", 0, 2)}


def online_network(net: nn.Module) -> object:
    """BYOL as a Lightning module: of two networks, the one that learns by gradient."""
    state = under("target_network.encoder.", copy_of(net.state_dict()))
    return {"state_dict": state | under("online_network.encoder.", net.state_dict())}


def online_encoder(net: nn.Module) -> object:
    """byol-pytorch: learner.online_encoder.net, .projector; learner.target_encoder.net."""
    state = under("learner.target_encoder.net.", copy_of(net.state_dict()))
    state |= under("learner.online_encoder.net.", net.state_dict())
    return state | mlp("learner.online_encoder.projector", 0, 1, 3)


def ours(net: nn.Module) -> object:
    """What run._save_final writes."""
    network = under("encoder.", body(net)) | mlp("projection", 0, 2)
    return {"format": 1, "identity": "x", "network": network, "normalize": {"mean": [0.5]}}


LAYOUTS: dict[str, tuple[Callable[[nn.Module], object], str, str]] = {
    "SCAN pretext": (scan_pretext, "resnet18", "small"),
    "SCAN clusters": (scan_clusters, "resnet18", "small"),
    "solo-learn": (solo_learn, "resnet18", "small"),
    "a larger ResNet": (lambda net: net.state_dict(), "resnet34", "small"),
    "MoCo v1": (partial(moco, version=1), "resnet50", "standard"),
    "MoCo v2": (partial(moco, version=2), "resnet50", "standard"),
    "lightly": (lightly, "resnet18", "standard"),
    "lightly's own ResNet": (lightly_generator, "resnet18", "small"),
    "torchvision": (lambda net: net.state_dict(), "resnet50", "standard"),
    "compiled, DDP": (lambda n: under("module._orig_mod.", n.state_dict()), "resnet18", "small"),
    "compiled backbone": (
        lambda n: {"model_state_dict": under("backbone._orig_mod.", body(n))}, "resnet18", "small",
    ),
    "BYOL": (online_network, "resnet18", "standard"),
    "byol-pytorch": (online_encoder, "resnet18", "standard"),
    "ema": (
        lambda n: {"model_ema": copy_of(n.state_dict()), "model": n.state_dict()},
        "resnet18", "standard",
    ),
    "network": (lambda n: {"network": body(n)}, "resnet18", "standard"),
    "ours": (ours, "resnet18", "small"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_recognised(layout: str) -> None:
    write, name, stem = LAYOUTS[layout]
    net = resnet(name, stem)
    held = write(net)
    settings = infer_encoder(held)
    assert (settings.name, settings.stem) == (name, stem)
    encoder = build_encoder(settings, 3)
    found = import_weights(held, encoder, "x.pth")
    assert not found.absent and not found.summed
    encoder.load_state_dict(found.weights)
    assert equal_states(encoder.state_dict(), body(net))


def test_a_timm_checkpoint_fits_the_resnet_of_its_name() -> None:
    net = noisy(timm.create_model("resnet18"))
    found = import_weights({"state_dict": net.state_dict()}, resnet("resnet18", "standard"), "x")
    assert equal_states(found.weights, dict(net.state_dict()))
    assert infer_encoder(net.state_dict()).stem == "standard"


def test_what_was_left_is_said() -> None:
    net = resnet("resnet18", "small")
    encoder = build_encoder(EncoderSettings(name="resnet18"), 3)
    held = moco(net, version=1)
    assert isinstance(held, dict)
    del held["state_dict"]["module.encoder_q.bn1.num_batches_tracked"]
    said = str(import_weights(held, encoder, "x.pth"))
    assert "119 weights from x.pth (state_dict: module.encoder_q.)" in said
    assert "head left out: 1 (module.encoder_q.fc.weight)" in said
    assert "unused: 123 (module.queue, module.queue_ptr, " in said
    assert "not in it" not in said  # only a counter is missing


def test_a_width_is_inferred() -> None:
    net = build_encoder(EncoderSettings(name="convnet", width=6), 1)
    held = {"network": under("encoder.", net.state_dict())}
    assert infer_encoder(held) == EncoderSettings(name="convnet", width=6)


def test_grey_images_see_an_rgb_stem_as_three_equal_channels() -> None:
    net = resnet("resnet18", "standard").eval()
    net.fc = nn.Identity()
    grey = build_encoder(EncoderSettings(name="resnet18", stem="standard"), 1).eval()
    found = import_weights(net.state_dict(), grey, "x.pth")
    assert found.summed and "grey" in str(found)
    grey.load_state_dict(found.weights)
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), net(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"epoch": 3}, "no weights"),
        ([1, 2], "no weights"),
        ({"features.0.weight": torch.rand(3, 3)}, "no weights"),
        ({"conv1.weight": torch.rand(64, 3, 3, 3)}, "lacks 99 (bn1.weight, bn1.bias, "),
        (
            {k: v for k, v in body(resnet("resnet18", "small")).items() if "4.1.bn2" not in k},
            "lacks 4 (layer4.1.bn2.weight, ",
        ),
        (
            {k: v for k, v in body(resnet("resnet34", "small")).items() if "3.5.bn2" not in k},
            "larger encoder, with 91 (layer1.2.conv1.wei",
        ),
    ],
)  # fmt: skip
def test_a_part_of_an_encoder_is_refused(held: object, says: str) -> None:
    encoder = build_encoder(EncoderSettings(name="resnet18"), 3)
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(UserError) as refusal:
        import_weights(held, encoder, "x.pth")
    assert says in str(refusal.value) and "x.pth" in str(refusal.value)
    assert equal_states(encoder.state_dict(), before)
    with pytest.raises(UserError):
        infer_encoder(held)

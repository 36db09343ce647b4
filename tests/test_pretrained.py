"""encoder.name and encoder.weights, as a person sets them, and what a run makes of them."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from snscc_ray.answers.predict import load_model
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.recipes import get
from snscc_ray.config.settings import EncoderSettings, Recipe
from snscc_ray.core.checkpoints import load
from snscc_ray.models import libraries
from snscc_ray.models.encoders import build_encoder, out_features
from snscc_ray.models.pretrained import (
    check_encoder,
    encoder_settings,
    import_weights,
    start_encoder,
)
from snscc_ray.runs.identity import stage_identity
from tests.conftest import TINY, digits_table, equal_states
from tests.test_cli import Snscc, refused, sets
from tests.test_importers import body, noisy, resnet, scan_pretext, under
from tests.test_predict import images


def settings(**values: Any) -> EncoderSettings:
    return EncoderSettings(**values)


def test_the_names_of_encoders(tmp_path: Path) -> None:
    file = tmp_path / "theirs.pth.tar"
    torch.save(scan_pretext(resnet("resnet18", "small")), file)
    trained = functools.partial(settings, frozen=True)
    for text, expected in (
        ("resnet18", settings(name="resnet18")),
        ("torchvision:resnet34", trained(name="torchvision:resnet34", weights="default")),
        ("timm:resnet10t", trained(name="timm:resnet10t", weights="default")),
        ("timm:resnet10t=x.pth", trained(name="timm:resnet10t", weights="x.pth")),
        (str(file), trained(name="resnet18", stem="small", weights=str(file))),
    ):
        assert encoder_settings(text) == expected


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


def _altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _with(state: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    spoilt = {key: weight.clone() for key, weight in state.items()}
    spoilt[name].view(-1)[1] = value
    return spoilt


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file, state: torch.save(_with(state, "layers.0.weight", torch.nan), file), "NaN"),
        (lambda file, state: torch.save(_with(state, "layers.3.weight", torch.inf), file), "NaN"),
        (lambda file, state: torch.save(_with(state, "layers.1.running_var", -1), file), "below"),
        (
            lambda file, state: torch.save({k: w * 0 for k, w in state.items()}, file),
            "nothing but zeros",
        ),
        (lambda file, state: torch.save(list(state.values()), file), "no weights by name"),
        (lambda file, state: torch.save({}, file), "no weights by name"),
        (
            lambda file, state: torch.save({k: w.to("meta") for k, w in state.items()}, file),
            "no weights by name",
        ),
        (lambda file, state: torch.save(convnet(), file), "a whole pickled model"),
        (lambda file, state: torch.jit.script(nn.Linear(2, 2)).save(file), "TorchScript"),
        (lambda file, state: torch.save({"a": _Attack()}, file), "not loaded here"),
        (lambda file, state: file.write_bytes(pickle.dumps(_Attack())), "not loaded here"),
        (lambda file, state: file.write_bytes(b""), "is empty"),
        (lambda file, state: file.write_bytes(b"text"), "damaged or not a torch checkpoint"),
        (
            lambda file, state: (torch.save(state, file), os.truncate(file, 999)),
            "damaged or not a torch checkpoint",
        ),
        (lambda file, state: (torch.save(state, file), _altered(file)), "damaged"),
        (lambda file, state: file.mkdir(), "is a folder"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_weights_that_cannot_be_used_are_one_line(
    spoil: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.pt"
    spoil(file, convnet().state_dict())
    named = override(get("digits"), ["encoder.width=4", f"encoder.weights={file}"])
    for refuse in (lambda: encoder_settings(str(file)), lambda: check_encoder(named, 1)):
        with pytest.raises(UserError, match=says) as found:
            refuse()
        assert "w.pt" in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "executed").exists()


def convnet() -> nn.Module:
    return build_encoder(settings(name="convnet", width=4), 1)


def test_an_encoder_of_grey_images_says_how_it_is_taken(tmp_path: Path) -> None:
    torch.save(convnet().state_dict(), tmp_path / "w.pt")
    colour = ["data.channels=3", "data.mean=null", "data.std=null", "encoder.width=4"]
    recipe = override(get("digits"), [*colour, f"encoder.weights={tmp_path / 'w.pt'}"])
    with pytest.raises(UserError, match=r"grey images: use --set data\.channels=1"):
        check_encoder(recipe, 1)
    check_encoder(override(recipe, ["data.channels=1", "data.mean=null", "data.std=null"]), 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resnext50_32x4", "did you mean torchvision:resnext50_32x4d"),
        ("resnet19", "did you mean resnet18"),
        ("torchvision:resnet81", "did you mean torchvision:resnet18"),
        ("timm:vit_tiny_patch16_225", "did you mean timm:vit_tiny_patch16_224"),
        ("timm:hf-hub:a/b", "no such model"),
        ("qqqqqq", "use resnet18, torchvision:NAME"),
        ("nowhere/x.pth", "nowhere/x.pth: there is no such file"),
    ],
)
def test_an_unknown_encoder_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        encoder_settings(text)
    assert says in str(refusal.value)


def test_a_checkpoint_of_an_unknown_encoder_asks_for_its_name(tmp_path: Path) -> None:
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"--set encoder\.name=… and --set encoder\.weights"):
        encoder_settings(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("name", "channels"),
    [("torchvision:mobilenet_v3_small", 1), ("torchvision:alexnet", 3), ("timm:resnet10t", 1)],
)
def test_models_of_libraries_are_encoders(name: str, channels: int) -> None:
    encoder = build_encoder(settings(name=name), channels).eval()
    h_BD = encoder(torch.rand(2, channels, 64, 64))
    assert h_BD.shape == (2, out_features(encoder))
    assert import_weights(libraries.default_weights(name, fetch=False)[1], encoder, "x").summed == (
        channels == 1
    )


@pytest.mark.parametrize(
    ("changes", "workers", "says"),
    [
        (["encoder.name=timm:vit_tiny_patch16_224"], 1, "data.image_size=224"),
        (["encoder.name=torchvision:squeezenet1_0"], 1, "no linear layer"),
        (["encoder.name=torchvision:resnet81"], 1, "did you mean"),
        (["encoder.name=timm:mobilenetv3_small_050"], 2, "BatchNormAct2d"),
        (["encoder.name=resnet18", "encoder.weights=default"], 1, "use --set encoder.stem=standar"),
        (["encoder.name=resnet50", "encoder.weights=FILE"], 1, "use --set encoder.name=resnet18"),
        (["encoder.name=timm:resnet10t", "encoder.weights=FILE"], 1, "encoder.name=resnet18"),
        (["encoder.name=resnet18", "encoder.weights=FILE.pt"], 1, "there is no such file"),
    ],
)
def test_what_cannot_be_trained_is_refused_before(
    changes: list[str], workers: int, says: str, tmp_path: Path
) -> None:
    torch.save(resnet("resnet18", "small").state_dict(), tmp_path / "x")
    changes = [text.replace("FILE", str(tmp_path / "x")) for text in changes]
    with pytest.raises(UserError) as refusal:
        check_encoder(override(get("digits"), changes), workers)
    assert says in str(refusal.value)


def recipe_of(*changes: str) -> Recipe:
    return override(get("digits"), changes)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_default_weights_of_torchvision(name: str, hub: Path) -> None:
    """torchvision looks into torch.hub's folder before it downloads: the file is put there."""
    net = noisy(torchvision.models.resnet18())
    torch.save(net.state_dict(), hub / "resnet18-f37072fd.pth")
    recipe = recipe_of(
        f"encoder.name={name}", "encoder.stem=standard", "encoder.weights=default",
        "data.image_size=32", "data.channels=3", "data.mean=null", "data.std=null",
    )  # fmt: skip
    check_encoder(recipe, 1)
    encoder = build_encoder(recipe.encoder, 3)
    found = start_encoder(recipe.encoder, encoder)
    assert equal_states(encoder.state_dict(), body(net))
    assert "torchvision ResNet18_Weights.IMAGENET1K_V1" in str(found)


def test_default_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is told to take its weights from a file: nothing can be downloaded in a test."""
    net = noisy(timm.create_model("resnet10t"))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        overlay = (
            {"pretrained_cfg_overlay": {"file": str(tmp_path / "x.pth")}} if pretrained else {}
        )
        return create(name, pretrained=pretrained, **options, **overlay)

    monkeypatch.setattr(timm, "create_model", offline)
    chosen = settings(name="timm:resnet10t", weights="default")
    encoder = build_encoder(chosen, 3)
    assert "timm resnet10t." in str(start_encoder(chosen, encoder))
    assert equal_states(encoder.state_dict(), body(net))


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise URLError("no network")

    kind = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(kind, "get_state_dict", fail)
    chosen = settings(name="torchvision:resnet18", weights="default")
    with pytest.raises(UserError, match=r"not be downloaded .*no network.*encoder\.weights=PATH"):
        start_encoder(chosen, build_encoder(chosen, 3))


def test_the_identity_is_of_the_weights_and_not_of_their_place(tmp_path: Path) -> None:
    def identity(*changes: str) -> str:
        return stage_identity(recipe_of(*changes), "train", "images", "order")

    for name, value in (("a.pth", 1), ("b.pth", 1), ("c.pth", 2)):
        torch.save(
            {"w": torch.tensor(value)}, tmp_path / name, _use_new_zipfile_serialization=False
        )
    found = [identity(f"encoder.weights={tmp_path / name}.pth") for name in "abc"]
    assert found[0] == found[1]
    assert len({*found, identity()}) == 3
    shutil.copy(tmp_path / "c.pth", tmp_path / "a.pth")
    assert identity(f"encoder.weights={tmp_path / 'a.pth'}") == found[2]
    resnets = ["encoder.name=resnet18", "encoder.stem=standard"]
    assert identity(*resnets) != identity(*resnets, "encoder.weights=default")


# ----------------------------------------------------------------------------------------- a run


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str]) -> Snscc:
    return Snscc(capsys)


def test_pretrain_starts_from_the_weights(snscc: Snscc, tmp_path: Path) -> None:
    """With no epochs, what Pretrain leaves is what it began with."""
    encoder = noisy(build_encoder(EncoderSettings(name="convnet", width=4), 1))
    torch.save({"state_dict": under("module.backbone.", encoder.state_dict())}, tmp_path / "x.pth")
    own = sets(*TINY, f"encoder.weights={tmp_path / 'x.pth'}", "pretrain.epochs=0")
    done = snscc("run", "digits", *own, "--stages", "pretrain", "--out", tmp_path / "run")
    assert done.status == 0, done
    assert f"weights from {tmp_path / 'x.pth'} (state_dict: module.backbone.)" in done.out
    network = load(tmp_path / "run" / "pretrain" / "final.pt")["network"]
    found = {k.removeprefix("encoder."): v for k, v in network.items() if "encoder." in k}
    assert equal_states(found, dict(encoder.state_dict()))


def test_a_finished_run_needs_its_weights_no_more(snscc: Snscc, tmp_path: Path) -> None:
    torch.save(
        build_encoder(EncoderSettings(name="convnet", width=4), 1).state_dict(), tmp_path / "x"
    )
    own = [*sets(*TINY, f"encoder.weights={tmp_path / 'x'}"), "--out", tmp_path / "run"]
    assert snscc("run", "digits", *own).status == 0
    again = snscc("run", "digits", *own, "--resume")
    assert again.status == 0 and "weights from" not in again.out
    (tmp_path / "x").unlink()
    new = images(tmp_path / "new", digits_table(3))
    assert snscc("predict", tmp_path / "run", new, "-o", tmp_path / "new.parquet").status == 0
    refused(snscc("run", "digits", *own, "--resume"), "encoder.weights=", "no such file")


def test_weights_that_do_not_fit_leave_no_folder(snscc: Snscc, tmp_path: Path) -> None:
    torch.save(
        build_encoder(EncoderSettings(name="convnet", width=8), 1).state_dict(), tmp_path / "x"
    )
    own = [*sets(*TINY, f"encoder.weights={tmp_path / 'x'}"), "--out", tmp_path / "run"]
    refused(snscc("run", "digits", *own), "use --set encoder.width=8")
    refused(snscc("compare", "digits", *own), "encoder.weights", "random weights")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:resnet10t"])
def test_a_run_with_a_model_of_a_library(name: str, snscc: Snscc, tmp_path: Path) -> None:
    own = [text for text in TINY if "epochs" not in text and "width" not in text]
    own += [f"{stage}.epochs=1" for stage in ("pretrain", "train", "boost")]
    done = snscc("run", "digits", *sets(*own, f"encoder.name={name}"), "--out", tmp_path / "run")
    assert done.status == 0, done
    assert load_model(tmp_path / "run").recipe.encoder.name == name
    refused(
        snscc("run", "digits", "--set", "encoder.name=vgg", "--out", tmp_path / "v"), "timm:NAME"
    )

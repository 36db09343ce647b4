"""A finished run as one file, read by what others read such files with."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from snscc_ray.answers import export
from snscc_ray.answers.predict import Model, load_model
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.recipes import get
from snscc_ray.config.settings import EncoderSettings
from snscc_ray.core import checkpoints, storage
from snscc_ray.core.views import Normalize
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.models.encoders import ClusterHeads, ClusterNet, build_encoder, out_features
from snscc_ray.runs.folder import write_recipe
from tests.test_cli import Snscc, content, refused

ABOUT = {
    "clusters": 10, "image_size": 8, "channels": 1, "recipe": "digits",
    "snscc_version": version("snscc_ray"),
}  # fmt: skip


def model(*settings: str, encoder: EncoderSettings | None = None) -> Model:
    recipe = override(get("digits"), ["encoder.width=4", *settings])
    if encoder is not None:
        recipe = recipe.model_copy(update={"encoder": encoder})
    channels = recipe.data.channels
    torch.manual_seed(0)
    net = build_encoder(recipe.encoder, channels)
    network = ClusterNet(net, ClusterHeads(recipe.train, out_features(net), 10, heads=1))
    for module in network.modules():  # as after training: not the mean 0 and variance 1 of a start
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    normalize = Normalize((0.3, 0.4, 0.5)[:channels], (0.2, 0.25, 0.3)[:channels])
    return Model(recipe, network, normalize, torch.device("cpu"), trained={})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as a finished run leaves it, as far as a model is loaded from it."""
    made = model()
    write_recipe(tmp_path / "run", made.recipe)
    normalize = {"mean": list(made.normalize.mean), "std": list(made.normalize.std)}
    state = {"network": made.network.state_dict(), "normalize": normalize}
    checkpoints.save(tmp_path / "run" / "boost" / "final.pt", state)
    storage.write_json(tmp_path / "run" / "metrics.json", {})
    return tmp_path / "run"


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str]) -> Snscc:
    return Snscc(capsys)


def some(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)


def test_both_files_answer_as_predict_does(run: Path, snscc: Snscc, tmp_path: Path) -> None:
    import onnxruntime

    files = {kind: tmp_path / f"model.{kind}" for kind in ("onnx", "torch")}
    done = snscc("export", run, "--onnx", files["onnx"], "--torch", files["torch"])
    assert done.status == 0, done
    assert all(str(file) in done.out for file in files.values())
    images = some(7)
    expected = load_model(run).probabilities(ResidentData(images, torch.device("cpu")))

    held = {"snscc.json": ""}
    p_BC, z_BD = torch.export.load(files["torch"], extra_files=held).module()(images)
    torch.testing.assert_close(p_BC, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(z_BD.norm(dim=1), torch.ones(7))
    assert json.loads(held["snscc.json"]) == ABOUT

    session = onnxruntime.InferenceSession(files["onnx"].read_bytes())
    (given,) = session.get_inputs()
    assert (given.name, given.type) == ("images", "tensor(uint8)")
    assert given.shape == ["batch", 1, 8, 8]
    found = dict(
        zip(
            [output.name for output in session.get_outputs()],
            session.run(None, {"images": images.numpy()}),
            strict=True,
        )
    )
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
    np.testing.assert_allclose(found["features"], z_BD.detach(), atol=1e-5)
    props = session.get_modelmeta().custom_metadata_map
    assert props == {name: str(value) for name, value in ABOUT.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.torch", "run"]


def test_the_torch_file_needs_torch_alone(run: Path, snscc: Snscc, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    assert snscc("export", run, "--torch", file).status == 0
    code = (
        "import sys, torch; from torch.export import load; "
        "p, _ = load(sys.argv[1]).module()(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)); "
        "assert 'snscc_ray' not in sys.modules; print(tuple(p.shape))"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert done.stdout.strip() == "(3, 10)", done.stderr


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("settings", "encoder"),
    [
        (["train.head=linear"], None),
        (
            ["data.channels=3", "data.mean=null", "data.std=null", "data.image_size=32"],
            EncoderSettings(name="resnet18", stem="standard"),
        ),
    ],
)
def test_other_heads_and_encoders(
    kind: export.Format, settings: list[str], encoder: EncoderSettings | None, tmp_path: Path
) -> None:
    made = model(*settings, encoder=encoder)
    write, read = export._FORMATS[kind]
    write(export.traced(made), tmp_path / "model.pt2", export.describe(made))
    assert export.difference(made, read(tmp_path / "model.pt2")) < 1e-5


@pytest.mark.parametrize("wrong", [lambda x: x + 2e-4, lambda x: x * torch.nan])
def test_a_file_that_answers_otherwise_is_not_written(
    wrong: object, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert callable(wrong)
    write, read = export._FORMATS["torch"]

    def astray(path: Path) -> export.Answer:
        answer = read(path)
        return lambda images: [wrong(value) for value in answer(images)]

    monkeypatch.setitem(export._FORMATS, "torch", (write, astray))
    before = content(tmp_path)
    with pytest.raises(UserError, match="differs from the model"):
        export.export(run, {"onnx": tmp_path / "m.onnx", "torch": tmp_path / "m.pt2"})
    assert content(tmp_path) == before


def test_without_the_packages_the_error_says_what_to_install(
    run: Path, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    refused(snscc("export", run, "--onnx", tmp_path / "m"), "pip install onnxruntime", "--torch")
    assert snscc("export", run, "--torch", tmp_path / "m").status == 0


def test_what_cannot_be_written_is_refused(run: Path, snscc: Snscc, tmp_path: Path) -> None:
    there = tmp_path / "model.pt2"
    there.write_bytes(b"somebody's")
    before = content(tmp_path)
    refused(snscc("export", run), "--onnx", "--torch")
    refused(snscc("export", run, "--torch", there), "exists", "--overwrite")
    refused(snscc("export", run, "--torch", run), "is a folder")
    new = tmp_path / "new"
    refused(snscc("export", run, "--torch", new, "--onnx", new), "two files")
    refused(snscc("export", tmp_path, "--torch", new), "holds no run")
    assert content(tmp_path) == before
    assert snscc("export", run, "--torch", there, "--overwrite").status == 0
    assert torch.export.load(there).module()(some(2))[0].shape == (2, 10)

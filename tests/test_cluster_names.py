"""Names of clusters: the file that people edit, words for clusters, and where names are shown."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch
import torchvision
from torch import nn

from snscc_ray import cli
from snscc_ray.answers.names import (
    NAMES_FILE,
    Naming,
    Suggestion,
    keep_edited,
    parse,
    read_naming,
    save,
    with_suggestions,
)
from snscc_ray.answers.words import meant, suggest
from snscc_ray.cli import options
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.recipes import get
from snscc_ray.data.loading.bank import bank_of
from snscc_ray.data.sources import load_images
from snscc_ray.models import libraries
from snscc_ray.models.frozen import load_frozen
from tests.conftest import TINY, digits_table, shards
from tests.test_cli import Snscc, content, refused, sets

LITE = ("encoder.name=pip:efficientnet_lite0", "encoder.weights=default", "encoder.frozen=true")
needs_words = pytest.mark.skipif(
    not libraries.default_is_installed(),
    reason="the weights of pip:efficientnet_lite0 are not installed",
)
KINDS = {"golf_ball": "golf ball", "church": "church", "french_horn": "French horn"}


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


# ------------------------------------------------------------------------------- the file


def test_saved_names_are_read_again(tmp_path: Path) -> None:
    naming = Naming(("birds, small", None, 'a "q"', "Vögel", "birds, small"))
    save(naming, tmp_path)
    assert read_naming(tmp_path, 5) == naming
    assert naming.groups() == {
        "birds, small": [0, 4], "cluster 1": [1], 'a "q"': [2], "Vögel": [3]
    }  # fmt: skip


def test_a_run_without_the_file_has_no_names(tmp_path: Path) -> None:
    assert read_naming(tmp_path, 3) == Naming((None, None, None))


@pytest.mark.parametrize(
    "text",
    [
        "cluster,name\n1,cat\n",
        "\ufeffcluster;name;note\r\n1; cat ;x\r\n0;;\r\n",
        "name\tcluster\ncat\t1\n",
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / NAMES_FILE).write_bytes(text.encode())
    assert read_naming(tmp_path, 2) == Naming((None, "cat"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cluster,name\n2,cat\n", "line 2: there is no cluster '2'; the run has clusters 0 to 1"),
        ("cluster,name\n-1,cat\n", "there is no cluster '-1'"),
        ("cluster,name\n²,cat\n", "there is no cluster"),
        ("cluster,name\n,cat\n", "there is no cluster ''"),
        ("cluster,name\n1,cluster 0\n", "line 2: cluster 1 has the name 'cluster 0'"),
        ("cluster,name\n1,cat\n1,dog\n", "line 3: cluster 1 is there twice"),
        ("1,cat\n0,dog\n", "needs the columns cluster and name"),
        ("", "needs the columns cluster and name"),
    ],
)
def test_a_file_that_is_no_names_is_refused_in_one_line(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(text.encode())
    with pytest.raises(UserError, match=told) as error:
        parse(file, 2)
    assert "\n" not in str(error.value)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / NAMES_FILE).write_bytes("cluster,name\n1,Vögel\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 text.*CSV UTF-8"):
        read_naming(tmp_path, 2)


def test_an_unnamed_cluster_may_be_called_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("cluster,name\n1,cluster 1\n")
    assert parse(file, 2).groups() == {"cluster 0": [0], "cluster 1": [1]}


def test_new_suggestions_leave_what_a_person_has_changed(tmp_path: Path) -> None:
    words = [Suggestion(word, 0.5, "x") for word in ("cat", "dog", "car", "bus")]
    save(Naming(("cat", "hound", None, "bus")), tmp_path, words)
    new = Naming(("lion", "wolf", "truck", None))
    # As suggested before, changed, removed, and confirmed though the suggestion is not sure.
    assert with_suggestions(tmp_path, new) == Naming(("lion", "hound", None, "bus"))
    assert with_suggestions(tmp_path / "nothing", new) == new


# ------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("torchvision:resnet18", "fc"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
        ("torchvision:shufflenet_v2_x0_5", "fc"),
        ("timm:resnet10t", "fc"),
        ("timm:vit_tiny_patch16_224", "head"),
        ("timm:convnext_atto", "head.fc"),
    ],
)
def test_the_classifier_is_the_one_that_the_encoder_leaves_out(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real architectures, with random weights: published ones need a network."""
    library, model = libraries.split(name)
    torch.manual_seed(0)
    timms = name.startswith("timm:")
    whole: Any = timm.create_model(model) if timms else torchvision.models.get_model(model)
    whole.eval()
    state = whole.state_dict()
    monkeypatch.setattr(type(library), "weights", lambda self, model: state)
    monkeypatch.setattr(timm, "create_model", _not_pretrained(timm.create_model, state))
    known = library.vocabulary(model)
    assert known is not None and len(known.words) == 1000
    assert known.words[0] == "tench" and "golf ball" in known.words
    encoder = libraries.build(name, 3).eval()
    encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith(f"{place}.")})
    x_BCHW = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        scores_BV = encoder(x_BCHW) @ known.weight_VD.T + whole.get_submodule(place).bias
        assert torch.allclose(scores_BV, whole(x_BCHW), atol=1e-4)


def _not_pretrained(create: Any, state: dict[str, torch.Tensor]) -> Any:
    def made(model: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        net: nn.Module = create(model, **settings)
        if pretrained:
            net.load_state_dict(state)
        return net

    return made


@pytest.mark.parametrize("model", ["vit_small_patch14_dinov2.lvd142m", "resnet50_clip.openai"])
def test_weights_without_classes_have_no_words(model: str) -> None:
    assert libraries.LIBRARIES["timm"].vocabulary(model) is None


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 photographs of each of three kinds, in a folder for each."""
    folder = tmp_path_factory.mktemp("photos")
    left = dict.fromkeys(KINDS, 30)
    for file in sorted(shards("imagenette-96").glob("*.parquet")):
        for row in pq.read_table(file, columns=["image", "class_name"]).to_pylist():
            kind = row["class_name"]
            if left.get(kind):
                (folder / kind).mkdir(exist_ok=True)
                (folder / kind / f"{left[kind]}.jpg").write_bytes(row["image"])
                left[kind] -= 1
    assert not any(left.values())
    return folder


@needs_words
def test_real_photographs_get_the_word_of_their_kind(photos: Path) -> None:
    changes = [f"data.path={photos}", "data.image_size=96", "data.folders_are_labels=true", *LITE]
    recipe = override(get("images"), [*changes, "data.num_clusters=3"])
    images = load_images(recipe.data)
    frozen, _ = load_frozen(recipe)
    x_BCHW = images.images.float() / 255
    with torch.no_grad():
        features_ND = torch.cat([frozen(part) for part in x_BCHW.split(45)])
    labels, classes = images.catalog.labels, images.catalog.class_names
    known = libraries.vocabulary_of(recipe.encoder.name)
    assert labels is not None and classes is not None and known is not None
    bank = bank_of(features_ND.half().numpy(), torch.device("cpu"))
    found = suggest(bank, labels.long(), 4, known)
    assert [s and s.word for s in found] == [*(KINDS[name] for name in classes), None]
    assert all(s.confidence > 0.1 and s.runner_up != s.word for s in found[:3] if s)
    # Nothing is special of a cluster that holds everything.
    assert suggest(bank, labels.long() * 0, 2, known) == (None, None)


@pytest.fixture(scope="module")
def named_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `snscc fit` makes of them."""
    folder = tmp_path_factory.mktemp("named") / "run"
    words = [
        "snscc", "fit", str(photos), "--clusters", "3", "--image-size", "96", "--out", str(folder),
        *sets(*LITE, "train.epochs=20", "boost.epochs=1"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", words)
        cli.main()
    assert exit.value.code == 0
    return folder


def lines(run: Path) -> list[dict[str, str]]:
    with (run / NAMES_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@needs_words
def test_fit_names_the_clusters_and_keeps_a_persons_names(
    named_run: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(named_run, tmp_path / "run"))
    assert {line["name"] for line in lines(run)} == set(KINDS.values())
    before = (run / NAMES_FILE).read_text()
    done = snscc("name", run)
    assert done.status == 0 and (run / NAMES_FILE).read_text() == before
    for line in lines(run):
        assert line["name"] in done.out and line["runner_up"] in done.out
    # A person's names stay, whatever runs again.
    edited = before.replace(",church,church", ",chapel [red],church")
    (run / NAMES_FILE).write_text(edited)
    assert snscc("name", run).status == 0 and (run / NAMES_FILE).read_text() == edited
    again = snscc(
        "fit", photos, "--clusters", 3, "--image-size", 96, "--out", run,
        *sets(*LITE, "train.epochs=20", "boost.epochs=1"),
    )  # fmt: skip
    assert again.status == 0 and "chapel [red]" in again.out and "tench" not in again.out
    assert (run / NAMES_FILE).read_text() == edited
    assert snscc("name", run, "--overwrite").status == 0
    assert (run / NAMES_FILE).read_text() == before


# ------------------------------------------------------------------------------- where they show


@needs_words
def test_photographs_are_found_by_a_word(
    named_run: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    texts = ("--text", "Church", "--text", "golf ball", "--text", "FRENCH horn")
    done = snscc("similar", named_run, *texts, "-n", 20, "-o", page)
    assert done.status == 0, done.err
    found = done.out.split("similarity  cluster")[1:]
    for kind, told in zip(("church", "golf_ball", "french_horn"), found, strict=True):
        ids = [line.split()[-1] for line in told.splitlines() if ".jpg" in line][:20]
        assert len(ids) == 20 and sum(name.startswith(f"{kind}/") for name in ids) >= 18, ids
    assert page.read_text().count('role="img"') == 60
    refused(snscc("similar", named_run, "--text", "unicorn"), "--text unicorn", "1,000 words")
    refused(snscc("similar", named_run), "--text WORD")


@pytest.mark.parametrize(
    ("text", "places"),
    [("Sea lion", [0]), ("lions", [1]), ("SEA", [0, 2]), ("anemone sea", [2]), ("dogs", [3])],
)
def test_what_a_text_stands_for(text: str, places: list[int]) -> None:
    words = ("sea lion", "lion", "sea anemone", "dog")
    assert meant(text, words) == places


@pytest.mark.parametrize("text", ["cat", "", "sea dog", "?"])
def test_a_text_that_stands_for_no_word(text: str) -> None:
    with pytest.raises(UserError, match="none of the 4 words"):
        meant(text, ("sea lion", "lion", "sea anemone", "dog"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose encoder knows no words."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    words = ["snscc", "run", "digits", *sets(*TINY), "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", words)
        cli.main()
    assert exit.value.code == 0
    return folder


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "run"))


def test_an_encoder_without_words_says_what_to_do(run: Path, snscc: Snscc) -> None:
    before = content(run)
    refused(snscc("name", run), "no names to suggest", "without words", "--names FILE")
    assert content(run) == before


def test_a_persons_file_is_taken_whole_or_not_at_all(
    run: Path, snscc: Snscc, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text("cluster,name\n0,round\n10,tall\n")
    before = content(run)
    refused(snscc("name", run, "--names", mine), "line 3: there is no cluster '10'")
    assert content(run) == before
    mine.write_text("cluster,name\n0,round\n3,round\n")
    done = snscc("name", run, "--names", mine)
    assert done.status == 0 and "clusters 0, 3 have the name 'round'" in done.out
    mine.write_text("cluster,name\n1,tall\n")
    assert snscc("name", run, "--names", mine).status == 0
    expected = {0: "round", 1: "tall", 3: "round"}
    assert read_naming(run, 10) == Naming(tuple(expected.get(c) for c in range(10)))
    assert snscc("name", run).status == 0  # lists them


def test_names_are_wherever_the_clusters_are(run: Path, snscc: Snscc, tmp_path: Path) -> None:
    naming = Naming(("<b>round</b>", None, "[red]", *["tall"] * 7))
    save(naming, run)
    (tmp_path / "new").mkdir()
    table = pq.read_table(run / "assignments.parquet")
    for number, image in enumerate(digits_table(40)["image"].to_pylist()):
        (tmp_path / "new" / f"{number:02}.png").write_bytes(image)
    for ending in ("parquet", "csv"):
        out = tmp_path / f"out.{ending}"
        done = snscc("predict", run, tmp_path / "new", "-o", out)
        assert done.status == 0, done
        if ending == "csv":
            with out.open(newline="") as file:
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
        else:
            rows = pq.read_table(out).to_pylist()
        assert {row["name"] for row in rows} <= {"<b>round</b>", "cluster 1", "[red]", "tall"}
        assert all(row["name"] == naming.label(int(row["cluster"])) for row in rows)
        for row in rows:
            assert row["name"] in done.out
    assert len(set(table["cluster"].to_pylist())) > 2

    done = snscc("export", run, "--torch", tmp_path / "model.pt2")
    assert done.status == 0, done
    held = {"snscc.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=held)
    assert json.loads(held["snscc.json"])["names"] == naming.labels()

    assert snscc("report", run).status == 0
    page = (run / "report.html").read_text()
    assert "<b>round</b>" not in page and "&lt;b&gt;round&lt;/b&gt;" in page
    assert "clusters 3, 4, 5, 6, 7, 8, 9 are one group" in page
    held_clusters = json.loads((run / "report.json").read_text())["clusters"]
    assert [line["label"] for line in held_clusters] == naming.labels()


def test_the_onnx_file_names_the_clusters(run: Path, snscc: Snscc, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    naming = Naming(("Null", *[None] * 9))
    save(naming, run)
    done = snscc("export", run, "--onnx", tmp_path / "model.onnx")
    assert done.status == 0, done
    props = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(props["names"]) == naming.labels()


def test_a_run_that_replaces_another_has_none_of_its_names(run: Path, snscc: Snscc) -> None:
    save(Naming(("zero", *[None] * 9)), run)
    kept = snscc("run", "digits", *sets(*TINY), "--out", run, "--resume")
    assert kept.status == 0 and read_naming(run, 10).names[0] == "zero"
    for file in ("stage.json", "final.pt"):
        (run / "boost" / file).unlink()
    again = snscc("run", "digits", *sets(*TINY), "--out", run, "--resume")
    assert again.status == 0 and "names of the former clusters" in again.out
    assert read_naming(run, 10).names[0] == "zero"
    new = snscc("run", "digits", *sets(*TINY), "--out", run, "--overwrite")
    assert new.status == 0 and not (run / NAMES_FILE).exists()


def test_what_is_no_sheet_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        parse(tmp_path / "gone.csv", 2)
    with pytest.raises(UserError, match="it is a folder"):
        parse(tmp_path, 2)
    (tmp_path / "upper.csv").write_text("Cluster;NAME\n0;Vögel\n")
    assert parse(tmp_path / "upper.csv", 2).names == ("Vögel", None)


def test_edited_names_are_kept_beside_new_clusters(tmp_path: Path) -> None:
    given = [Suggestion("church", 0.9, "dome"), None]
    save(Naming(("church", None)), tmp_path, given)
    assert keep_edited(tmp_path) is None  # nobody's work
    save(Naming(("abbey", None)), tmp_path, given)
    kept = keep_edited(tmp_path)
    assert kept is not None and parse(kept, 2).names == ("abbey", None)


def test_a_text_needs_an_encoder_with_words(run: Path, snscc: Snscc) -> None:
    refused(snscc("similar", run, "--text", "seven"), "trained its encoder", "without words")

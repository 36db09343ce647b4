"""Embeddings in place of images, from the file to the answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from snscc_ray import SNSCC
from snscc_ray.cli import options
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import DataSettings
from snscc_ray.core import rng
from snscc_ray.core.clustering.mining import MinedNeighbors, mine
from snscc_ray.core.views import Normalize
from snscc_ray.data.imageset import assemble
from snscc_ray.data.loading.bank import bank_of, open_bank
from snscc_ray.data.sources import list_rows, resolve_source
from snscc_ray.data.vectors import rows_of_vectors
from snscc_ray.training.context import Context
from snscc_ray.training.stages import extract
from snscc_ray.training.stages.extract import mix_neighbors
from tests.conftest import digits_table
from tests.test_cli import Snscc, content

CPU = torch.device("cpu")
ROWS, WIDTH, KINDS = 160, 12, 4
QUICK = ["--device", "cpu", "--set", "train.epochs=12", "--set", "boost.epochs=2"]


def blobs(rows: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of four kinds around four centres, of any length, and the kind of each."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(KINDS, WIDTH))
    kinds = draw.integers(0, KINDS, rows)
    vectors = centres[kinds] + 0.3 * draw.normal(size=(rows, WIDTH))
    return (vectors * draw.uniform(0.1, 50, (rows, 1))).astype(np.float32), kinds


def lists(vectors: np.ndarray, fixed: bool = True) -> pa.Array:
    if not fixed:
        return pa.array(list(vectors))
    return pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), vectors.shape[1])


def table(rows: int = ROWS, seed: int = 0, **more: Any) -> pa.Table:
    vectors, kinds = blobs(rows, seed)
    named = {"id": [f"r{row}" for row in range(rows)], "label": kinds, "embedding": lists(vectors)}
    return pa.table({**named, **more})


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("given") / "vectors.parquet"
    pq.write_table(table(), file)
    return file


@pytest.fixture(scope="module")
def run(given: Path) -> Path:
    """A run of `snscc fit` on them."""
    from snscc_ray.cli import app

    folder = given.parent / "run"
    command = ["fit", str(given), "--out", str(folder), "--clusters", "4", *QUICK]
    app(command, standalone_mode=False)
    return folder


def held(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def load(path: Path, **settings: Any) -> Any:
    data = recipes.get("images").data.model_copy(update={"path": str(path), **settings})
    return list_rows(data)


# --------------------------------------------------------------------------------- the commands


def test_a_file_becomes_clusters_and_a_report(run: Path) -> None:
    found = pq.read_table(run / "assignments.parquet")
    assert found["id"].to_pylist() == [f"r{row}" for row in range(ROWS)]
    assert adjusted_rand_score(blobs()[1], found["cluster"].to_pylist()) > 0.9
    assert held(run, "metrics.json")["stages"]["boost"]["oracle/ari"] > 0.9
    recipe = held(run, "recipe.json")["recipe"]
    assert recipe["encoder"]["name"] == "none" and recipe["encoder"]["weights"] is None
    picked = {pick["what"]: pick["value"] for pick in held(run, "fit.json")["picked"]}
    assert picked["encoder"] == "none" and not picked.keys() & {"image size", "colours"}
    page = (run / "report.html").read_text()
    assert '<span class="no-pic">r' in page and "data:image/webp" not in page
    assert "The embeddings were given" in page.replace("the embeddings", "The embeddings")
    assert "pixels" not in " ".join(held(run, "report.json")["summary"]["words"])


def test_the_same_command_continues_a_stopped_run(
    run: Path, given: Path, snscc: Snscc, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in ("metrics.json", "assignments.parquet", "train/stage.json", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "boost")
    before = content(folder / "pretrain")
    done = snscc("fit", given, "--out", folder, "--clusters", 4, *QUICK)
    assert done.status == 0 and "continuing the run" in done.out, done.err
    assert {**content(folder / "pretrain"), **before} == content(folder / "pretrain")
    expected = pq.read_table(run / "assignments.parquet")
    assert pq.read_table(folder / "assignments.parquet").equals(expected)
    pq.write_table(table(seed=1), other := tmp_path / "vectors.parquet")
    one_line(snscc("fit", other, "--out", folder, "--clusters", 4, *QUICK), "with other options")


@pytest.mark.parametrize("form", ["parquet", "lists", "shards", "npy", "npz", "double"])
def test_own_rows_get_their_own_answers(run: Path, snscc: Snscc, tmp_path: Path, form: str) -> None:
    vectors, _ = blobs()
    file = tmp_path / "same"
    if form == "npy":
        np.save(file := tmp_path / "same.npy", vectors)
    elif form == "double":
        np.save(file := tmp_path / "same.npy", np.asfortranarray(vectors.astype(np.float64)) * 4)
    elif form == "npz":
        np.savez(file := tmp_path / "same.npz", whatever=vectors)
    elif form == "shards":
        file.mkdir()
        for number, part in enumerate((table().slice(0, 70), table().slice(70))):
            pq.write_table(part, file / f"{number}.parquet", row_group_size=32)
    else:
        other = pa.table({"vector": lists(vectors, fixed=False)}) if form == "lists" else table()
        pq.write_table(other, file := tmp_path / "same.parquet", row_group_size=33)
    out = tmp_path / "new.parquet"
    done = snscc("predict", run, file, "-o", out, "--device", "cpu")
    assert done.status == 0, done.err
    expected, found = pq.read_table(run / "assignments.parquet"), pq.read_table(out)
    assert found["cluster"].equals(expected["cluster"])
    assert found["confidence"].equals(expected["confidence"])
    assert [near[0] for near in found["nearest"].to_pylist()] == expected["id"].to_pylist()


def test_predict_refuses_what_the_run_is_not_on(run: Path, snscc: Snscc, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.ones((3, WIDTH + 1), np.float32))
    pq.write_table(digits_table(3), tmp_path / "digits.parquet")
    for file, why in (
        ("wide.npy", f"have {WIDTH + 1} numbers, and those of the run {WIDTH}"),
        ("digits.parquet", "the run is on embeddings, and .* holds images"),
    ):
        done = snscc("predict", run, tmp_path / file, "-o", tmp_path / "new.parquet")
        one_line(done, why)
    assert not (tmp_path / "new.parquet").exists()


def test_the_number_of_clusters_is_estimated_and_sizes_may_differ(
    given: Path, snscc: Snscc, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = snscc("fit", given, "--out", out, "--max-cluster-imbalance", 5, *QUICK)
    assert done.status == 0, done.err
    assert held(out, "clusters.json")["chosen"] == KINDS
    assert "minutes" in done.out
    assert held(out, "recipe.json")["recipe"]["train"]["max_imbalance"] == 5


def test_the_pictures_of_a_column_are_shown(snscc: Snscc, tmp_path: Path) -> None:
    pictures = digits_table(40)["image"].to_pylist()
    pictures[3] = b"torn"
    pq.write_table(table(40, image=pictures), tmp_path / "both.parquet")
    command = ("fit", tmp_path / "both.parquet", "--clusters", 4, "--out", tmp_path / "run")
    done = snscc(*command, *QUICK)
    assert done.status == 0, done.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/webp" in page and 'class="no-pic"' not in page


def test_the_model_is_exported(run: Path, snscc: Snscc, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    done = snscc("export", run, "--torch", file)
    assert done.status == 0, done.err
    p_BC, z_BD = torch.export.load(file).module()(torch.from_numpy(blobs()[0]))
    known = pq.read_table(run / "assignments.parquet")
    assert p_BC.argmax(1).tolist() == known["cluster"].to_pylist()
    np.testing.assert_allclose(p_BC.max(1).values.detach(), known["confidence"], atol=1e-4)
    assert z_BD.norm(dim=1).sub(1).abs().max() < 1e-5


def test_a_recipe_runs_and_continues(given: Path, snscc: Snscc, tmp_path: Path) -> None:
    fields = (
        "data.num_clusters=4", "encoder.name=none", "encoder.frozen=true", "encoder.views=2",
        "pretrain.batch_size=32", "train.batch_size=32", "boost.batch_size=32", "train.epochs=4",
        "boost.epochs=2", "pretrain.epochs=0", "runtime.device=cpu",
    )  # fmt: skip
    settings = [word for field in fields for word in ("--set", field)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ("run", "images", "--data", given, *settings)
    assert snscc(*command, "--out", whole).status == 0
    first = snscc(*command, "--out", parts, "--stages", "pretrain,train")
    assert first.status == 0 and f"embeddings of {WIDTH} numbers" in first.out
    rest = snscc("run", "--resume", "--out", parts)
    assert rest.status == 0, rest.err
    name = "assignments.parquet"
    assert pq.read_table(whole / name).equals(pq.read_table(parts / name))
    one_line(
        snscc("run", "images", "--data", given, "--out", tmp_path / "x"),
        "holds embeddings, which need no encoder; use .snscc fit., or",
    )


# ------------------------------------------------------------------------------------ the views


def mined_of(vectors: np.ndarray, tmp_path: Path) -> tuple[Context, MinedNeighbors]:
    rows = rows_of_vectors(vectors, "X")
    assert rows.vectors is not None
    fields = ["encoder.name=none", "encoder.frozen=true", "encoder.views=3"]
    recipe = override(recipes.get("images"), fields)
    context = Context(recipe, bank_of(rows.vectors, CPU), None, Normalize((0,), (1,)), CPU)
    return context, mine(torch.from_numpy(rows.vectors).float(), 6)


def test_a_view_mixes_a_row_with_a_neighbour(tmp_path: Path) -> None:
    vectors = blobs(600)[0]
    context, mined = mined_of(vectors, tmp_path)
    mix_neighbors(context, mined, tmp_path / "bank", "a")
    bank = open_bank(tmp_path / "bank", CPU)
    features = bank.take(torch.arange(600)).double().numpy()
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    assert features.shape == (600, 4, WIDTH)
    assert np.abs(features[:, 0] - unit).max() < 5e-4
    shares, partners = [], []
    for row in range(0, 600, 7):
        chance = mined.confidence_NK[row].double().numpy()
        for view in range(3):
            key = rng.fold(0, "neighbors", view)
            draw, share = rng.uniform(torch.tensor([row]), key, 2)[0].tolist()
            place = int(np.searchsorted(np.cumsum(chance / chance.sum()), draw, side="right"))
            partner = int(mined.neighbors_NK[row, min(place, 5)])
            mixed = (1 - share / 2) * unit[row] + share / 2 * unit[partner]
            assert np.abs(features[row, 1 + view] - mixed / np.linalg.norm(mixed)).max() < 1e-3
            shares.append(share / 2)
            partners.append(place)
    assert max(shares) <= 0.5 and 0.2 < np.mean(shares) < 0.3
    assert np.bincount(partners).argmax() == 0  # the nearest has the highest confidence


def test_views_depend_on_their_own_seed_only(tmp_path: Path) -> None:
    context, mined = mined_of(blobs(60)[0], tmp_path)

    def made(name: str, *fields: str) -> torch.Tensor:
        changed = replace(context, recipe=override(context.recipe, fields))
        mix_neighbors(changed, mined, tmp_path / name, name)
        return open_bank(tmp_path / name, CPU).take(torch.arange(60))

    first = made("a")
    assert torch.equal(made("b", "seed=5"), first)
    other = made("c", "encoder.views_seed=1")
    assert torch.equal(other[:, 0], first[:, 0]) and not torch.equal(other[:, 1], first[:, 1])
    assert made("d", "encoder.views=0").shape == (60, 1, WIDTH)


def test_a_kill_while_views_are_made_costs_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, mined = mined_of(blobs(1200)[0], tmp_path)
    mix_neighbors(context, mined, tmp_path / "whole", "a")
    write, written = extract.write_shard, []

    def killed(folder: Path, number: int, features: np.ndarray) -> None:
        if number == 1 and not written.count(1):
            written.append(1)
            raise KeyboardInterrupt
        written.append(number)
        write(folder, number, features)

    monkeypatch.setattr(extract, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        mix_neighbors(context, mined, tmp_path / "bank", "a")
    mix_neighbors(context, mined, tmp_path / "bank", "a")
    assert written == [0, 1, 1, 2]
    assert content(tmp_path / "bank") == content(tmp_path / "whole")


# ---------------------------------------------------------------------------------- what is read


def test_vectors_of_any_scale_have_length_1() -> None:
    vectors = blobs(50)[0].astype(np.float64)
    expected = rows_of_vectors(vectors, "X").vectors
    assert expected is not None and expected.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(expected.astype(np.float64), axis=1), 1, atol=1e-3)
    for scale in (2.0**900, 2.0**-900, 2.0):
        found = rows_of_vectors(vectors * scale, "X").vectors
        assert found is not None and np.array_equal(found, expected)


def test_ids_labels_and_limit(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", blobs(9)[0])
    assert load(tmp_path / "a.npy", limit=2).ids == ["a.npy:0", "a.npy:1"]
    pq.write_table(table(9).drop_columns(["id"]), tmp_path / "b.parquet")
    rows = load(tmp_path / "b.parquet", limit=5)
    assert rows.ids[4] == "b.parquet:4" and rows.vectors.shape == (5, WIDTH)
    assert rows.labels.tolist() == blobs(9)[1][:5].tolist()
    with pytest.raises(UserError, match="holds embeddings, and this needs images"):
        assemble(rows, recipes.get("images").data, 1, None)


def test_what_files_hold_is_recognised(tmp_path: Path) -> None:
    vectors, images = blobs(5)[0], digits_table(5)
    boxes = {"boxes": lists(vectors)}

    def kind(name: str, **tables: dict[str, Any]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file, columns in tables.items():
            pq.write_table(pa.table(columns), folder / f"{file}.parquet")
        data = DataSettings(source="auto", num_clusters=2, image_size=8)
        whole = resolve_source(data.model_copy(update={"path": str(folder)}))
        if len(tables) == 1:
            file = folder / f"{next(iter(tables))}.parquet"
            assert resolve_source(data.model_copy(update={"path": str(file)})) == whole
        return whole

    picture = {"image": images["image"]}
    assert kind("a", one={"embedding": lists(vectors)}) == "embeddings"
    assert kind("b", one=boxes) == "embeddings"
    assert kind("c", one=picture | boxes) == "shards"  # any list of floats is no embedding
    assert kind("d", one=picture | {"features": lists(vectors)}) == "embeddings"
    assert kind("e", one=picture, two=boxes) == "shards"
    assert kind("f", one={"name": ["x"]}) == "shards"  # which says what is missing


def test_one_of_several_columns_is_chosen(given: Path, snscc: Snscc, tmp_path: Path) -> None:
    clip, dino = blobs(40)[0], blobs(40, seed=1)[0][:, :6].copy()
    file, out = tmp_path / "two.parquet", tmp_path / "run"
    pq.write_table(pa.table({"clip": lists(clip), "dino": lists(dino)}), file)
    asked = snscc("fit", file, "--out", out)
    one_line(asked, r"\(clip, dino\): choose one with --column NAME")
    assert not out.exists()
    one_line(snscc("fit", file, "--out", out, "--column", "nope"), "has no column .* 'nope'")
    done = snscc("fit", file, "--out", out, "--column", "dino", "--clusters", 2, *QUICK)
    assert done.status == 0, done.err
    new = tmp_path / "new.parquet"
    assert snscc("predict", out, file, "-o", new).status == 0  # the run's column
    own = pq.read_table(out / "assignments.parquet")
    assert pq.read_table(new)["cluster"].equals(own["cluster"])
    wrong = snscc("predict", out, file, "-o", new, "--overwrite", "--column", "clip")
    one_line(wrong, "have 12 numbers, and those of the run 6")
    np.savez(tmp_path / "two.npz", clip=clip, dino=dino)
    assert load(tmp_path / "two.npz", column="dino").vectors.shape == (40, 6)
    with pytest.raises(UserError, match="2 arrays that may be"):
        load(tmp_path / "two.npz")


# ------------------------------------------------------------------------------------- bad input


def spoilt(row: int, value: float) -> np.ndarray:
    vectors = blobs(40)[0]
    vectors[row] = value
    return vectors


def ragged(row: int) -> list[list[float] | None]:
    rows = blobs(40)[0].tolist()
    rows[row] = rows[row][:-1]
    return rows


def lacking(row: int) -> list[list[float] | None]:
    return [None if number == row else line for number, line in enumerate(blobs(40)[0].tolist())]


def npy(array: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "bad.npy", array, allow_pickle=True)
        return folder / "bad.npy"

    return write


def parquet(**columns: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "bad.parquet")
        return folder / "bad.parquet"

    return write


def raw(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


class Trap:
    """What must never be unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


BAD = {
    "NaN": (npy(spoilt(17, np.nan)), r"row 17 of .*bad\.npy .* NaN"),
    "infinity": (npy(spoilt(0, np.inf)), "row 0 of .* infinite"),
    "zeros": (npy(spoilt(39, 0)), "row 39 of .* only zeros"),
    "NaN in a list": (parquet(embedding=lists(spoilt(5, np.nan))), "row 5 of .* NaN"),
    "zeros in a list": (parquet(embedding=lists(spoilt(6, 0))), "row 6 of .* zeros"),
    "null in a list": (parquet(embedding=[[1.0, None]] * 30), "row 0 of .* NaN"),
    "no list": (parquet(embedding=lacking(8)), "row 8 of .* has no embedding"),
    "unequal": (parquet(embedding=ragged(7)), "row 7 of .* has 11 numbers .* 12"),
    "1-D": (npy(np.ones(40)), r"shape \(40,\)"),
    "0-D": (npy(np.array(3.0)), r"shape \(\)"),
    "3-D": (npy(np.ones((40, 3, 4))), r"shape \(40, 3, 4\)"),
    "one number": (npy(np.ones((40, 1))), "at least two numbers"),
    "integers": (npy(np.ones((40, 4), np.int64)), "int64 values: embeddings must be floats"),
    "lists of integers": (
        parquet(embedding=[[1, 2]] * 30, scores=[[0.5, 2]] * 30),
        "`embedding` .* int64 .* must be floats",
    ),
    "objects": (npy(np.array([Trap()] * 30)), "cannot be read as a NumPy array .it holds pickled"),
    "no array": (raw("bad.npy", b"no array at all"), "cannot be read as a NumPy array"),
    "no archive": (raw("bad.npz", b"PK\3\4 no archive"), "cannot be read as a NumPy array"),
    "few": (npy(blobs(12)[0]), "12 embeddings are too few"),
    "fewer than clusters": (npy(blobs(40)[0]), "--clusters 50: of the 40 there are"),
    "no rows": (npy(np.ones((0, 4), np.float32)), "0 embeddings are too few"),
    "same ids": (parquet(id=["a"] * 40, embedding=lists(blobs(40)[0])), "id 'a' occurs 40 times"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    snscc: Snscc, tmp_path: Path, case: str
) -> None:
    write, why = BAD[case]
    file = write(tmp_path)
    clusters = 50 if case == "fewer than clusters" else 4
    done = snscc("fit", file, "--out", tmp_path / "run", "--clusters", clusters)
    one_line(done, why)
    assert not (tmp_path / "run").exists()


def test_a_torn_array_is_refused(snscc: Snscc, tmp_path: Path) -> None:
    np.save(tmp_path / "torn.npy", blobs(40)[0])
    whole = (tmp_path / "torn.npy").read_bytes()
    (tmp_path / "torn.npy").write_bytes(whole[:-100])
    one_line(snscc("fit", tmp_path / "torn.npy"), "cannot be read as a NumPy array")


def test_wishes_about_images_are_refused(given: Path, snscc: Snscc, tmp_path: Path) -> None:
    for option in (["--from-scratch"], ["--image-size", 32], ["--encoder", "torchvision:resnet18"]):
        done = snscc("fit", given, "--out", tmp_path / "run", *option)
        one_line(done, f"{option[0]} is for images, and these are embeddings")
    one_line(
        snscc("fit", given, "--out", tmp_path / "run", "--labels"), "--labels and --labels-deepest"
    )
    np.save(tmp_path / "a.npy", blobs(40)[0])
    one_line(snscc("fit", tmp_path / "a.npy", "--column", "b"), "is one array, so it has no column")
    one_line(snscc("fit", given, "--clusters", "²"), "give a number of 2 or more")


def test_an_array_with_a_negative_shape_is_refused(snscc: Snscc, tmp_path: Path) -> None:
    np.save(file := tmp_path / "a.npy", blobs(40)[0])
    file.write_bytes(file.read_bytes().replace(b"(40, 12), }", b"(-40, 12),}"))
    one_line(snscc("fit", file), "cannot be read as a NumPy array")


def test_arrays_beside_parquet_files_are_named(given: Path, tmp_path: Path) -> None:
    shutil.copy(given, tmp_path / "a.parquet")
    np.save(tmp_path / "b.npy", blobs(40)[0])
    found = load(tmp_path)
    assert len(found.ids) == ROWS and any("b.npy" in note for note in found.notes)


@pytest.mark.parametrize("content", ["[]", "{}", '{"asked": 3, "recipe": {}}'])
def test_a_damaged_note_of_fit_is_one_line(
    content: str, run: Path, given: Path, snscc: Snscc, tmp_path: Path
) -> None:
    shutil.copytree(run, folder := tmp_path / "run")
    (folder / "fit.json").write_text(content)
    one_line(snscc("fit", given, "--out", folder, "--clusters", 4), "fit.json is damaged")


def test_embeddings_that_changed_since_are_refused(snscc: Snscc, tmp_path: Path) -> None:
    vectors, _ = blobs()
    np.save(file := tmp_path / "a.npy", vectors)
    folder = tmp_path / "run"
    assert snscc("fit", file, "--out", folder, "--clusters", 4, *QUICK).status == 0
    for kept in folder.glob("*/features.pt"):
        kept.unlink()
    np.save(file, np.roll(vectors, 1, axis=0))
    one_line(snscc("report", folder), "does not hold the images of the run .*the same names")
    done = snscc("predict", folder, file, "-o", tmp_path / "p.parquet")
    assert "no nearest images" in done.out and "the same names" in done.out.replace("\n", " ")
    assert not list(folder.glob("*/features.pt"))
    np.save(file, vectors)
    assert snscc("report", folder).status == 0


@pytest.mark.parametrize(
    "fields",
    [
        ["encoder.name=none"],
        ["encoder.name=none", "encoder.frozen=true", "encoder.weights=default"],
    ],
)
def test_no_encoder_is_frozen_and_has_no_weights(fields: list[str]) -> None:
    with pytest.raises(UserError, match=r"set encoder\.frozen=true, and leave encoder\.weights"):
        override(recipes.get("images"), fields)


def test_images_need_an_encoder(snscc: Snscc, tmp_path: Path) -> None:
    fields = ("--set", "encoder.name=none", "--set", "encoder.frozen=true")
    done = snscc("run", "digits", *fields, "--out", tmp_path / "run")
    one_line(done, "encoder.name=none is for embeddings, and the digits .* holds images")


def one_line(done: Any, why: str) -> None:
    assert done.status == 2, done.err
    assert done.err.count("\n") == 1 and re.search(why, done.err), done.err


# ----------------------------------------------------------------------------------- the estimator

FIELDS = ["train.epochs=12", "boost.epochs=2"]


def test_the_estimator_takes_an_array(run: Path, given: Path) -> None:
    vectors, kinds = blobs()
    model = SNSCC(4, embeddings=True, settings=FIELDS, device="cpu").fit(vectors)
    assert adjusted_rand_score(kinds, model.labels_) > 0.9
    assert np.array_equal(model.predict_proba(vectors), model.probabilities_)
    assert np.array_equal(model.predict_proba(torch.from_numpy(vectors)), model.probabilities_)
    assert model.n_features_in_ == WIDTH and model.transform(vectors[:3]).shape[0] == 3
    with pytest.raises(ValueError, match="13 features"):
        model.predict(np.ones((2, 13)))
    with pytest.raises(ValueError, match="only zeros"):
        model.predict(np.zeros((2, WIDTH)))
    with pytest.raises(ValueError, match="NaN"):
        SNSCC(4, embeddings=True).fit(spoilt(3, np.nan))
    with pytest.raises(ValueError, match=r"^image_size is for images"):
        SNSCC(4, embeddings=True, image_size=8).fit(vectors)
    # The same vectors and settings as `snscc fit`: a file, and no word about what it holds.
    found = SNSCC(4, settings=FIELDS, device="cpu").fit(str(given))
    known = pq.read_table(run / "assignments.parquet")
    assert found.labels_.tolist() == known["cluster"].to_pylist()


def test_without_a_word_an_array_is_pixels() -> None:
    with pytest.raises(ValueError, match="image_shape"):
        SNSCC(4).fit(np.abs(blobs()[0]))


AS_CHECKED = (
    "encoder.name=none", "encoder.frozen=true", "pretrain.batch_size=8", "pretrain.epochs=0",
    "pretrain.mined_neighbors=3", "train.batch_size=8", "train.num_neighbors=2", "train.epochs=1",
    "train.num_heads=1", "boost.batch_size=8", "boost.num_neighbors=2", "boost.epochs=1",
)  # fmt: skip
ONE_CLUSTER = "asks for one cluster, which would be no clustering"
DO_NOT_APPLY = {
    "check_dont_overwrite_parameters": ONE_CLUSTER,
    "check_methods_subset_invariance": ONE_CLUSTER,
    "check_fit2d_1sample": ONE_CLUSTER,
    "check_fit2d_1feature": ONE_CLUSTER,
    "check_fit2d_predict1d": ONE_CLUSTER,
    "check_estimators_dtypes": "has a row of zeros",
}


@parametrize_with_checks(
    [SNSCC(2, embeddings=True, recipe="images", settings=AS_CHECKED, device="cpu")],
    expected_failed_checks=lambda estimator: DO_NOT_APPLY,
)
def test_scikit_learn_finds_its_conventions_kept(estimator: Any, check: Any) -> None:
    check(estimator)

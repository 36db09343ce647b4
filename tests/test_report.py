"""A finished run as one page: what it judges, which images it picks, and what it writes."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from snscc_ray.answers.names import Naming, save
from snscc_ray.answers.report import charts, embed, facts, page, pick, sprites
from snscc_ray.answers.report.moved import Common, moved
from snscc_ray.answers.report.trust import judge
from snscc_ray.answers.report.words import in_words
from snscc_ray.cli import options
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.runs.local import run_here
from snscc_ray.runs.run import Request
from tests.conftest import TINY
from tests.test_cli import PHOTOS, Snscc, photos, refused, sets  # noqa: F401

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------ trust

GOOD = {
    "health/clusters_in_use": 10,
    "health/neighbor_agreement": 0.97,
    "health/balance": 0.99,
    "health/confidence": 0.98,
    "health/confident_share": 0.9,
    "health/projection_spread": 0.9,
    "health/selected_share": 0.6,
    "health/restored": 0.0,
}


def health(**figures: float) -> dict[str, float]:
    return GOOD | {f"health/{name}": value for name, value in figures.items()}


@pytest.mark.parametrize(
    ("figures", "verdict", "blamed"),
    [
        (GOOD, "likely good", []),
        (
            health(clusters_in_use=2, balance=0.1, neighbor_agreement=1.0),
            "doubtful",
            ["health/clusters_in_use", "health/balance"],
        ),
        (health(clusters_in_use=9), "mixed", ["health/clusters_in_use"]),
        (health(balance=0.7), "mixed", ["health/balance"]),
        # As measured on digits: sizes of 1 to 10, and equal ones.
        (health(forced_balance=0.07), "mixed", ["health/forced_balance"]),
        (health(forced_balance=0.01), "likely good", []),
        (health(confident_share=0.01), "mixed", ["health/confident_share"]),
        (
            health(confident_share=0.01, neighbor_agreement=0.6),
            "doubtful",
            ["health/confident_share", "health/neighbor_agreement"],
        ),
        (
            # One epoch of Pretrain on 60,000 images of CIFAR-10: ACC .19.
            health(
                projection_spread=0.076, neighbor_agreement=0.86, confident_share=0, confidence=0.49
            ),
            "doubtful",
            ["health/confident_share", "health/projection_spread"],
        ),
        (health(neighbor_agreement=0.3), "doubtful", ["health/neighbor_agreement"]),
        (
            health(confidence=0.15, confident_share=0.0),
            "doubtful",
            ["health/confidence", "health/confident_share"],
        ),
        (health(selected_share=0), "mixed", ["health/selected_share"]),
        (health(restored=1.0), "likely good", []),
    ],
)
def test_the_verdict_follows_the_figures(
    figures: dict[str, float], verdict: str, blamed: list[str]
) -> None:
    trust = judge(figures, 10)
    assert trust.verdict == verdict
    worrying = [s for s in trust.sentences if s.level in ("bad", "caution")]
    assert sorted(s.figure for s in worrying) == sorted(blamed)
    assert all(s.todo for s in worrying), "what worries says what to do"
    for sentence in trust.sentences:
        assert sentence.value == figures[sentence.figure]


def test_a_collapse_is_not_praised_for_its_agreement() -> None:
    trust = judge(health(clusters_in_use=1, balance=0.0, neighbor_agreement=1.0), 10)
    assert {s.figure: s.level for s in trust.sentences}["health/neighbor_agreement"] == "note"


def test_figures_that_are_absent_are_not_mentioned_and_warnings_are_told() -> None:
    trust = judge({"health/clusters_in_use": 10}, 10, ["train, epoch 0: collapse: only 2"])
    assert [s.figure for s in trust.sentences] == ["health/clusters_in_use", "warning"]
    assert trust.verdict == "likely good" and "only 2" in trust.sentences[1].text


def test_unevenness_that_was_allowed_is_not_held_against_a_run() -> None:
    figures = health(balance=0.75)
    assert judge(figures, 10).verdict == "mixed"
    assert judge(figures, 10, max_imbalance=20).verdict == "likely good"


def test_nearly_all_is_not_called_all() -> None:
    texts = " ".join(s.text for s in judge(health(confident_share=0.9991), 10).sentences)
    assert "over 99% of the images" in texts and "100%" not in texts
    texts = " ".join(s.text for s in judge(health(confident_share=0.001), 10).sentences)
    assert "under 1% of the images" in texts and "0% of the images are in" not in texts


# ------------------------------------------------------------------------------------- pick


def grouped(rows: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, margins and clusters of rows that are less sure the higher they are."""
    generator = torch.Generator().manual_seed(0)
    clusters_N = torch.arange(rows) % clusters
    margin_N = torch.linspace(0.98, 0.2, rows)
    features_ND = torch.randn(rows, 4, generator=generator)
    return features_ND, margin_N, clusters_N


def test_galleries_hold_the_typical_and_the_doubtful() -> None:
    features_ND, margin_N, clusters_N = grouped(300, 3)
    galleries = pick.galleries(features_ND, margin_N, clusters_N, 3, seed=0)
    assert [gallery.cluster for gallery in galleries] == [0, 1, 2]
    for gallery in galleries:
        rows = (clusters_N == gallery.cluster).nonzero()[:, 0]
        assert gallery.doubtful[0] == rows[-1], "the least sure first"
        distances = (features_ND[rows] - features_ND[rows].mean(0)).norm(dim=1)
        assert gallery.typical[0] == rows[distances.argmin()]
        assert set(gallery.random) <= set(rows.tolist())
        assert len(set(gallery.random)) == len(gallery.random) == 12
    assert galleries == pick.galleries(features_ND, margin_N, clusters_N, 3, seed=0)
    others = pick.galleries(features_ND, margin_N, clusters_N, 3, seed=1)
    assert [g.random for g in others] != [g.random for g in galleries]


@pytest.mark.parametrize("clusters", [2, 50, 200, 1000])
def test_however_many_clusters_the_images_are_bounded(clusters: int) -> None:
    galleries = pick.galleries(*grouped(4000, clusters), clusters, seed=0)
    assert len(galleries) == min(clusters, 200)
    assert sum(len(g.typical) + len(g.doubtful) + len(g.random) for g in galleries) <= 1200
    assert all(gallery.random for gallery in galleries)
    assert len(pick.with_neighbors(galleries)) <= 40


def test_an_empty_cluster_has_no_gallery() -> None:
    features_ND, margin_N, clusters_N = grouped(30, 3)
    clusters_N[clusters_N == 1] = 0
    galleries = pick.galleries(features_ND, margin_N, clusters_N, 3, seed=0)
    assert [gallery.cluster for gallery in galleries] == [0, 2]


def test_the_sample_is_seeded_and_bounded() -> None:
    assert pick.sample(5, seed=0) == [0, 1, 2, 3, 4]
    found = pick.sample(60_000, seed=0)
    assert len(set(found)) == 2000 and found == sorted(found) == pick.sample(60_000, seed=0)
    assert found != pick.sample(60_000, seed=1)


def mined(neighbors: list[list[int]], distances: list[list[float]]) -> MinedNeighbors:
    d_NK = torch.tensor(distances)
    return MinedNeighbors(torch.tensor(neighbors).int(), d_NK, torch.ones_like(d_NK))


def test_close_pairs_are_each_given_once_without_the_identical() -> None:
    # 0 and 1 are the same picture, 2 and 3 are close, 4 is far from all.
    found = mined(
        [[1, 2], [0, 2], [3, 0], [2, 0], [2, 3]],
        [[0.0, 0.3], [0.0, 0.3], [0.05, 0.3], [0.05, 0.4], [0.8, 0.9]],
    )
    images_N = pick.numbered(np.array([[7, 7], [7, 7], [9, 1], [9, 2], [0, 0]], np.uint8))
    assert len(set(images_N.tolist())) == 4
    assert pick.identical(images_N) == [[0, 1]]
    pairs, near = pick.close_pairs(found, images_N)
    assert near == 1
    assert [(pair.a, pair.b) for pair in pairs[:2]] == [(2, 3), (0, 2)]
    assert pairs[0].cosine == pytest.approx(1 - 0.05**2 / 2)
    assert len({(pair.a, pair.b) for pair in pairs}) == len(pairs) == 6
    rows, mean_N = pick.outliers(found)
    assert rows[0] == 4 and mean_N[4] == pytest.approx(0.85)


def test_near_duplicates_are_counted_and_fifty_are_listed() -> None:
    rows = 200
    neighbors = [[(row + 1) % rows] for row in range(rows)]
    found = mined(neighbors, [[0.01 + row / 1e5] for row in range(rows)])
    pairs, near = pick.close_pairs(found, np.arange(rows))
    assert (len(pairs), near) == (50, rows)
    assert (pairs[0].a, pairs[0].b) == (0, 1)


def test_groups_of_equal_images_come_by_size() -> None:
    images_N = np.array([3, 1, 0, 1, 3, 2, 1])
    assert pick.identical(images_N) == [[1, 3, 6], [0, 4]]
    assert pick.identical(np.arange(4)) == []


def test_a_border_goes_from_surely_one_to_surely_the_other() -> None:
    rows = 900
    share = torch.linspace(0, 0.5, rows).double()  # of the second choice, up to a tie
    clusters_N, second_N = torch.arange(rows) % 2, 1 - torch.arange(rows) % 2
    clusters_N[:5], second_N[:5] = 2, 0
    borders, pairs = pick.borders(clusters_N, second_N, 1 - share, share, np.arange(3))
    assert pairs == 2 and [border.clusters for border in borders] == [(0, 1), (0, 2)]
    first = borders[0]
    assert first.images == rows - 5 and first.doubt == pytest.approx(float(share[5:].sum()))
    assert len(first.rows) == len(set(first.rows)) == len(first.shares) == 17
    assert first.shares == sorted(first.shares)
    for row, shown in zip(first.rows, first.shares, strict=True):
        own = float(share[row])
        assert shown == pytest.approx(own if clusters_N[row] == 0 else 1 - own, abs=1e-4)
    assert np.allclose(first.shares, np.linspace(0, 1, 17), atol=0.01), "evenly spaced"
    assert borders[1].rows == [4, 3, 2, 1, 0], "cluster 0, the second choice, comes first"
    one_group = np.array([0, 0, 1])
    borders, pairs = pick.borders(clusters_N, second_N, 1 - share, share, one_group)
    assert pairs == 1 and borders[0].clusters == (0, 2) and borders[0].rows == [4, 3, 2, 1, 0]
    assert pick.borders(clusters_N, second_N, 1 - share, share, np.zeros(3)) == ([], 0)


def test_borders_are_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    clusters_N = torch.randint(0, 100, (5000,), generator=generator)
    second_N = (clusters_N + torch.randint(1, 100, (5000,), generator=generator)) % 100
    half = torch.full((5000,), 0.5).double()
    borders, pairs = pick.borders(clusters_N, second_N, half, half, np.arange(100))
    assert len(borders) == 30 and pairs > 1000
    assert borders[0].doubt == max(border.doubt for border in borders)


# --------------------------------------------------------------------------- between two runs


def common(there: list[int], here: list[int]) -> Common:
    unnamed = Naming((None,) * 9)
    rows_M = torch.arange(len(here)) + 100
    return Common("b", unnamed, rows_M, torch.tensor(here), torch.tensor(there), 0, 0)


def test_renumbered_clusters_have_not_moved() -> None:
    told = moved(common([0, 0, 1, 1, 2], [2, 2, 0, 0, 1]), 0, 40)
    assert told["share"] == 1 and told["stayed"] == 5
    assert told["moves"] == told["splits"] == told["merges"] == []


def test_splits_merges_and_moves_are_told() -> None:
    # Cluster 0 there is split into 0 and 1; clusters 1 and 2 there are merged into 2.
    there = [0] * 10 + [1] * 6 + [2] * 5
    here = [0] * 7 + [1] * 3 + [2] * 11
    told = moved(common(there, here), 0, 40)
    assert told["stayed"] == 7 + 6 and told["share"] == pytest.approx(13 / 21)
    assert told["counts"] == [[7, 3, 0], [0, 0, 6], [0, 0, 5]]
    split, merge = told["splits"][0], told["merges"][0]
    assert split["cluster"] == 0 and [part["cluster"] for part in split["parts"]] == [0, 1]
    assert merge["cluster"] == 2 and [part["images"] for part in merge["parts"]] == [6, 5]
    assert [(m["there"], m["here"], m["images"]) for m in told["moves"]] == [(2, 2, 5), (0, 1, 3)]
    assert sorted(told["moves"][0]["rows"]) == [116, 117, 118, 119, 120]
    assert moved(common(there, here), 0, 2)["counts"] is None, "too large to read"


# ------------------------------------------------------------------------------ sprites, map


def test_small_sprites_are_the_images_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20_000, 1, 8, 8), generator=generator, dtype=torch.uint8)
    rows = sorted(torch.randperm(20_000, generator=generator)[:17_000].tolist())
    data = ResidentData(images, CPU)
    steps: list[tuple[int, int]] = []
    taken = sprites.take(data, rows, lambda *step: steps.append(step))
    assert steps[-1] == (20_000, 20_000)
    packed = sprites.pack(rows, taken, set(rows))
    assert len(packed.sheets) == 2 and set(packed.places) == set(rows)
    opened = [np.asarray(Image.open(io.BytesIO(sheet.webp))) for sheet in packed.sheets]
    for row in (rows[0], rows[500], rows[-1]):
        place = packed.places[row]
        x, y = place.column * 8, place.line * 8
        shown = opened[place.sheet][y : y + 8, x : x + 8]
        assert np.array_equal(shown, images[row, 0].numpy()[..., None].repeat(3, 2))
    for sheet, pixels in zip(packed.sheets, opened, strict=True):
        assert pixels.shape == (sheet.lines * 8, sheet.columns * 8, 3)


def quiet(done: int, total: int) -> None: ...


def test_large_images_become_small_thumbnails() -> None:
    data = ResidentData(torch.full((5, 3, 200, 200), 77, dtype=torch.uint8), CPU)
    taken = sprites.take(data, [1, 4], quiet)
    assert taken.shape == (2, 3, 96, 96) and set(taken.unique().tolist()) == {77}
    packed = sprites.pack([1, 4], taken, {4})
    assert packed.size == 96
    sizes = [Image.open(io.BytesIO(sheet.webp)).width // sheet.columns for sheet in packed.sheets]
    assert [sizes[packed.places[row].sheet] for row in (1, 4)] == [48, 96], "a map needs less"
    assert len(np.unique(sprites.row_digests(data, quiet), axis=0)) == 1


@pytest.mark.parametrize(("rows", "dimensions"), [(2, 8), (4, 8), (60, 80)])
def test_a_map_lies_in_the_unit_square(rows: int, dimensions: int) -> None:
    features_ND = torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(0))
    points = np.array(embed.embed(features_ND, seed=0))
    assert points.shape == (rows, 2) and np.isfinite(points).all()
    assert points.min() >= 0 and points.max() <= 1


def test_a_map_parts_what_is_apart_and_survives_a_collapse() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(2, 60).repeat_interleave(50, 0)
    features_ND = centres + 0.01 * torch.randn(100, 60, generator=generator)
    points = np.array(embed.embed(features_ND, seed=0))
    middles = points[:50].mean(0), points[50:].mean(0)
    spread = np.linalg.norm(points[:50] - middles[0], axis=1).mean()
    assert np.linalg.norm(middles[0] - middles[1]) > 3 * spread
    assert embed.embed(torch.ones(50, 60), seed=0) == [[0.5, 0.5]] * 50


def test_charts_break_where_a_value_is_missing() -> None:
    drawn = charts.draw(
        [(2, 0.1), (3, 0.2), (4, None), (5, 0.3)], from_zero=False, marks=[(3, "x")]
    )
    assert drawn.path.count("M") == 2 and drawn.path.count("L") == 1
    assert len(drawn.dots) == 1, "a point alone would not be seen as a line"
    assert [mark[2] for mark in drawn.marks] == ["x"]
    assert (drawn.low, drawn.high) == (0.1, 0.3)
    flat = charts.draw([(1, 0.5)], from_zero=True)
    assert (flat.low, flat.high) == (0, 1) and len(flat.dots) == 1
    charts.draw([(1, None), (2, None)], from_zero=False, marks=[(1, "nothing there")])


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "digits <b>"
    run_here(Request("digits", list(TINY), folder), Console(quiet=True))
    return folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_once, tmp_path / finished_once.name))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text)))


def test_a_report_is_one_file_that_needs_no_other(snscc: Snscc, finished: Path) -> None:
    (finished / "clusters.json").write_text(
        '{"chosen": 3, "runner_up": 2, "tried": [2, 3], "why": "most <stable>",'
        ' "criteria": {"stability": [0.5, 0.9], "eigengap": [null, 0.1]}}'
    )
    (finished / "fit.json").write_text(
        '{"picked": [{"what": "encoder", "value": "convnet, width 32", "why": "no GPU"}]}'
    )
    done = snscc("report", finished)
    assert done.status == 0, done.err
    assert str(finished / "report.html") in done.out and "t-SNE" in done.out
    text = (finished / "report.html").read_text()
    links = re.findall(r"""(?:src|href)="([^"]*)""", text)
    assert links and all(link.startswith(("#", "data:")) for link in links), "nothing is fetched"
    assert not re.search(r"url\((?!\"data:)", text) and "@import" not in text
    assert "digits <b>" not in text and "digits &lt;b&gt;" in text
    assert "most &lt;stable&gt;" in text and "convnet, width 32" in text
    headings = re.findall(r"<h2 [^>]*>([^<]+)</h2>", text)
    assert headings[:5] == [
        "Verdict", "The clusters", "Between two clusters", "A map of the images",
        "Can I trust this?",
    ]  # fmt: skip
    assert headings[-1] == "Settings"
    assert {"How many clusters?", "Against the labels", "Outliers"} <= set(headings)


def test_the_numbers_shown_are_kept_as_data(snscc: Snscc, finished: Path) -> None:
    assert snscc("report", finished).status == 0
    data = read(finished / "report.json")
    assigned = pq.read_table(finished / "assignments.parquet").to_pylist()
    metrics = read(finished / "metrics.json")
    told = {sentence["figure"]: sentence["value"] for sentence in data["trust"]["sentences"]}
    train = metrics["stages"]["train"]
    assert told["health/forced_balance"] == train["health/forced_balance"]
    assert data["summary"]["images"] == 200 and data["stages"] == metrics["stages"]
    assert sum(line["size"] for line in data["clusters"]) == 200
    for line in data["clusters"]:
        own = [row["confidence"] for row in assigned if row["cluster"] == line["cluster"]]
        assert line["size"] == len(own)
        assert not own or line["confidence"] == pytest.approx(np.mean(own))
    for row, image in data["images"].items():
        known = assigned[int(row)]
        assert image["id"] == known["id"] and image["cluster"] == known["cluster"]
        assert image["label"] == known["label"] and image["second"] != image["cluster"]
    for line in data["neighbors"]:
        shares = [near["confidence"] for near in line["near"]]
        assert shares[0] == 1 and shares == sorted(shares, reverse=True) and len(shares) == 10
    assert list(data["scatter"]["points"]) == list(STAGES)
    lines = data["confusion"]["lines"]
    assert sum(sum(line["counts"]) for line in lines) == 200
    order = data["confusion"]["clusters"]
    for line in lines:
        own = [row["cluster"] for row in assigned if row["label"] == line["label"]]
        assert line["counts"] == [own.count(cluster) for cluster in order]
    hits = [
        line["counts"][order.index(line["cluster"])] for line in lines if line["cluster"] in order
    ]
    assert sum(hits) / 200 == pytest.approx(metrics["stages"]["boost"]["oracle/acc"])
    for border in data["borders"]:
        a, b = border["clusters"]
        both = [row for row in assigned if {row["cluster"], row["second"]} == {a, b}]
        assert border["images"] == len(both)
        in_doubt = sum(row["second_confidence"] for row in both)
        assert border["doubt"] == pytest.approx(in_doubt, rel=1e-5)
    assert data["moved"] is None
    before = (finished / "report.html").read_bytes()
    assert snscc("report", finished).status == 0
    assert (finished / "report.html").read_bytes() == before, "the same run, the same page"


def test_names_take_the_place_of_numbers(snscc: Snscc, finished: Path) -> None:
    save(Naming(("ze<ro>", *(None,) * 8, "nine")), finished)
    assert snscc("report", finished).status == 0
    assert read(finished / "report.json")["names"][:2] == ["ze<ro> (0)", "cluster 1"]
    text = (finished / "report.html").read_text()
    assert "ze<ro>" not in text and '<th scope="row">ze&lt;ro&gt; (0)</th>' in text
    assert ">nine (9) <small>" in text and ">Cluster 1 <small>" in text


def test_two_runs_are_compared_on_the_images_of_both(
    snscc: Snscc, finished: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "before"))
    table = pq.read_table(other / "assignments.parquet")
    cluster = table["cluster"].to_numpy().copy()
    cluster[cluster == 1] = 0  # what is cluster 1 here was in cluster 0
    table = table.set_column(1, "cluster", pa.array(cluster)).slice(20)
    pq.write_table(table, other / "assignments.parquet")
    done = snscc("report", finished, "--against", other)
    assert done.status == 0, done.err
    told = read(finished / "report.json")["moved"]
    now = pq.read_table(finished / "assignments.parquet").slice(20)["cluster"].to_numpy()
    assert (told["common"], told["only_here"], told["only_there"]) == (180, 20, 0)
    gone = min((now == 0).sum(), (now == 1).sum())
    assert told["stayed"] == 180 - gone and [m["images"] for m in told["moves"]] == [gone]
    assert np.sum(told["counts"]) == 180
    text = (finished / "report.html").read_text()
    assert "What moved since before" in text and "20 are only here" in text


def test_runs_without_a_common_image_are_not_compared(
    snscc: Snscc, finished: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "before"))
    table = pq.read_table(other / "assignments.parquet")
    ids = pa.array([f"other {number}" for number in range(len(table))])
    pq.write_table(table.set_column(0, "id", ids), other / "assignments.parquet")
    refused(snscc("report", finished, "--against", other), "--against", "none of its 200 images")
    (other / "metrics.json").unlink()
    refused(snscc("report", finished, "--against", other), "before", "not finished")
    refused(snscc("report", finished, "--against", tmp_path / "no"), "there is no folder")
    assert not (finished / "report.html").exists()


def test_without_labels_and_without_boost(
    snscc: Snscc,
    photos: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "r"
    (photos / "broken.png").write_bytes(b"no image at all")
    own = sets(*PHOTOS, "data.skip_corrupt=true")
    words = ["run", "images", "--data", photos, *own, "--out", folder]
    assert snscc(*words, "--stages", "pretrain,train").status == 0
    assert snscc("report", folder).status == 0
    data = read(folder / "report.json")
    assert data["summary"]["skipped"][0]["id"] == "broken.png"
    assert data["confusion"] is None and list(data["scatter"]["points"]) == ["pretrain", "train"]
    text = (folder / "report.html").read_text()
    assert "broken.png" in text
    for word in ("oracle", "Against", "ACC", 'value="label"', "undefined"):
        assert word not in re.sub(r"(?s)<style>.*?</style>|<script>.*?</script>", "", text), word
    # The whole run, Boost without an epoch.
    assert snscc("run", *words[1:], "--set", "boost.epochs=0", "--overwrite").status == 0
    assert not (folder / "report.html").exists() and not (folder / "report.json").exists()
    assert snscc("report", folder, "--out", tmp_path / "elsewhere.html").status == 0
    assert list(read(tmp_path / "elsewhere.json")["health"]) == ["pretrain", "train"]
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "metrics.json").unlink(), ["not finished", "--resume"]),
        (lambda run: (run / "clusters.json").write_text("{}"), ["clusters.json", "chosen"]),
        (lambda run: (run / "fit.json").write_text('{"picked": 3}'), ["fit.json", "picked"]),
        (lambda run: (run / "report.html").mkdir(), ["is a folder"]),
        (lambda run: (run / "report.html").write_text("mine"), ["report.html", "not a report"]),
        (lambda run: (run / "report.json").write_text("{}"), ["report.json", "not a report"]),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_refused(
    spoil: Any, says: list[str], snscc: Snscc, finished: Path
) -> None:
    spoil(finished)
    before = {path: path.read_bytes() for path in finished.glob("report.*") if path.is_file()}
    refused(snscc("report", finished), *says)
    after = {path: path.read_bytes() for path in finished.glob("report.*") if path.is_file()}
    assert after == before


def test_a_name_that_is_no_page_is_refused(snscc: Snscc, finished: Path) -> None:
    refused(snscc("report", finished, "--out", finished / "report.json"), ".html")


def test_lines_cut_by_a_kill_are_left_out(finished: Path) -> None:
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "boost", "epoch": 3, "loss/total": NaN}\n{"stage": "boo')
    epochs = facts.read_facts(finished).epochs["boost"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3]
    assert epochs[-1]["loss/total"] is None


def test_clusters_json_must_fit_itself(finished: Path) -> None:
    (finished / "clusters.json").write_text('{"chosen": 3, "tried": [], "criteria": {}}')
    with pytest.raises(UserError, match="tried"):
        facts.read_facts(finished)


@pytest.mark.parametrize("count", [2, 10, 12, 200])
def test_each_cluster_has_its_colour(count: int) -> None:
    assert len(set(page.colors(count))) == count


@pytest.mark.parametrize(
    ("seconds", "words"), [(12.34, "12.3 s"), (600, "10 min"), (7500, "2 h 05 min")]
)
def test_durations_are_said_as_a_person_would(seconds: float, words: str) -> None:
    assert page.duration(seconds) == words


def test_an_encoder_that_came_trained_is_called_that() -> None:
    trained = ["encoder.name=torchvision:resnet18", "encoder.weights=default", "pretrain.epochs=0"]
    said = " ".join(in_words(override(recipes.get("images"), trained), 100))
    assert (
        "torchvision:resnet18, with pretrained weights" in said and "Pretrain was skipped" in said
    )
    assert "trained from scratch" in " ".join(in_words(recipes.get("images"), 100))

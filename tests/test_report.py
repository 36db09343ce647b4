"""A finished run as one page: what it judges, which images it picks, and what it writes."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from snscc_ray.answers.report import charts, embed, facts, page, pick, sprites
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
    digests = [b"a", b"a", b"c", b"d", b"e"]
    assert pick.identical(digests) == [[0, 1]]
    pairs, near = pick.close_pairs(found, digests)
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
    pairs, near = pick.close_pairs(found, [bytes([row]) for row in range(rows)])
    assert (len(pairs), near) == (50, rows)
    assert (pairs[0].a, pairs[0].b) == (0, 1)


# ------------------------------------------------------------------------------ sprites, map


def test_small_sprites_are_the_images_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20_000, 1, 8, 8), generator=generator, dtype=torch.uint8)
    rows = sorted(torch.randperm(20_000, generator=generator)[:17_000].tolist())
    data = ResidentData(images, CPU)
    packed = sprites.pack(rows, sprites.take(data, rows))
    assert len(packed.sheets) == 2 and set(packed.places) == set(rows)
    opened = [np.asarray(Image.open(io.BytesIO(sheet.webp))) for sheet in packed.sheets]
    for row in (rows[0], rows[500], rows[-1]):
        place = packed.places[row]
        x, y = place.column * 8, place.line * 8
        shown = opened[place.sheet][y : y + 8, x : x + 8]
        assert np.array_equal(shown, images[row, 0].numpy()[..., None].repeat(3, 2))
    for sheet, pixels in zip(packed.sheets, opened, strict=True):
        assert pixels.shape == (sheet.lines * 8, sheet.columns * 8, 3)


def test_large_images_become_small_thumbnails() -> None:
    data = ResidentData(torch.full((5, 3, 200, 200), 77, dtype=torch.uint8), CPU)
    taken = sprites.take(data, [1, 4])
    assert taken.shape == (2, 3, 96, 96) and set(taken.unique().tolist()) == {77}
    assert sprites.pack([1, 4], taken).size == 96
    assert len(set(sprites.row_digests(data))) == 1


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
    for heading in ("Can I trust this?", "How many clusters?", "Against the labels", "Outliers"):
        assert f">{heading}</h2>" in text


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
    before = (finished / "report.html").read_bytes()
    assert snscc("report", finished).status == 0
    assert (finished / "report.html").read_bytes() == before, "the same run, the same page"


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

"""The main job as a person runs it, with the figures it has to reach."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import shards


def run(*arguments: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "snscc_ray", "run", *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((out / "metrics.json").read_text()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_digits_over_three_seeds(tmp_path: Path) -> None:
    runs = [
        run("digits", "--seed", str(seed), out=tmp_path / str(seed))["stages"] for seed in range(3)
    ]
    final = [stages["boost"] for stages in runs]
    assert statistics.median(f["oracle/acc"] for f in final) >= 0.96
    assert min(f["oracle/acc"] for f in final) >= 0.90
    assert statistics.median(f["oracle/nmi"] for f in final) >= 0.92
    for stages in runs:
        assert stages["boost"]["oracle/acc"] > stages["pretrain"]["oracle/acc"]
        assert stages["boost"]["oracle/acc"] >= stages["train"]["oracle/acc"] - 0.005
        assert stages["boost"]["health/clusters_in_use"] == 10


@pytest.mark.parametrize("name", ["cifar10", "cifar20"])
def test_real_shards_through_all_stages(name: str, tmp_path: Path) -> None:
    folder = shards({"cifar10": "cifar10-jpeg", "cifar20": "cifar100-jpeg"}[name])
    settings = [
        "encoder.name=convnet", "encoder.width=8", "data.limit=1000",
        "pretrain.epochs=1", "pretrain.batch_size=250", "pretrain.learning_rate=0.05",
        "train.epochs=1", "train.batch_size=250", "boost.epochs=1", "boost.batch_size=250",
        "boost.confidence_threshold=0.1",
    ]  # fmt: skip
    overrides = [word for field in settings for word in ("--set", field)]
    figures = run(name, "--data", str(folder), *overrides, out=tmp_path / "run")
    assert list(figures["stages"]) == ["pretrain", "train", "boost"]
    assert figures["rows"] == 1000
    assert all(0 < s["oracle/acc"] < 1 for s in figures["stages"].values())
    table = pq.read_table(tmp_path / "run" / "assignments.parquet")
    assert table.num_rows == len(set(table["id"].to_pylist())) == 1000

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from snscc_ray.config.errors import UserError
from snscc_ray.core import checkpoints


def test_round_trip(tmp_path: Path) -> None:
    payload = {"network": {"w": torch.randn(3, 2)}, "epoch": 4, "none": None, "name": "x"}
    checkpoints.save(tmp_path / "a" / "c.pt", payload)
    loaded = checkpoints.load(tmp_path / "a" / "c.pt")
    assert torch.equal(loaded["network"]["w"], payload["network"]["w"])
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "a" / "c.pt").stat().st_mode == plain.stat().st_mode
    assert (loaded["epoch"], loaded["none"], loaded["name"]) == (4, None, "x")


def test_a_truncated_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoints.save(path, {"w": torch.randn(1000)})
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"c\.pt is damaged or not a checkpoint"):
            checkpoints.load(path)


def test_a_checkpoint_with_another_byte_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoints.save(path, {"w": torch.randn(1000)})
    altered = bytearray(path.read_bytes())
    altered[len(altered) // 2] ^= 1
    path.write_bytes(altered)
    with pytest.raises(UserError, match=r"c\.pt is damaged"):
        checkpoints.load(path)


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


def test_pickled_code_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoints.FORMAT, "x": _Attack()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(_Attack()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="not a checkpoint"):
            checkpoints.load(Path(name))
    assert not Path("executed").exists()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="not written by this version"):
        checkpoints.load(tmp_path / "c.pt")
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoints.load(tmp_path / "absent.pt")


def test_another_architecture_is_named() -> None:
    with pytest.raises(UserError, match=r"bias is \(3,\) there and \(4,\) in this recipe"):
        checkpoints.load_weights(nn.Linear(2, 4), nn.Linear(2, 3).state_dict(), "it")
    with pytest.raises(UserError, match="bias is absent there"):
        checkpoints.load_weights(nn.Linear(2, 3), nn.Linear(2, 3, bias=False).state_dict(), "it")


def _in_child(code: str, *arguments: str, limit: int | None = None) -> int:
    """Run code in a process of its own, able to write files of at most `limit` bytes."""

    def shrink() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        preexec_fn=shrink if limit else None,
        capture_output=True,
        text=True,
    )
    sys.stderr.write(run.stderr)
    return run.returncode


def test_a_kill_in_mid_write_leaves_the_last_good_one(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoints.save(path, {"epoch": 1})
    code = """
import os, signal, sys
from pathlib import Path
from snscc_ray.core import storage
def write(file):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
storage.write_whole(Path(sys.argv[1]), write)
"""
    assert _in_child(code, str(path)) == -signal.SIGKILL
    assert checkpoints.load(path)["epoch"] == 1


def test_no_space_leaves_the_last_good_one(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoints.save(path, {"epoch": 1})
    code = """
import sys, torch
from pathlib import Path
from snscc_ray.core import checkpoints
from snscc_ray.config.errors import UserError
try:
    checkpoints.save(Path(sys.argv[1]), {"w": torch.zeros(2_000_000)})
except UserError as error:
    assert "no space left while writing" in str(error), error
    sys.exit(7)
"""
    assert _in_child(code, str(path), limit=1_000_000) == 7
    assert checkpoints.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snscc_ray import checkpoints
from snscc_ray.errors import UserError
from snscc_ray.pieces import join_missing, split_large


def write(path: Path, content: bytes) -> Path:
    checkpoints.write_whole(path, lambda file: file.write(content))
    return path


def pieces(path: Path) -> list[Path]:
    folder = path.with_name(path.name + ".pieces")
    return sorted(p for p in folder.iterdir() if p.name != "index.json") if folder.exists() else []


@pytest.mark.parametrize("size", [101, 200, 250, 1000])
def test_a_file_is_put_together_from_its_pieces_alone(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    path = write(tmp_path / "train" / "latest.pt", content)
    split_large(tmp_path, 100)
    assert len(pieces(path)) == -(-size // 100)
    assert max(piece.stat().st_size for piece in pieces(path)) <= 100
    path.unlink()
    join_missing(tmp_path)
    assert path.read_bytes() == content


def test_a_file_that_is_there_wins_over_its_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "train" / "latest.pt", os.urandom(300))
    split_large(tmp_path, 100)
    write(path, b"newer")
    join_missing(tmp_path)
    assert path.read_bytes() == b"newer"


def test_equal_pieces_are_kept_once_and_in_their_places(tmp_path: Path) -> None:
    content = b"a" * 100 + b"b" * 100 + b"a" * 100
    path = write(tmp_path / "boost" / "final.pt", content)
    split_large(tmp_path, 100)
    assert len(pieces(path)) == 2
    path.unlink()
    join_missing(tmp_path)
    assert path.read_bytes() == content


def test_pieces_follow_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train" / "latest.pt", b"x" * 250)
    split_large(tmp_path, 100)
    before = {piece: piece.stat().st_mtime_ns for piece in pieces(path)}
    split_large(tmp_path, 100)
    assert {piece: piece.stat().st_mtime_ns for piece in pieces(path)} == before
    write(path, os.urandom(250))
    split_large(tmp_path, 100)
    assert not before.keys() & set(pieces(path)) and len(pieces(path)) == 3
    path.unlink()  # as at the end of a stage
    split_large(tmp_path, 100)
    assert list((tmp_path / "train").iterdir()) == []


def test_a_small_file_has_no_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "train" / "latest.pt", b"x" * 100)
    split_large(tmp_path, 100)
    assert pieces(path) == []


@pytest.mark.parametrize("harm", ["missing", "cut", "altered"])
def test_a_piece_that_is_not_what_it_was_is_refused(harm: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train" / "latest.pt", os.urandom(250))
    split_large(tmp_path, 100)
    path.unlink()
    piece = pieces(path)[0]
    held = piece.read_bytes()
    if harm == "missing":
        piece.unlink()
    else:
        piece.write_bytes(held[:-1] if harm == "cut" else bytes([held[0] ^ 1]) + held[1:])
    with pytest.raises(UserError, match="is missing or damaged"):
        join_missing(tmp_path)
    assert not path.exists()


def test_a_kill_between_pieces_and_index_leaves_the_former_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = os.urandom(250)
    path = write(tmp_path / "train" / "latest.pt", former)
    split_large(tmp_path, 100)
    write(path, os.urandom(250))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        split_large(tmp_path, 100)
    monkeypatch.undo()
    path.unlink()
    join_missing(tmp_path)
    assert path.read_bytes() == former

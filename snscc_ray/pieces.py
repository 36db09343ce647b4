"""Large files of a run also in pieces, for moving a run where no file may be large.

Beside `latest.pt` lies the folder `latest.pt.pieces`: its pieces, and `index.json`, which names
them in order. A piece is named by what it holds and the index is written last, so that a kill
leaves the former pieces whole.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import IO

from snscc_ray import checkpoints
from snscc_ray.errors import UserError

MIB = 2**20
_SUFFIX, _INDEX = ".pieces", "index.json"


def split_large(folder: Path, limit: int) -> None:
    """Put every file of a stage of more than `limit` bytes into pieces as well.

    Pieces whose file is gone are removed. What did not change since is not written again.
    """
    for path in sorted(folder.glob("*/[!.]*")):
        if path.is_file() and path.stat().st_size > limit:
            _split(path, limit)
    for pieces in folder.glob(f"*/*{_SUFFIX}"):
        whole = pieces.with_suffix("")
        if not whole.exists() or whole.stat().st_size <= limit:
            for file in (pieces / _INDEX, *pieces.iterdir()):
                file.unlink(missing_ok=True)
            pieces.rmdir()


def join_missing(folder: Path) -> None:
    """Put together every file below `folder` of which only the pieces are there.

    Raises UserError where a piece is missing or damaged.
    """
    for index in sorted(folder.glob(f"*/*{_SUFFIX}/{_INDEX}")):
        whole = index.parent.with_suffix("")
        if not whole.exists():
            parts = [_checked(index.parent / name) for name in checkpoints.read_json(index)]
            checkpoints.write_whole(whole, partial(_write, b"".join(parts)))


def _split(path: Path, limit: int) -> None:
    pieces = path.with_name(path.name + _SUFFIX)
    names = []
    with path.open("rb") as file:
        while part := file.read(limit):
            names.append(_digest(part))
            if not (pieces / names[-1]).exists():
                checkpoints.write_whole(pieces / names[-1], partial(_write, part))
    checkpoints.write_json(pieces / _INDEX, names)
    for stale in {file.name for file in pieces.iterdir()} - {*names, _INDEX}:
        (pieces / stale).unlink()


def _checked(piece: Path) -> bytes:
    held = piece.read_bytes() if piece.exists() else b""
    if _digest(held) != piece.name:
        raise UserError(f"{piece} is missing or damaged: copy {piece.parent} again")
    return held


def _digest(part: bytes) -> str:
    return hashlib.blake2b(part, digest_size=16).hexdigest()


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)

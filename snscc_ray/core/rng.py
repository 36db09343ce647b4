"""Stateless random numbers: a number depends on its key and row only.

A row's views are therefore the same in any batch, worker or order, and a resumed run needs no
generator state: the key is folded from (seed, stage, epoch, view).
The mixing function is splitmix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def fold(*parts: int | str) -> int:
    """Fold integers and names into one 63-bit key; equal parts in equal order give equal keys."""
    key = 0
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = _mix((key ^ (number & _MASK)) + _GOLDEN)
    return key >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `fold(*parts)`."""
    return torch.Generator().manual_seed(fold(*parts))


def uniform(rows_B: Tensor, key: int, count: int) -> Tensor:
    """Return uniform float32 numbers in [0, 1), shape (B, count), on the device of `rows_B`.

    rows_B: int64 row numbers; a row gets the same `count` numbers in any batch.
    """
    columns = torch.arange(1, count + 1, device=rows_B.device) * _signed(_GOLDEN)
    state = _mix_tensor(rows_B[:, None] + _signed(key * _GOLDEN & _MASK))
    bits = _mix_tensor(state + columns)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift (torch's own repeats the sign bit)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(_MULTIPLY_1)
    value = (value ^ _shift_right(value, 27)) * _signed(_MULTIPLY_2)
    return value ^ _shift_right(value, 31)

"""Stateless randomness: every draw is a hash of (key, counters), never the state of a generator.

The same image therefore gets the same mask, stochastic depth, crop and caption on every rank, in every pass and under
every layout. The mixer is the finalizer of splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number
generators").
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(key: Tensor, *counters: int | Tensor) -> Tensor:
    """Hash int64 keys with counters; returns int64 of the broadcast shape."""
    x = key
    for counter in counters:
        x = x * 31 + counter + _GOLDEN
        x = (x ^ _shift_right(x, 30)) * _MIX_1
        x = (x ^ _shift_right(x, 27)) * _MIX_2
        x = x ^ _shift_right(x, 31)
    return x


def uniform(key: Tensor, *counters: int | Tensor) -> Tensor:
    """Draw float32 in [0, 1), 24 bits each, one per element of the broadcast shape."""
    return _shift_right(mix(key, *counters), 40).to(torch.float32) * 2.0**-24


def name_to_int64(name: str) -> int:
    """Return a stable signed 64-bit hash of a name (BLAKE2b), used for sample ids and caption ids."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)

"""Random permutations without a table: any position of any of them, at once."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplying by it spreads every bit upward


def permute(position: Ints, size: int, *names: int | str) -> Ints:
    """Return where a random permutation of range(size), which names select, sends some positions.

    A Feistel network over the next power of four, walked until it is back in range: no table, any size.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    salts = _salts(*names)
    moved = _feistel(position.astype(np.uint64), half_bits, salts)
    while (outside := moved >= size).any():
        moved[outside] = _feistel(moved[outside], half_bits, salts)
    return moved.astype(np.int64)


def _feistel(position: Words, half_bits: int, salts: Words) -> Words:
    half, rest, middle = np.uint64(half_bits), np.uint64(64 - half_bits), np.uint64(32)
    left, right = position >> half, position & np.uint64((1 << half_bits) - 1)
    for salt in salts[:_ROUNDS]:
        word = (right ^ salt) * _ODD
        left, right = right, left ^ (((word ^ (word >> middle)) * _ODD) >> rest)
    return (left << half) | right


def _salts(*names: int | str) -> Words:
    """Return eight random words for a purpose."""
    return np.frombuffer(hashlib.blake2b(repr(names).encode()).digest(), "<u8").astype(np.uint64)

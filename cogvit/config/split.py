"""Training and held-out samples of one set of shards: a sample's part is a hash of its image, the same in every run."""

from __future__ import annotations

from dataclasses import replace

from cogvit.config.fields import DataConfig

DRAW = "draw"  # column of rules: a number in [0, 1), a hash of the image's bytes


def is_split(data: DataConfig) -> bool:
    """Whether a part of the training shards is held out."""
    return data.held_out > 0.0 and not data.eval_shards


def train_part(data: DataConfig) -> DataConfig:
    """Return what training reads: the shards without what is held out."""
    return replace(data, where=_joined(data.where, f"{DRAW} >= {data.held_out!r}")) if is_split(data) else data


def held_out_part(data: DataConfig) -> DataConfig | None:
    """Return what evaluation reads, as shards of its own; None where nothing is held out."""
    if is_split(data):
        return replace(data, where=_joined(data.where, f"{DRAW} < {data.held_out!r}"), held_out=0.0)
    return replace(data, shards=data.eval_shards, held_out=0.0) if data.eval_shards else None


def _joined(one: str, other: str) -> str:
    return f"({one}) and {other}" if one else other

"""What makes a run the same run when it is started again: everything but how it is executed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogvit.config.fields import RunConfig
from cogvit.config.tree import to_json

# What may differ between a run and its resumption: how it is executed, never what it computes. Stages have more.
EXECUTION = (
    "parallel.", "memory.", "fusion", "zero.", "guard.", "eval.", "log.", "out", "optim.muon_tp",
    "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_every_steps",
    "data.index_dir", "data.eval_shards", "data.topology", "data.cache_dir", "data.cache_bytes",
    "data.tokens_per_pack", "data.images_per_pack", "data.text_tokens_per_pack",
    "data.prefetch_steps", "data.decode_threads", "data.loading", "data.max_wait_s", "data.max_bad_fraction",
    "teachers.ray_address",
)  # fmt: skip


def differences(old: RunConfig, new: RunConfig, *, ignored: Sequence[str]) -> list[str]:
    """Return "field: old -> new" for each difference but those of the ignored fields and parts."""
    before, after = _flatten(to_json(old)), _flatten(to_json(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(tuple(ignored))
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

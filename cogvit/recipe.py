"""What makes a run the same run when it is started again: everything but how it is executed."""

from __future__ import annotations

from typing import Any

from cogvit.config import RunConfig, to_json

# What may differ between a run and its resumption: how it is executed, never what it computes.
_EXECUTION = (
    "parallel.", "memory.", "zero.", "guard.", "eval.", "log.", "out", "optim.muon_tp",
    "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_every_steps",
    "data.index_dir", "data.eval_shards", "data.topology", "data.cache_dir", "data.cache_bytes",
    "data.tokens_per_pack", "data.images_per_pack", "data.text_tokens_per_pack",
    "data.prefetch_steps", "data.decode_threads", "data.loading", "data.max_wait_s", "data.max_bad_fraction",
    "teachers.actors_per_teacher", "teachers.actor_cpus", "teachers.actor_gpus",
    "teachers.in_flight_steps", "teachers.max_in_flight_bytes", "teachers.max_wait_s",
    "teachers.ray_address", "teachers.source", "teachers.store", "contrast.loss", "contrast.chunk_pairs",
)  # fmt: skip


def recipe_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return "field: old -> new" for each difference that makes `new` another run than `old`."""
    before, after = _flatten(to_json(old)), _flatten(to_json(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(_EXECUTION)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

"""What a corpus of N samples on R ranks costs to open, plan, save and resume, by the laws that were measured.

Opening and planning are laws measured on a CPU (tools/bench/records); saving and resuming are counted in bytes, files
and messages, and their seconds assume what a node writes to and reads from its file system.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cogvit.config import ParallelConfig
from cogvit.errors import ConfigError
from cogvit.parallel.descriptors import descriptors

IMAGES_A_SHARD = 10_000
_ROW_BYTES, _FOOTER_BYTES = 40, 100  # of the corpus file, a sample and a shard
_OPEN_MS, _OPEN_MS_A_SHARD = 13.0, 6.8e-5
_BATCH_S = 0.25  # of CPU: the first window of a share, whatever the corpus holds
_PRIVATE_MB, _PRIVATE_MB_A_SHARD = 32.0, 4.8e-5
_WRITERS = 64
_MEETINGS_A_SAVE = 3  # each a word of every rank and one answer
_DISK_BYTES_PER_S = 1e9  # of a node, assumed


@dataclass(frozen=True)
class Cost:
    """Of one rank where nothing else is said."""

    open_ms: float  # CPU
    first_batch_s: float  # CPU
    private_mb: float
    corpus_bytes: float  # on disk, mapped by a node's ranks together
    open_files: int
    open_files_of_store: int  # of the process that keeps it
    save_bytes: float  # of all ranks
    save_files: int
    save_s: float  # until it is on disk, beside training
    store_words: int  # that the ranks' store takes and gives for a save
    resume_bytes: float  # read, of all ranks
    resume_s: float  # to read them


def read_samples(text: str) -> float:
    """Return a number of samples. Errors: ConfigError for what is none."""
    try:
        samples = float(text)
    except ValueError:
        samples = -1.0
    if not 0 <= samples < 1e15:
        raise ConfigError(f"--samples {text} is no number of samples, like 8e9")
    return samples


def cost_of(samples: float, layout: ParallelConfig, ranks: int, per_node: int, state_bytes: float) -> Cost:
    """Return the costs. samples: 0 where the corpus is not known; state_bytes: of a checkpoint; GPUs are assumed."""
    shards, nodes = samples / IMAGES_A_SHARD, max(1, ranks // per_node)
    need = descriptors(layout, ranks, gloo=False)
    at_a_time = min(nodes, _WRITERS)
    return Cost(
        open_ms=_OPEN_MS + _OPEN_MS_A_SHARD * shards,
        first_batch_s=_BATCH_S,
        private_mb=_PRIVATE_MB + _PRIVATE_MB_A_SHARD * shards,
        corpus_bytes=_ROW_BYTES * samples + _FOOTER_BYTES * shards,
        open_files=need.rank,
        open_files_of_store=need.keeper,
        save_bytes=state_bytes,
        save_files=nodes,
        save_s=state_bytes / (at_a_time * _DISK_BYTES_PER_S),
        store_words=2 * _MEETINGS_A_SAVE * ranks,
        resume_bytes=state_bytes,
        resume_s=state_bytes / (nodes * _DISK_BYTES_PER_S),
    )


def cost_lines(samples: float, layout: ParallelConfig, ranks: int, per_node: int, state_bytes: float) -> Iterator[str]:
    """Yield the costs in words."""
    one = cost_of(samples, layout, ranks, per_node, state_bytes)
    if samples:
        yield (
            f"corpus of {samples:,.0f} samples: open {one.open_ms:,.0f} ms, first batch {one.first_batch_s:.2f} s of"
            f" CPU, {one.private_mb:,.0f} MB private a rank, {one.corpus_bytes / 1e9:,.1f} GB mapped a node"
        )
    yield (
        f"save: {one.save_bytes / 1e9:,.2f} GB in {one.save_files:,} files, no byte between ranks, {one.store_words:,}"
        f" words through the store, {one.save_s:,.1f} s beside training at 1 GB/s a node (assumed)"
    )
    yield (
        f"resume: {one.resume_bytes / 1e9:,.2f} GB read once by all ranks together, {one.resume_s:,.1f} s at 1 GB/s"
        f" a node (assumed); open files: {one.open_files} a rank, {one.open_files_of_store:,} the store"
    )

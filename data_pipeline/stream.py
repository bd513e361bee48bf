"""Sequential order: shards without an index, read from start to end through webdataset.

What holds here: from one seed, layout and first step come the same batches; every rank gets batches without end, so all
make the same number of steps; a pass over all shards has every sample once; the steps of a buffer of
data.lookahead_steps cost about the same on a rank. What the planned order has beyond that does not hold: the global
batch depends on the number of ranks, loads differ between them, passes end at different steps on different ranks, equal
images count as often as they are there, links in a tar are passed over without a word, and whoever resumes begins the
shards anew, in another order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from cogvit.batch import Batch, DataPosition, Reads, StepBatch, StreamedSample
from cogvit.config import DataConfig, RunConfig
from cogvit.draws import mix, name_to_int64
from cogvit.errors import DataError
from cogvit.model.tokenizer import load_tokenizer
from data_pipeline.assembly import Spoken, assemble_text
from data_pipeline.balance import attention_cost, place, spread
from data_pipeline.caption import (
    LANGUAGES,
    Captions,
    captions_of,
    choose_captions,
    parse_metadata,
    source_of,
    token_bound,
)
from data_pipeline.decode import read_header
from data_pipeline.index import DEFAULT_SOURCE
from data_pipeline.loader import caption_cost, in_order
from data_pipeline.pack import Decoded, decode_pack, pack_limits
from data_pipeline.permutation import permute
from data_pipeline.rules import Rules
from data_pipeline.scan import IMAGE_EXTENSIONS
from data_pipeline.shards import expand_shards, open_stream, shard_name
from data_pipeline.sizing import sizing_of
from data_pipeline.spec import attention_tokens
from data_pipeline.table import CAPTION_EXTENSIONS
from data_pipeline.topology import Seat

Ints = NDArray[np.int64]

VERSION = 1  # of the sequence
_STEP_SALT = 0x73746570  # "step"
_READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


def stream_position(config: RunConfig) -> DataPosition:
    """Return where a new run begins. Errors: DataError when its pattern names no shards."""
    names = [shard_name(shard) for shard in expand_shards(config.data.shards)]
    images = config.data.global_batch_images
    text = json.dumps([VERSION, names, images, config.data.lookahead_steps, asdict(sizing_of(config)), config.seed])
    return DataPosition(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 0)


def stream_batches(
    config: RunConfig, seat: Seat, position: DataPosition | None, *, reads: Reads
) -> Generator[StepBatch]:
    """Yield what a data-parallel rank trains on, step by step without end; seat is among all ranks.

    A position says which step comes next, and that the shards begin anew. Close the iterator to stop its threads.
    Errors: DataError when the position is of other data or there are fewer shards than ranks; while iterating, when a
    shard cannot be read or is damaged, a pass has no usable sample, or as `in_order`.
    """
    start = stream_position(config)
    if position is not None and position.plan_hash != start.plan_hash:
        raise DataError(
            f"the checkpoint's stream {position.plan_hash} is not this run's {start.plan_hash}: shards, batch size,"
            " sizing or seed changed; restore them or start a new run in another --out"
        )
    start, shards = position or start, expand_shards(config.data.shards)
    if len(shards) < seat.num_ranks:
        raise DataError(
            f"--data.order sequential gives each of {seat.num_ranks} ranks shards of its own, and"
            f" {config.data.shards!r} has {len(shards)}; split them or start fewer ranks"
        )
    return in_order(_Maker(_Stream(config, shards, seat, start, reads)), config.data, start.step)


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A sample that came out of the stream and is fit to be trained on."""

    sample: StreamedSample
    name: str  # shard and key, for messages
    height_px: int  # upright
    width_px: int
    captions: Captions
    round: int  # pass over the shards


@dataclass(frozen=True, slots=True)
class _Planned:
    """The images of a step on a rank, with what the rank could not use on the way to them."""

    arrived: list[_Arrived]
    key: Ints  # [B]
    grid_hw: Ints  # [B, 2]
    downsized: int
    unreadable: tuple[str, ...]


class _Stream:
    """The samples of a rank, in the order in which they arrive and grouped into steps."""

    def __init__(
        self, config: RunConfig, shards: tuple[str, ...], seat: Seat, start: DataPosition, reads: Reads
    ) -> None:
        self.config, self.start, self.reads = config, start, reads
        self._shards, self.seat = shards, seat
        self._left_out: Counter[str] = Counter()
        self._unreadable: list[str] = []

    def steps(self) -> Generator[_Planned]:
        """Yield steps without end: those of a buffer cost about the same."""
        data, seat, sizing = self.config.data, self.seat, sizing_of(self.config)
        first, last = (data.global_batch_images * rank // seat.num_ranks for rank in (seat.rank, seat.rank + 1))
        sizes = np.full(data.lookahead_steps, last - first)
        samples = self._samples()
        while True:
            arrived = [next(samples) for _ in range(int(sizes.sum()))]
            key = _keys(arrived, self.config.seed, self.start.step)
            height_px, width_px = np.array([(one.height_px, one.width_px) for one in arrived], np.int64).T
            grid_hw, downsized = sizing.grids(height_px, width_px, key), sizing.exceeds(height_px, width_px, key)
            cost = attention_cost(grid_hw.prod(axis=1), attention_tokens(self.config.vision))
            step_of = spread(cost, sizes, mix(torch.from_numpy(key), _STEP_SALT).numpy())
            for step in range(data.lookahead_steps):
                mine = np.flatnonzero(step_of == step)
                unreadable, self._unreadable = tuple(self._unreadable), []
                chosen = [arrived[number] for number in mine]
                yield _Planned(chosen, key[mine], grid_hw[mine], int(downsized[mine].sum()), unreadable)

    def _samples(self) -> Iterator[_Arrived]:
        """Yield usable samples, pass after pass over all shards, of which each rank reads its part of each."""
        for round_ in count():
            order = permute(np.arange(len(self._shards)), len(self._shards), self.config.seed, self.start.step, round_)
            mine = [self._shards[number] for number in order[self.seat.rank :: self.seat.num_ranks]]
            num_usable = 0
            for entries in self._entries(mine):
                if (arrived := self._take(entries, round_)) is not None:
                    num_usable += 1
                    yield arrived
            if self._left_out:
                told = ", ".join(f"{number:,} x {reason}" for reason, number in self._left_out.most_common())
                log.warning("pass %d over %d shards left out: %s", round_ + 1, len(mine), told)
            if not num_usable:
                raise DataError(f"the {len(mine)} shards of a rank, {mine[0]} among them, hold no usable sample")
            self._left_out.clear()

    def _entries(self, shards: list[str]) -> Iterator[dict[str, Any]]:
        """Yield what webdataset makes of shards. Errors: DataError for one that cannot be read to its end."""
        try:
            yield from group_by_keys(tar_file_expander(_opened(shards)), handler=self._count_repeated)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            message, *_, shard = error.args  # webdataset adds where it was
            reason = str(message).partition(" @ ")[0]
            raise DataError(f"{shard} cannot be read as a tar: {reason}; re-create it") from error

    def _count_repeated(self, error: Exception) -> bool:
        """Of two members of one name the first counts; webdataset tells the others by a ValueError."""
        if not isinstance(error, ValueError):
            raise error
        self._left_out["a second member of the same name"] += 1
        return True

    def _take(self, entries: dict[str, Any], round_: int) -> _Arrived | None:
        """Return a sample of webdataset's, or None and count why not."""
        name, shard = entries["__key__"], entries["__url__"]
        images = [extension for extension in entries if extension in IMAGE_EXTENSIONS]
        if not images or not name.isprintable():
            self._left_out["no image" if name.isprintable() else "a name is not printable UTF-8"] += 1
            return None
        if len(images) > 1:
            self._left_out["a second image of the same key"] += len(images) - 1
        data = entries[images[0]]
        try:
            header = read_header(data)
        except DataError as error:
            self._unreadable.append(f"{shard}:{name} is left out: {error}")
            return None
        try:
            Rules().check_size(header.height_px, header.width_px)
        except DataError as error:
            self._left_out[str(error)] += 1
            return None
        source, captions = _texts(entries, self.config.data)
        if self.reads == "captions" and not any(captions.values()):
            self._left_out["no caption"] += 1
            return None
        sample_id = name_to_int64(f"{source or DEFAULT_SOURCE}/{shard_name(shard)}/{name}")
        sample = StreamedSample(sample_id, shard, 0, len(data), data=data)
        return _Arrived(sample, f"{shard}:{name}", header.height_px, header.width_px, captions, round_)


class _Maker:
    """Makes the steps of a stream: one thread reads ahead of those that decode."""

    def __init__(self, stream: _Stream) -> None:
        config = stream.config
        self._stream, self._steps = stream, stream.steps()
        reads_text = stream.reads == "captions"
        self._tokenizer = load_tokenizer(config.data.tokenizer, config.text.vocab_size) if reads_text else None
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._decoding = ThreadPoolExecutor(config.data.decode_threads, thread_name_prefix="decode")

    def submit(self, step: int) -> Future[StepBatch]:
        """Queue a step; they come in order."""
        planned = self._reading.submit(next, self._steps)
        return self._decoding.submit(lambda: self._make(step, planned.result()))

    def result(self, handle: Future[StepBatch]) -> StepBatch:
        """Wait for a step."""
        return handle.result()

    def close(self) -> None:
        """Stop the threads after what is under way, and close the shard that is being read."""
        for pool in (self._reading, self._decoding):
            pool.shutdown(wait=True, cancel_futures=True)
        self._steps.close()

    def _make(self, step: int, planned: _Planned) -> StepBatch:
        config, limits = self._stream.config, pack_limits(self._stream.config)
        num_tokens, spoken = planned.grid_hw.prod(axis=1), list[Spoken]()
        text_tokens = np.zeros_like(num_tokens)
        cost = attention_cost(num_tokens, attention_tokens(config.vision))
        if self._tokenizer is not None:
            spoken = _speak(planned, config.data.zh_fraction)
            size_bytes = np.array([len(one.text.encode()) for one in spoken], np.int64)
            text_tokens = token_bound(size_bytes, config.text.max_tokens, config.data.tokenizer)
            cost = cost + caption_cost(text_tokens, config)
        placement = place(cost, num_tokens, text_tokens, num_ranks=1, limits=limits)
        micro, failures = [], list(planned.unreadable)
        decoded, cut_captions = len(failures), 0
        for members in placement.packs_of(0):
            order = members[np.lexsort((*planned.grid_hw[members].T, -num_tokens[members]))]
            pack = self._decode(planned, order)
            decoded += pack.decoded
            failures += pack.failures
            text = None
            if self._tokenizer is not None:
                said = [spoken[number] for number in order]
                bounds = text_tokens[order].tolist()
                tokens = [self._tokenizer.encode(one.text, bound) for one, bound in zip(said, bounds, strict=True)]
                text = assemble_text(said, tokens, pack.images.weight, limits)
                cut_captions += sum(one.cut for one in tokens)
            samples = [planned.arrived[number].sample for number in order]
            absent = (None,) * (limits.images - len(samples))
            micro.append(Batch(images=pack.images, text=text, targets=None, samples=(*samples, *absent)))
        position = DataPosition(self._stream.start.plan_hash, step + 1)
        return StepBatch(tuple(micro), position, cut_captions, planned.downsized, decoded, tuple(failures))

    def _decode(self, planned: _Planned, order: Ints) -> Decoded:
        arrived = [planned.arrived[number] for number in order]
        return decode_pack(
            self._stream.config,
            planned.grid_hw[order],
            planned.key[order],
            self._stream.seat.decodes,
            lambda number: arrived[number].sample.data,
            lambda number: arrived[number].name,
        )


def _keys(arrived: list[_Arrived], seed: int, start: int) -> Ints:
    """Return the seeds of the samples' draws, other ones in each pass."""
    sample_id = torch.tensor([one.sample.sample_id for one in arrived])
    return mix(sample_id, seed, start, torch.tensor([one.round for one in arrived])).numpy()


def _texts(entries: dict[str, Any], data: DataConfig) -> tuple[str, Captions]:
    """Return a sample's source, if its json names one, and its captions: those of its json, or else of its txt."""
    source, captions = "", captions_of({})
    for extension in CAPTION_EXTENSIONS:
        try:
            metadata = parse_metadata(entries[extension], extension) if extension in entries else {}
        except DataError:
            continue
        source = source or source_of(metadata, data.source_field) or ""
        field = data.caption_field if extension == "json" else ""
        captions = captions if any(captions.values()) else captions_of(metadata, field)
    return source, captions


def _speak(planned: _Planned, zh_fraction: float) -> list[Spoken]:
    """Choose a caption for each image."""
    found = [one.captions for one in planned.arrived]
    counts = np.array([[len(captions[language]) for language in LANGUAGES] for captions in found], np.int64)
    choice = choose_captions(counts, planned.key, zh_fraction)
    return [
        Spoken(captions[LANGUAGES[language]][number], name_to_int64(repr(sorted(captions.items()))))
        for captions, language, number in zip(found, choice.language, choice.number, strict=True)
    ]


@dataclass(slots=True)
class _Ends:
    """A stream of which one has seen the start, and that remembers how it ended: a tar may be cut between members."""

    stream: IO[bytes]
    first: bytes
    last: bytes = b""

    def read(self, size_bytes: int = _READ_BYTES) -> bytes:
        """Return the next bytes."""
        data = self.first + self.stream.read(max(0, size_bytes - len(self.first)))
        self.first = b""
        self.last = (self.last + data)[-tarfile.BLOCKSIZE :]
        return data


def _opened(shards: list[str]) -> Iterator[dict[str, Any]]:
    """Yield shards one after the other, open, as webdataset takes them. Errors: DataError for one that is cut short."""
    for shard in shards:
        try:
            with open_stream(shard) as stream:
                ends = _Ends(stream, stream.read(tarfile.BLOCKSIZE))
                if ends.first:
                    yield {"url": shard, "stream": ends}
                while ends.read():
                    continue
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read {shard}: {error}") from error
        if not ends.last:
            raise DataError(f"{shard} is empty; re-create it")
        if shard_name(shard).endswith(".tar") and any(ends.last):
            raise DataError(f"{shard} has no end marker: it is damaged or cut short; re-create it")

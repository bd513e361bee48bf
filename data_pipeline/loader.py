"""Loading: the packs of one rank, step by step, decoded ahead of their use.

A step is a pure function of its number, so threads load several at once and deliver them in order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cogvit.batch import Batch, DataPosition, Reads, SampleRef, StepBatch, StreamedSample
from cogvit.config import DataConfig, RunConfig
from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from cogvit.model.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.assembly import Spoken, assemble_text
from data_pipeline.augment import AS_IT_IS, PLAIN, Augmentation, views_of
from data_pipeline.balance import Placement, attention_cost, place
from data_pipeline.cache import ShardCache, cache_of
from data_pipeline.caption import (
    LANGUAGES,
    CaptionChoice,
    choose_captions,
    token_bound,
)
from data_pipeline.decode import Pixels, read_image_at
from data_pipeline.index import Index
from data_pipeline.pack import Decoded, Made, decode_pack, pack_limits
from data_pipeline.phases import place_phases
from data_pipeline.plan import GlobalBatch, Planner, check_plan, plan_hash
from data_pipeline.select import Needs
from data_pipeline.shards import ShardReader
from data_pipeline.spec import attention_tokens, plan_spec
from data_pipeline.talks import Talks, open_talks
from data_pipeline.topology import Seat, Slice

Ints = NDArray[np.int64]

log = logging.getLogger(__name__)

# data.max_bad_fraction is a share of at least so many images: one bad image at the start of a run is no trend.
FEWEST_IMAGES_TO_JUDGE = 1000

_LACKING: dict[Reads, str] = {
    "images": "an image",
    "captions": "a caption; stage 2 needs .txt or .json captions",
    "conversations": "a caption or a conversation; stage 3 needs them in a .json",
}


def step_batches(
    index: Index, config: RunConfig, seat: Seat, position: DataPosition | None, *, reads: Reads
) -> Generator[StepBatch]:
    """Yield what a data-parallel rank trains on, step by step without end, from a position or the start.

    The ranks of a seat's group get the same number of packs in a step, at least one for each pipeline stage; groups
    agree on theirs by `cogvit.batch.pad_step`. An image that does not decode keeps its slot with weight 0; one that
    another rank of the replica decodes has weight 1 and zeros as patches, until the ranks put theirs together. Close
    the iterator to stop the threads that load ahead.
    Errors: as `first_position`, and while iterating as `in_order`.
    """
    first = first_position(index, config, position, reads=reads)
    maker = Threads(step_loader(index, config, reads=reads), seat, config.data.decode_threads)
    return in_order(maker, config.data, first.step)


def first_position(index: Index, config: RunConfig, position: DataPosition | None, *, reads: Reads) -> DataPosition:
    """Return where to begin: at a position, or at the start where it is None.

    Errors: DataError when the position belongs to another plan, or no sample has a caption although they are read.
    """
    start = start_position(index, config, reads=reads)
    if position is not None:
        check_plan(position.plan_hash, start.plan_hash)
    return position or start


def start_position(index: Index, config: RunConfig, *, reads: Reads) -> DataPosition:
    """Return where a new run begins."""
    return DataPosition(plan_hash(usable_index(index, reads), plan_spec(config), config.seed), 0)


def image_of(
    sample: SampleRef,
    key: int | None,
    size_hw_px: tuple[int, int],
    *,
    augmentation: Augmentation = AS_IT_IS,
    cache: ShardCache | None = None,
) -> Pixels | None:
    """Read a sample's image at a size, augmented by its key as the student sees it; None when its bytes do not decode.

    Without a key it is not augmented. For other processes: it needs the sample's place alone. Errors: DataError when
    the shard cannot be read.
    """
    if isinstance(sample, StreamedSample):
        data = sample.data
    else:
        data = ShardReader(cache).read(sample.shard, sample.offset_bytes, sample.size_bytes, sample.version)
    view = PLAIN if key is None else views_of(np.array([key]), augmentation)[0]
    try:
        image = read_image_at(data, size_hw_px, view)
    except DataError:
        return None
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def usable_index(index: Index, reads: Reads) -> Index:
    """Return the samples that a stage can train on. Errors: DataError when there is none."""
    needs: dict[Reads, Needs] = {"images": "image", "captions": "caption", "conversations": "text"}
    usable = index.having(needs[reads])
    if not len(usable):
        raise DataError(f"none of the {len(index)} samples has {_LACKING[reads]}")
    return usable


class StepMaker(Protocol):
    """Makes steps by their numbers; `submit` returns at once, and `result` takes what `submit` returned."""

    def submit(self, step: int) -> Any:
        """Begin to make a step."""

    def result(self, handle: Any) -> StepBatch:
        """Wait for a step. Errors: DataError when it cannot be made."""

    def close(self) -> None:
        """Give up what was not asked for."""


class Threads:
    """Makes the steps of a seat in threads of this process."""

    def __init__(self, loader: StepLoader, seat: Seat, num_threads: int) -> None:
        self._loader, self._seat = loader, seat
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def submit(self, step: int) -> Future[StepBatch]:
        """Queue a step."""
        return self._pool.submit(self._loader.step, self._seat, step)

    def result(self, handle: Future[StepBatch]) -> StepBatch:
        """Wait for a step."""
        return handle.result()

    def close(self) -> None:
        """Stop the threads after the steps that are under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def steps_ahead(data: DataConfig) -> int:
    """Return how many steps are asked for before the first of them is needed."""
    return max(1, data.prefetch_steps, data.decode_threads)


def in_order(maker: StepMaker, data: DataConfig, first: int) -> Generator[StepBatch]:
    """Yield steps in order, others being made ahead; logs what does not decode. Closes its maker with itself.

    Errors: DataError when a step cannot be made, or more images than data.max_bad_fraction do not decode.
    """
    with closing(maker):
        ahead = steps_ahead(data)
        pending = deque(maker.submit(first + step) for step in range(ahead))
        seen = bad = 0
        for step in count(first + ahead):
            made = maker.result(pending.popleft())
            pending.append(maker.submit(step))
            for failure in made.failures:
                log.warning("image %s", failure)
            seen += made.decoded
            bad += len(made.failures)
            if bad > data.max_bad_fraction * max(seen, FEWEST_IMAGES_TO_JUDGE):
                raise DataError(
                    f"{bad} of {seen} images did not decode (the log names them), more than"
                    f" data.max_bad_fraction={data.max_bad_fraction} allows; repair the shards or raise it"
                )
            yield made


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the images of a group of ranks go, and which captions go with them."""

    placement: Placement
    choice: CaptionChoice | None
    text_tokens: Ints  # [B], reserved for each caption
    cost: Ints  # [B], of image and caption


def lay_out(batch: GlobalBatch, index: Index, config: RunConfig, num_ranks: int, *, reads: Reads) -> Layout:
    """Choose the captions of some shares of a global batch and place its images on the packs of their ranks."""
    num_tokens, cost = batch.patches, batch.cost
    choice, text_tokens = None, batch.tokens
    if reads == "captions":
        num_captions = index.take(batch.rows)["num_captions"].astype(np.int64)
        choice = choose_captions(num_captions, batch.key, config.data.zh_fraction)
        spelt_bytes = index.chosen_bytes(batch.rows, choice)
        text_tokens = token_bound(spelt_bytes, config.text.max_tokens, config.data.tokenizer)
        cost = cost + caption_cost(text_tokens, config)
    # A sample without an image has a place among the sequences, and each image one among the images.
    slots = np.maximum(batch.images, 1)
    limits = pack_limits(config)
    if reads == "conversations" and config.parallel.pp > 1:
        placement = place_phases(batch.phases, num_tokens, text_tokens, slots, num_ranks=num_ranks, limits=limits)
    else:
        placement = place(cost, num_tokens, text_tokens, slots, num_ranks=num_ranks, limits=limits)
    return Layout(placement, choice, text_tokens, cost)


def step_loader(index: Index, config: RunConfig, *, reads: Reads) -> StepLoader:
    """Return what makes the steps of a run. Errors: DataError when no sample has a caption although they are read."""
    usable = usable_index(index, reads)
    spec, reader = plan_spec(config), ShardReader(cache_of(config.data))
    talks = open_talks(usable, config, reader) if reads == "conversations" else None
    return StepLoader(
        index=usable,
        config=config,
        planner=Planner(usable, spec, config.seed, None if talks is None else talks.counts),
        plan_hash=plan_hash(usable, spec, config.seed),
        reads=reads,
        tokenizer=load_tokenizer(config.data.tokenizer, config.text.vocab_size) if reads == "captions" else None,
        reader=reader,
        talks=talks,
    )


@dataclass(frozen=True)
class StepLoader:
    """Everything that a step of a rank is a function of, besides the rank's seat and the step's number."""

    index: Index
    config: RunConfig
    planner: Planner
    plan_hash: str
    reads: Reads
    tokenizer: Tokenizer | None
    reader: ShardReader
    talks: Talks | None  # where a language model reads the samples

    def step(self, seat: Seat, step: int) -> StepBatch:
        """Plan, place, read, decode and pack a step. Threads may share the loader."""
        batch = self.planner.batch(step, seat.shares)
        if seat.span is not None:
            batch = batch.within(seat.span)
        layout = lay_out(batch, self.index, self.config, seat.num_ranks, reads=self.reads)
        packs, sizing = layout.placement.packs_of(seat.rank), self.planner.sizing_at(step)
        made = [
            self._pack(batch, layout, members, seat.decodes)
            if self.talks is None
            else self.talks.pack(batch, members, seat.decodes, sizing)
            for members in packs
        ]
        return StepBatch(
            micro=tuple(one.batch for one in made),
            position=DataPosition(self.plan_hash, step + 1),
            cut_captions=sum(one.cut for one in made),
            downsized=sum(int(batch.downsized[members].sum()) for members in packs),
            decoded=sum(one.decoded for one in made),
            failures=tuple(failure for one in made for failure in one.failures),
            dropped=sum(one.dropped for one in made),
        )

    def _pack(self, batch: GlobalBatch, layout: Layout, members: Ints, decodes: Slice | None) -> Made:
        """Read, decode and pack some images of a batch, with their captions."""
        limits, choice = pack_limits(self.config), layout.choice
        # Equal grids side by side: attention on CPU runs over neighbors of one length at a time.
        order = members[np.lexsort((*batch.grid_hw[members].T, -batch.patches[members]))]
        refs = [self.index.ref(row) for row in batch.rows[order].tolist()]
        images = self._images(batch, order, refs, decodes)
        text, cut = None, 0
        if self.tokenizer is not None and choice is not None:
            spoken = self._captions(batch.rows[order], choice.language[order], choice.number[order])
            bounds = layout.text_tokens[order].tolist()
            tokens = [self.tokenizer.encode(one.text, bound) for one, bound in zip(spoken, bounds, strict=True)]
            text = assemble_text(spoken, tokens, images.images.weight, limits)
            cut = sum(one.cut for one in tokens)
        absent = (None,) * (limits.images - len(refs))
        micro = Batch(images=images.images, text=text, targets=None, samples=(*refs, *absent))
        return Made(micro, images.decoded, images.failures, cut)

    def _images(self, batch: GlobalBatch, order: Ints, refs: list[SampleRef], decodes: Slice | None) -> Decoded:
        def read(number: int) -> bytes:
            ref = refs[number]
            return self.reader.read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)

        def name(number: int) -> str:
            return self.index.name(int(batch.rows[order[number]]))

        return decode_pack(self.config, batch.grid_hw[order], batch.key[order], decodes, read, name)

    def _captions(self, rows: Ints, language: Ints, number: Ints) -> list[Spoken]:
        captions = []
        for row, tongue, which in zip(rows.tolist(), language, number, strict=True):
            found = self.index.corpus.captions(row, self.reader, self.config.data.caption_field)
            if which >= len(texts := found[LANGUAGES[tongue]]):
                raise DataError(
                    f"{self.index.name(row)} has other captions than its index; pass the --data.caption-field that its"
                    " shards were indexed with, or run python -m tools.index_shards again"
                )
            captions.append(Spoken(texts[which], name_to_int64(repr(sorted(found.items())))))
        return captions


def caption_cost(num_tokens: Ints, config: RunConfig) -> Ints:
    """Return the cost of encoding captions of n tokens, in the units of `attention_cost` of the vision tower."""
    vision, text = config.vision, config.text
    units = attention_cost(num_tokens, attention_tokens(text))
    return units * (text.embed_dim * text.depth) // (vision.embed_dim * vision.depth)

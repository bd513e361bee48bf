"""Samples as a language model reads them: conversations as tokens, their images packed beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.batch import Batch, HostView, PackedSequence, SampleRef, SharpImages
from cogvit.config import RunConfig
from cogvit.model.dialog import Dialog, DialogReader
from cogvit.model.language_config import LanguageShape
from cogvit.model.packing import Grid
from cogvit.model.pretrained_language import language_shape
from cogvit.model.sequence import Part, expert_tokens, num_tokens, part_positions, tokens_ahead
from cogvit.model.video import VideoReader
from data_pipeline.caption import LANGUAGES
from data_pipeline.clips import STILL, reading
from data_pipeline.decode import Encoded
from data_pipeline.index import Index
from data_pipeline.measure import choice_of, pictures
from data_pipeline.pack import Made, decode_pack, decode_sharp, pack_limits
from data_pipeline.plan import GlobalBatch
from data_pipeline.shards import ShardReader
from data_pipeline.sizing import Sizing
from data_pipeline.spec import LanguageSpec, plan_spec
from data_pipeline.token_counts import TokenCounts, open_counts, read_text, wording_of
from data_pipeline.topology import Slice

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Laid:
    """A sample as tokens, each image as a run of its length."""

    ids: Ints  # [n]
    answer: NDArray[np.bool_]  # [n]
    parts: tuple[Part, ...]  # text and images in order
    images: int  # whose whole run is there
    cut: bool  # it was longer


@dataclass(frozen=True, slots=True)
class Sharp:
    """What a second encoder sees of a pack, and what became of it on the way; nothing without one."""

    images: SharpImages | None = None
    broken: tuple[int, ...] = ()  # samples with an image that did not decode
    decoded: int = 0
    failures: tuple[str, ...] = ()


def lay(dialog: Dialog, image_id: int, grids: list[Grid], max_tokens: int, *, framed: bool = False) -> Laid:
    """Return a sample's tokens, at most max_tokens; an image that would be cut goes with all that follows it.

    grids: rows and columns of tokens of each image; those behind the last answer, which have no token, come last.
    framed: learned tokens stand around each image, among its own.
    """
    is_image = dialog.ids == image_id
    lengths = np.ones(len(dialog.ids), np.int64)
    lengths[is_image] = [num_tokens(grid, framed=framed) for grid in grids[: int(is_image.sum())]]
    kept = int(np.searchsorted(np.cumsum(lengths), max_tokens, "right"))
    ids, answer = np.repeat(dialog.ids[:kept], lengths[:kept]), np.repeat(dialog.answer[:kept], lengths[:kept])
    parts: list[Part] = []
    places = [-1, *np.flatnonzero(is_image[:kept]).tolist(), kept]
    for number, (before, here) in enumerate(pairwise(places)):
        parts += [here - before - 1] if here - before > 1 else []
        parts += [grids[number]] if here < kept else []
    return Laid(ids, answer, tuple(parts), len(places) - 2, kept < len(dialog.ids))


@lru_cache(4)
def dialog_reader(path: str) -> tuple[DialogReader, LanguageShape]:
    """Return what reads conversations for a language model, and its shape. Errors: DataError, CheckpointError."""
    shape = language_shape(Path(path))
    return DialogReader.of(Path(path), shape.vocab_size, shape.eos_ids), shape


def open_talks(index: Index, config: RunConfig, reader: ShardReader) -> Talks:
    """Return what makes the packs of a run's language model; counts the corpus's tokens where nobody has.

    Errors: DataError or CheckpointError when the language model or its tokenizer cannot be used.
    """
    dialogs, shape = dialog_reader(config.language.path)
    spec = plan_spec(config).language
    assert spec is not None, "stage 3 names a language model"
    counts = open_counts(index.corpus, dialogs, spec, wording_of(config), reader)
    return Talks(index, config, dialogs, shape.mrope_section is not None, spec, counts, reader)


@dataclass(frozen=True)
class Talks:
    """Everything that a pack of text and images is a function of, besides the batch."""

    index: Index
    config: RunConfig
    dialogs: DialogReader
    by_place: bool  # image tokens have positions by row and column
    spec: LanguageSpec
    counts: TokenCounts
    reader: ShardReader
    videos: VideoReader = field(default_factory=VideoReader)

    def pack(self, batch: GlobalBatch, members: Ints, decodes: Slice | None, sizing: Sizing) -> Made:
        """Read, decode and pack some samples of a batch."""
        rows, key, pool = batch.rows[members], batch.key[members], self.spec.spatial_pool
        found = pictures(self.index, rows, key, sizing, self.spec)
        grids: list[list[Grid]] = [[] for _ in rows]
        shown = found.shown
        for one, (high, wide) in zip(shown.owner.tolist(), (found.grid_hw // pool).tolist(), strict=True):
            grids[one].append((high, wide))
        dialogs = self._dialogs(rows, key)
        laid = [
            lay(dialog, self.dialogs.image_id, own, self.spec.max_tokens, framed=self.spec.framed)
            for dialog, own in zip(dialogs, grids, strict=True)
        ]
        kept = np.flatnonzero(shown.place < np.array([one.images for one in laid], np.int64)[shown.owner])
        # Equal grids side by side: attention on CPU runs over neighbors of one length at a time.
        order = kept[np.lexsort((*found.grid_hw[kept].T, -found.grid_hw[kept].prod(axis=1)))]
        refs = [
            self.index.ref(row, number)
            for row, number in zip(rows[shown.owner[order]].tolist(), shown.number[order].tolist(), strict=True)
        ]
        read = reading(refs, shown.time_ms[order], self.reader, self.videos)

        def name(slot: int) -> str:
            row, time_ms = int(rows[shown.owner[order[slot]]]), int(shown.time_ms[order[slot]])
            return self.index.name(row) + ("" if time_ms == STILL else f" at {time_ms / 1000:g} s")

        decoded = decode_pack(self.config, found.grid_hw[order], found.key[order], decodes, read, name)
        bad = decoded.images.weight.numpy()[: len(order)] == 0.0
        sharp = self._sharp(laid, order, shown.owner[order], found.key[order], decodes, read, name)
        broken = {*shown.owner[order[bad]].tolist(), *sharp.broken}
        first_row = np.zeros(len(shown.owner), np.int64)
        tokens = found.grid_hw[order].prod(axis=1) // pool**2 + (2 if self.spec.framed else 0)
        first_row[order] = np.cumsum(tokens) - tokens
        rows_of = [first_row[shown.owner == one][: laid[one].images].tolist() for one in range(len(rows))]
        sequence = self._sequence(laid, rows_of, key, broken)
        if self.config.mmtp.depths:
            sequence = replace(sequence, ahead=tokens_ahead(sequence, self.config.mmtp, tokens.tolist()))
        absent: tuple[SampleRef | None, ...] = (None,) * (pack_limits(self.config).images - len(refs))
        samples = (*refs, *absent)
        micro = Batch(decoded.images, text=None, targets=None, samples=samples, sequence=sequence, sharp=sharp.images)
        cut, dropped = sum(one.cut for one in laid), len(shown.owner) - len(order)
        return Made(micro, decoded.decoded + sharp.decoded, decoded.failures + sharp.failures, cut, dropped)

    def _sharp(
        self,
        laid: list[Laid],
        order: Ints,
        owner: Ints,
        key: Ints,
        decodes: Slice | None,
        read: Callable[[int], Encoded],
        name: Callable[[int], str],
    ) -> Sharp:
        """Decode images once more for a second encoder, in the order of the samples in their pack.

        order, owner and key are of each image of the pack: its place among those of all samples, its sample, its seed.
        """
        if not self.config.cross.image_size:
            return Sharp()
        place = np.argsort(_by_length(laid))[owner]
        slots = np.lexsort((order, place)).tolist()
        count = tuple(np.bincount(place, minlength=pack_limits(self.config).images).tolist())
        images, each = decode_sharp(
            self.config, count, key[slots], decodes, lambda n: read(slots[n]), lambda n: name(slots[n])
        )
        broken = (int(owner[slot]) for slot, image in zip(slots, each.each, strict=True) if image is None)
        return Sharp(images, tuple(broken), each.decoded, each.failures)

    def _dialogs(self, rows: Ints, key: Ints) -> list[Dialog]:
        choice, wording = choice_of(self.index.take(rows), key, self.spec), wording_of(self.config)
        return [
            self.dialogs.read(read_text(self.index.corpus, row, LANGUAGES[language], number, wording, self.reader))
            for row, language, number in zip(
                rows.tolist(), choice.language.tolist(), choice.number.tolist(), strict=True
            )
        ]

    def _sequence(self, laid: list[Laid], rows_of: list[list[int]], key: Ints, broken: set[int]) -> PackedSequence:
        """Lay samples end to end, those of a length side by side.

        rows_of: where the tokens of each sample's images begin in the adapter's output. broken: samples with an image
        that did not decode, whose answers do not count.
        """
        limits = pack_limits(self.config)
        size, slots = limits.rows(sum(len(one.ids) for one in laid), limits.text_tokens), limits.images
        order = _by_length(laid)
        lengths = [len(laid[one].ids) for one in order]
        bounds = [*accumulate(lengths, initial=0)]
        bounds += [bounds[-1]] * (slots - len(lengths)) + [size]
        ids, labels = np.zeros(size, np.int64), np.zeros(size, np.int64)
        weight, visual = np.zeros(size, np.float32), np.full(size, -1, np.int64)
        position, expert = torch.zeros(3, size, dtype=torch.int32), torch.zeros(size, dtype=torch.bool)
        framed = self.spec.framed
        for start, one in zip(bounds, order, strict=False):
            sample, stop = laid[one], start + len(laid[one].ids)
            ids[start:stop] = sample.ids
            labels[start : stop - 1] = sample.ids[1:]
            weight[start : stop - 1] = sample.answer[1:] * (one not in broken)
            position[:, start:stop] = part_positions(sample.parts, by_place=self.by_place, framed=framed)
            expert[start:stop] = expert_tokens(sample.parts, framed=framed)
            places = np.flatnonzero(sample.ids == self.dialogs.image_id)
            visual[start + places] = _visual_rows(sample.parts, rows_of[one], framed=framed)
        return PackedSequence(
            ids=torch.from_numpy(ids),
            position=position,
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            visual_row=torch.from_numpy(visual),
            labels=torch.from_numpy(labels),
            weight=torch.from_numpy(weight),
            key=torch.from_numpy(np.pad(key[order], (0, slots - len(order)))),
            host=HostView(tuple(np.diff(bounds).tolist()), labels=int((weight > 0).sum()), experts=int(expert.sum())),
            expert=expert if framed else None,
        )


def _by_length(laid: list[Laid]) -> list[int]:
    """The numbers of samples in the order in which they lie in a pack."""
    return sorted(range(len(laid)), key=lambda one: -len(laid[one].ids))


def _visual_rows(parts: tuple[Part, ...], first_rows: list[int], *, framed: bool) -> Ints:
    """Return the rows of the adapter's output of a sample's images, in their order."""
    sizes = [num_tokens(part, framed=framed) for part in parts if not isinstance(part, int)]
    runs = [np.arange(first, first + size) for first, size in zip(first_rows, sizes, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *runs])

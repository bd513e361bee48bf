"""The data types that travel between the data plane, the teachers, the model and the engine.

Shape letters of the whole project: T patch tokens of a pack, N image slots of a pack, D width, H heads, K head dim,
L caption tokens of a pack, M masked tokens of a pack, C teacher channels, P patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

# What a stage reads of a sample: its image, a caption of it too, or all of its images and what is said of them; or no
# sample at all, but answers of the model itself.
Reads = Literal["images", "captions", "conversations", "answers"]


@dataclass(frozen=True, slots=True)
class HostView:
    """What the host knows of a pack, so that nothing has to ask the device and wait for it."""

    lengths: tuple[int, ...]  # tokens of each of the N slots, then of the padding
    grids: tuple[tuple[int, int], ...] = ()  # rows and columns of each slot, (0, 0) where absent; of images alone
    labels: int | None = None  # that have a weight, of a `PackedSequence`; None waits for the device to count them
    experts: int | None = None  # tokens that go through the visual experts; likewise


@dataclass(frozen=True, slots=True)
class PackedImages:
    """Whole images end to end in one row of exactly T patch tokens; T and N are static for a run.

    Attributes:
        patches: [T, C * P * P] uint8 (normalized on the device) or float, channel-major as a Conv2d weight is; [T, 0]
            on a pipeline stage that embeds none.
        row_col: [T, 2] int32, place of each patch in its own image.
        cu_seqlens: [N + 2] int32, rows of image n are from entry n to n + 1; the last segment is padding.
        grid_hw: [N, 2] int32, rows and columns of patches; (0, 0) where absent.
        key: [N] int64, seed of every random draw for this image.
        weight: [N] float32, 1, or 0 for an image that is absent or failed to decode.
        host: lengths and grids once more; None where only the device knows them, and a pass has to wait for it.
    """

    patches: Tensor
    row_col: Tensor
    cu_seqlens: Tensor
    grid_hw: Tensor
    key: Tensor
    weight: Tensor
    host: HostView | None = None

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.patches.shape[0])

    @property
    def num_slots(self) -> int:
        """N, absent images included."""
        return int(self.grid_hw.shape[0])

    def segment(self) -> Tensor:
        """[T] int64: the slot each token belongs to; N for padding."""
        index_T = torch.arange(self.num_tokens, device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:-1].contiguous(), index_T, right=True)


@dataclass(frozen=True, slots=True)
class PackedText:
    """Whole captions end to end in one row of exactly L tokens; slot n belongs to image slot n of the same batch.

    Attributes:
        ids: [L] int64.
        position: [L] int32, place of each token in its own caption.
        cu_seqlens: [N + 2] int32, as in `PackedImages`.
        caption_id: [N] int64, hash of the caption's tokens: equal captions are not negatives of each other.
        concept_id: [N] int64, hash of all captions of the sample, in every language: nor are translations.
        weight: [N] float32, 1, or 0 where absent.
        host: as in `PackedImages`.
    """

    ids: Tensor
    position: Tensor
    cu_seqlens: Tensor
    caption_id: Tensor
    concept_id: Tensor
    weight: Tensor
    host: HostView | None = None


@dataclass(frozen=True, slots=True)
class SharpImages:
    """The images of a `PackedSequence` once more, squares of one size at high resolution, in the order of its samples.

    Attributes:
        patches: [E, C * P * P] uint8 as in `PackedImages`, image after image; [E, 0] on a stage that embeds none.
        count: images of each of the N samples, known to the host.
    """

    patches: Tensor
    count: tuple[int, ...]

    @property
    def patches_per_image(self) -> int:
        """Patches of each image; 0 where there is none."""
        return len(self.patches) // max(sum(self.count), 1)


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Whole samples of text and images end to end in one row of exactly S language tokens.

    Attributes:
        ids: [S] int64; the image token's id at visual positions.
        position: [3, S] int32, rotary positions by time, row and column; equal for text.
        cu_seqlens: [N + 2] int32, as in `PackedImages`.
        visual_row: [S] int32, row of the adapter's output that stands here; -1 for text and padding.
        labels: [S] int64, the token that follows.
        weight: [S] float32, of the label: answers alone count; 0 where nothing follows and for padding.
        key: [N] int64, seed of every random draw for this sample.
        host: lengths, how many labels have a weight and how many tokens are the experts', once more; as in
            `PackedImages`.
        ahead: what heads for more tokens read and predict, where there are any.
        expert: [S] bool, goes through the visual experts; None for a language model without them.
    """

    ids: Tensor
    position: Tensor
    cu_seqlens: Tensor
    visual_row: Tensor
    labels: Tensor
    weight: Tensor
    key: Tensor
    host: HostView | None = None
    ahead: TokensAhead | None = None
    expert: Tensor | None = None

    def ahead_labels(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the labels [S] and weights [S] of each depth of the heads for more tokens."""
        if self.ahead is None:
            return [], []
        return [self.labels[source_S.long()] for source_S in self.ahead.source], [*self.ahead.weight]


@dataclass(frozen=True, slots=True)
class TokensAhead:
    """What the M heads behind a language model read and predict of a pack of S tokens.

    Depth m at place i reads the token at `source[m, i]`, which is m + 1 places ahead, and predicts that token's label.

    Attributes:
        source: [M, S] int32, a place of the same sample: its last where fewer tokens follow.
        weight: [M, S] float32, of the label; 0 where it is of no answer or behind the sample's end.
        slot: [S] int32, which of the learned tokens stands at a visual position, -1 elsewhere.
        counts: how many labels of each depth have a weight, known to the host.
        lengths: for each depth, tokens of each sample and of the padding whose source is text; known to the host, and
            only where the heads see no images at all.
    """

    source: Tensor
    weight: Tensor
    slot: Tensor
    counts: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...] = ()

    def weights_where(self, weight_S: Tensor) -> Tensor:
        """Return the weights [M, S] without those of labels that a pack's weights [S] leave out."""
        return self.weight * (weight_S > 0)[self.source.long()]


@dataclass(frozen=True, slots=True)
class PackedAnswers:
    """What a policy learns from the samples of a `PackedSequence`, each of which is one answer or one episode.

    Attributes:
        logprob: [S] float32, of each label that has a weight, by the policy that gave it.
        age: [S] int64, by how many versions that policy's weights were older than those that learn from it.
        advantage: [N] float32, by which the answer is better than others to the same prompt.
        source: [N] int64, number of the source of its task; -1 where no answer is.
        version: of the weights that learn.
    """

    logprob: Tensor
    age: Tensor
    advantage: Tensor
    source: Tensor
    version: int


@dataclass(frozen=True, slots=True)
class ShardVersion:
    """What tells that a shard is still the one that was indexed."""

    size_bytes: int
    mark: str  # when, or as what entity, it was written; of a remote shard that was read whole, a hash of its bytes


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a sample's image lies: enough for any process to read and decode it by itself."""

    sample_id: int  # signed 64-bit hash of source, shard name and key
    shard: str  # path or fsspec URL
    offset_bytes: int
    size_bytes: int
    version: ShardVersion | None = None  # of the shard; None takes it as it is


@dataclass(frozen=True, slots=True)
class StreamedSample(SampleRef):
    """A sample of a stream, whose image nobody can read again: it travels with it."""

    data: bytes = b""


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """Features of the masked tokens only, in pack order, standardized per channel."""

    features: dict[str, Tensor]  # teacher name -> [M, C] float


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch: one pack of images with what belongs to it."""

    images: PackedImages
    text: PackedText | None
    targets: TeacherTargets | None
    samples: tuple[SampleRef | None, ...]  # N, in slot order
    sequence: PackedSequence | None = None  # text with the images in it
    answers: PackedAnswers | None = None  # of the sequence, where it was not read but sampled
    sharp: SharpImages | None = None  # of the sequence, where a second encoder sees its images


@dataclass(frozen=True, slots=True)
class DataPosition:
    """Where the data plane stands: the plan is a pure function, so its hash and the next step say everything."""

    plan_hash: str
    step: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank trains on in one optimizer step, with the position after it."""

    micro: tuple[Batch, ...]
    position: DataPosition
    cut_captions: int = 0  # of this rank: longer than text.max_tokens, or language.max_tokens
    downsized: int = 0  # images of this rank that have more patches than their budget
    decoded: int = 0  # images that this rank decoded, or tried to
    failures: tuple[str, ...] = ()  # those of them that did not decode: which and why
    dropped: int = 0  # images of this rank whose place in a conversation was cut off
    figures: Mapping[str, float] = field(default_factory=dict)  # for metrics.jsonl; the same on every rank


Row = TypeVar("Row", PackedImages, PackedText, PackedSequence)
Packed = TypeVar("Packed", PackedImages, PackedText, PackedSequence, TokensAhead, PackedAnswers, SharpImages)


def to_device(packed: Row, device: torch.device) -> Row:
    """Move every tensor of a pack to a device; from pinned memory the copy goes on in the background."""
    return _each(packed, lambda tensor: tensor.to(device, non_blocking=True))


def _each(packed: Packed, change: Callable[[Tensor], Tensor]) -> Packed:
    changed: dict[str, Any] = {}
    for name in (one.name for one in fields(packed)):
        value = getattr(packed, name)
        if isinstance(value, Tensor):
            changed[name] = change(value)
        elif isinstance(value, TokensAhead):
            changed[name] = _each(value, change)
    return replace(packed, **changed)


def sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return a few values as a tensor on a device, without waiting for what the device is doing."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pinned(step: StepBatch) -> StepBatch:
    """Copy the images, texts and targets of a step into page-locked memory; needs CUDA."""
    return replace(step, micro=tuple(_on_each(batch, _pin) for batch in step.micro))


def _pin(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.numel() else tensor


def move(batch: Batch, device: torch.device) -> Batch:
    """Move everything of a microbatch to a device; from pinned memory the copies go on in the background."""
    return _on_each(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _on_each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    text, sequence, targets, answers = batch.text, batch.sequence, batch.targets, batch.answers
    return replace(
        batch,
        images=_each(batch.images, change),
        text=None if text is None else _each(text, change),
        sequence=None if sequence is None else _each(sequence, change),
        answers=None if answers is None else _each(answers, change),
        sharp=None if batch.sharp is None else _each(batch.sharp, change),
        targets=None if targets is None else TeacherTargets({name: change(x) for name, x in targets.features.items()}),
    )


def pad_step(step: StepBatch, num_packs: int) -> StepBatch:
    """Append empty packs: ranks that balance apart need different numbers of packs, and a step has one for all."""
    empty = (_emptied(step.micro[0]),) * (num_packs - len(step.micro))
    return replace(step, micro=step.micro + empty)


def _emptied(batch: Batch) -> Batch:
    """Return a pack of the same shape that is all padding."""
    targets, answers = batch.targets, batch.answers
    if targets is not None:
        targets = TeacherTargets({name: features[:0] for name, features in targets.features.items()})
    if answers is not None:
        answers = _each(answers, torch.zeros_like)
        answers.source.sub_(1)
    sharp = batch.sharp
    if sharp is not None:
        sharp = SharpImages(sharp.patches[:0], (0,) * len(sharp.count))
    return Batch(
        images=_padding_like(batch.images),
        text=None if batch.text is None else _padding_like(batch.text),
        targets=targets,
        samples=(None,) * len(batch.samples),
        sequence=None if batch.sequence is None else _padding_like(batch.sequence),
        answers=answers,
        sharp=sharp,
    )


def _padding_like(packed: Row) -> Row:
    blank = _each(packed, torch.zeros_like)
    blank.cu_seqlens[-1] = packed.cu_seqlens[-1]
    if isinstance(packed, PackedSequence):
        blank.visual_row.sub_(1)
        if blank.ahead is not None:
            blank = replace(blank, ahead=_nothing_ahead(blank.ahead))
    if packed.host is None:
        return blank
    lengths = (0,) * (len(packed.host.lengths) - 1) + (sum(packed.host.lengths),)
    labels, experts = (None if known is None else 0 for known in (packed.host.labels, packed.host.experts))
    return replace(blank, host=HostView(lengths, ((0, 0),) * len(packed.host.grids), labels, experts))


def _nothing_ahead(ahead: TokensAhead) -> TokensAhead:
    lengths = tuple((0,) * (len(depth) - 1) + (len(ahead.slot),) for depth in ahead.lengths)
    return replace(ahead, slot=ahead.slot - 1, counts=(0,) * len(ahead.counts), lengths=lengths)

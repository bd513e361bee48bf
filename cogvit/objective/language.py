"""Stage 3: the next-token loss of a language model that sees images.

The loss of a step is the mean over all labels of the global batch, by their weights, so neither packing nor layout
weighs a sample differently.

One stage takes one pass. With several, the encoder runs as a pipeline of its own over all of them, so that none
carries both models' load: first without gradients, for the visual tokens, which go from the last stage to the first;
then the language model with them as leaves; then, with their gradients, the encoder again, unless it is frozen. A
language model that lies whole on the last stage takes the visual tokens there, in the encoder's one pass.

A second encoder, which sees images at high resolution for cross attention, lies whole on every tensor rank of the first
stage. With several stages its rows go to all of them before the language model's pass, and their gradients come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvit.batch import Batch, PackedImages, PackedSequence, SharpImages
from cogvit.model.adapter import fitted_adapter
from cogvit.model.config import AdapterConfig, MmtpConfig
from cogvit.model.cross import CrossRows
from cogvit.model.eva import EvaConfig, EvaEncoder
from cogvit.model.expert import is_grown
from cogvit.model.frame import ImageFrame
from cogvit.model.sequence import num_tokens
from cogvit.model.tokens import PackedFeatures
from cogvit.model.vit import grids_of
from cogvit.objective.distill import reduce_terms
from cogvit.parallel.convert import plain_tensors
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.ends import summed_on_first_stage, to_all_stages, to_first_stage, to_last_stage
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.schedule import Schedule
from cogvit.parallel.whole import WholeLanguageStage

JointPart = Literal["vision", "adapter", "language"]


@dataclass(frozen=True)
class Sight:
    """What this stage of a language model is shown of a pack's images.

    Attributes:
        visual_ED: visual tokens, where the language model begins, and on the last stage where its heads see them.
        cross: what cross attention looks at, on every stage; None without a second encoder.
    """

    visual_ED: Tensor | None
    cross: CrossRows | None = None


# Runs the language model on a microbatch, by its number, with what it is shown: on the last stage what a loss reads.
Speak = Callable[[int, Sight], Tensor]


class JointModel(nn.Module):
    """This rank's stages of encoder and language model; the adapter lies whole on every tensor rank of the last stage.

    With visual experts, learned tokens stand around each image; they lie beside the adapter.

    frozen: parts that keep their weights. They get no gradients and no optimizer state, and stay in eval mode; the
        experts and the cross attention of a frozen language model learn.
    cross: the shape of a second encoder, which lies whole on the first stage.
    """

    def __init__(
        self,
        vision: VisionStage,
        adapter: AdapterConfig,
        language: LanguageStage | WholeLanguageStage,
        frozen: Sequence[JointPart] = (),
        cross: EvaConfig | None = None,
    ) -> None:
        super().__init__()
        self.vision, self.language = vision, language
        self.spatial_pool, self.frozen = adapter.spatial_pool, frozenset(frozen)
        self.framed = language.cfg.expert.every > 0
        self.adapter = self.frame = None
        if vision.trunk.mesh.is_last_stage:
            self.adapter = fitted_adapter(adapter, vision.cfg.embed_dim, language.cfg)
            self.frame = ImageFrame(language.cfg.embed_dim) if self.framed else None
        self.cross_cfg = cross
        self.cross = EvaEncoder(cross) if cross is not None and vision.trunk.mesh.is_first_stage else None
        for module in self._frozen_modules():
            for tensor in plain_tensors(module):
                tensor.parameter.requires_grad_(is_grown(tensor.name))

    def train(self, mode: bool = True) -> JointModel:
        """Set the mode of what is not frozen."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        modules = [getattr(self, part) for part in self.frozen] + [self.frame] * ("adapter" in self.frozen)
        return [module for module in modules if module is not None]

    def visual_shape(self, images: PackedImages) -> tuple[int, int]:
        """Return how many visual tokens a pack's images have, and their width; every stage knows it."""
        sizes = image_tokens(images, self.spatial_pool, framed=self.framed)
        return sum(sizes), self.language.cfg.embed_dim

    def features(self, batch: Batch) -> Tensor:
        """Return the encoder's features [T, D] of a pack's patches on the last stage, hidden states elsewhere."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "vision" not in self.frozen):
            out = self.vision(batch.images)
        return out.patch_TD if isinstance(out, PackedFeatures) else out

    def visual(self, patch_TD: Tensor, batch: Batch) -> Tensor:
        """Return the visual tokens [E, D of the language model] of a pack's features; on the last stage."""
        assert self.adapter is not None
        visual_ED = self.adapter.forward_packed(patch_TD, grids_of(batch.images))
        if self.frame is None:
            return visual_ED
        return self.frame(visual_ED, image_tokens(batch.images, self.spatial_pool, framed=False))

    def sharp_shape(self, batch: Batch) -> tuple[int, int]:
        """Return how many rows the second encoder gives of a pack's images, and their width; every stage knows it."""
        assert self.cross_cfg is not None
        return sum(_sharp(batch).count) * self.cross_cfg.side_patches**2, self.cross_cfg.embed_dim

    def sharp_rows(self, batch: Batch) -> Tensor:
        """Return the second encoder's rows [E, C] of a pack's images; on the first stage."""
        assert self.cross is not None
        patches = _sharp(batch).patches
        if len(patches):
            images = patches.unflatten(0, (-1, self.cross.cfg.side_patches**2))
            return self.cross(images).flatten(0, 1)
        nothing = [parameter.flatten()[:0] for parameter in self.cross.parameters()]  # they still get zero gradients
        return torch.cat(nothing).unflatten(0, (0, self.cross.cfg.embed_dim))

    def looked_at(self, row_EC: Tensor, batch: Batch) -> CrossRows:
        """Return a pack's rows as its samples' own."""
        assert self.cross_cfg is not None
        return CrossRows(row_EC, [images * self.cross_cfg.side_patches**2 for images in _sharp(batch).count])

    @property
    def heads_see_images(self) -> bool:
        """Whether heads for more tokens see visual tokens, on the last stage, which made them."""
        mmtp = self.language.cfg.mmtp
        return mmtp.depths > 0 and mmtp.images == "embeddings"

    def spoken(self, batch: Batch, sight: Sight) -> Tensor:
        """Return the sums of a pack's weighted losses, [1 + M], on the last stage, hidden states elsewhere."""
        sequence = _sequence(batch)
        out: Tensor = self.language(sequence, sight.visual_ED, sight.cross)
        return self.language.losses(out, sequence, sight.visual_ED) if self.language.mesh.is_last_stage else out


def image_tokens(images: PackedImages, pool: int, *, framed: bool) -> list[int]:
    """Return how many tokens stand for each image slot of a pack, 0 where none is there.

    pool: sides of the groups of patches that are a token. framed: whether learned tokens stand around each image.
    """
    grids = [(-(-rows // pool), -(-columns // pool)) for rows, columns in grids_of(images)]
    return [num_tokens(grid, framed=framed) if grid[0] else 0 for grid in grids]


class Language:
    """The next-token objective on encoder, adapter and language model."""

    def train(self, model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Leave the gradients of one step on the parameters; returns the global loss terms (0-dim tensors).

        "loss" is in nats a label, "answer_tokens" how many labels count, "loss_mtp_1" and so on in nats a label of the
        heads for more tokens.
        """
        labels = _count_labels(micro, schedule)

        def loss(totals: Tensor, index: int) -> tuple[Tensor, Tensor]:
            return _step_loss(totals, labels, model.language.cfg.mmtp), totals.detach()

        sums = train_passes(model, micro, schedule, _losses_of(model, micro), loss)
        return _terms(sums, labels, schedule)

    def evaluate(self, model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the loss terms without gradients."""
        labels = _count_labels(micro, schedule)
        sums = forward_passes(model, micro, schedule, _losses_of(model, micro))
        return _terms(sums, labels, schedule)


def train_passes(
    model: JointModel,
    micro: Sequence[Batch],
    schedule: Schedule,
    speak: Speak,
    loss: Callable[[Tensor, int], tuple[Tensor, Any]],
) -> list[Any]:
    """Train on every microbatch, in one pass or three; returns on the last stage what `loss` reports, else nothing.

    loss: of what `speak` gave there, as `Schedule.forward_backward` takes it.
    """
    language = _pipelined(model, schedule)
    if language is not None:
        return _three_passes(model, language, micro, schedule, speak, loss)
    if "vision" in model.frozen and schedule.mesh.pp_size > 1:  # nothing goes back through the stages
        features = _seen(model, micro, schedule)
        return schedule.forward_backward(
            None, lambda index: speak(index, Sight(model.visual(features[index], micro[index]))), len(micro), loss
        )
    return schedule.forward_backward(model.vision.trunk, _behind_encoder(model, micro, speak), len(micro), loss)


def forward_passes(model: JointModel, micro: Sequence[Batch], schedule: Schedule, speak: Speak) -> list[Tensor]:
    """Return what `speak` gives of every microbatch on the last stage, nothing elsewhere; without gradients."""
    language = _pipelined(model, schedule)
    if language is None:
        forward = _behind_encoder(model, micro, speak)
        return schedule.forward_only(model.vision.trunk, forward, len(micro), lambda out, index: out)
    visual = _bring(model, _seen(model, micro, schedule), micro, schedule)
    spoken = _shown(model, micro, speak, visual, _look(model, micro, schedule))
    with language.lent_embedding(train=False):
        return schedule.forward_only(language.trunk, spoken, len(micro), lambda out, index: out)


def _pipelined(model: JointModel, schedule: Schedule) -> LanguageStage | None:
    """The language model where it is a pipeline of several stages, besides the encoder's."""
    several = schedule.mesh.pp_size > 1
    return model.language if several and isinstance(model.language, LanguageStage) else None


def _behind_encoder(model: JointModel, micro: Sequence[Batch], speak: Speak) -> Callable[[int], Tensor]:
    """What runs a microbatch where the language model begins behind the encoder's last block, on one stage."""

    def forward(index: int) -> Tensor:
        batch = micro[index]
        out = model.features(batch)
        if model.adapter is None:
            return out
        cross = None if model.cross is None else model.looked_at(model.sharp_rows(batch), batch)
        return speak(index, Sight(model.visual(out, batch), cross))

    return forward


def _shown(
    model: JointModel, micro: Sequence[Batch], speak: Speak, visual: Sequence[Tensor], rows: Sequence[Tensor]
) -> Callable[[int], Tensor]:
    """What runs a microbatch on a stage of several, to which visual tokens and a second encoder's rows were brought."""

    def forward(index: int) -> Tensor:
        cross = model.looked_at(rows[index], micro[index]) if rows else None
        return speak(index, Sight(visual[index] if visual else None, cross))

    return forward


def _losses_of(model: JointModel, micro: Sequence[Batch]) -> Speak:
    return lambda index, sight: model.spoken(micro[index], sight)


@dataclass(frozen=True)
class _Labels:
    """What the labels of a global batch add up to; fp32."""

    weight: Tensor  # [1 + M], of the next token and of those after it; 1 where it is 0, so that one can divide by it
    count: Tensor  # 0-dim, of the next tokens with a weight


def _count_labels(micro: Sequence[Batch], schedule: Schedule) -> _Labels:
    """Collective over the data-parallel ranks; every tensor and pipeline rank of a replica has the same labels."""
    rows = []
    for sequence in map(_sequence, micro):
        weights = [sequence.weight, *sequence.ahead_labels()[1]]
        sums = [weight.double().sum() for weight in weights]
        rows.append(torch.stack([(sequence.weight > 0).double().sum(), *sums]))
    total = torch.stack(rows).sum(0)
    dist.all_reduce(total, group=schedule.mesh.dp_group)
    count, weight = total[0].float(), total[1:].float()
    return _Labels(torch.where(weight > 0, weight, 1.0), count)


def _step_loss(totals: Tensor, labels: _Labels, mmtp: MmtpConfig) -> Tensor:
    """The loss of a pack's sums [1 + M]: the next token's, and the mean of the others by their weight."""
    means = totals / labels.weight
    return means[0] + mmtp.weight * means[1:].sum() / max(mmtp.depths, 1)


def _terms(sums: Sequence[Tensor], labels: _Labels, schedule: Schedule) -> dict[str, Tensor]:
    local = torch.stack([*sums, torch.zeros_like(labels.weight)]).sum(0)
    loss, *ahead = reduce_terms(local / labels.weight, schedule)
    terms = {"loss": loss, "answer_tokens": labels.count}
    return terms | {f"loss_mtp_{depth}": term for depth, term in enumerate(ahead, 1)}


def _sequence(batch: Batch) -> PackedSequence:
    assert batch.sequence is not None, "stage 3 needs sequences"
    return batch.sequence


def _sharp(batch: Batch) -> SharpImages:
    assert batch.sharp is not None, "a second encoder sees images at high resolution"
    return batch.sharp


def _three_passes(
    model: JointModel,
    language: LanguageStage,
    micro: Sequence[Batch],
    schedule: Schedule,
    speak: Speak,
    loss: Callable[[Tensor, int], tuple[Tensor, Any]],
) -> list[Any]:
    features = _seen(model, micro, schedule)
    visual = _bring(model, features, micro, schedule)
    learns = not model.frozen.issuperset(("vision", "adapter"))
    for visual_ED in visual:
        visual_ED.requires_grad_(learns)
    rows = [row_EC.requires_grad_() for row_EC in _look(model, micro, schedule)]
    forward = _shown(model, micro, speak, visual, rows)
    with language.lent_embedding(train=True):
        sums = schedule.forward_backward(language.trunk, forward, len(micro), loss)
    _back_to_rows(model, summed_on_first_stage(_gradients(rows), schedule.mesh), micro, schedule)
    if learns:
        own = _gradients(visual)
        found = to_last_stage(own, _shapes(model, micro), schedule.mesh)
        if model.heads_see_images and schedule.mesh.is_last_stage:
            found = [there + here for there, here in zip(found, own, strict=True)]
        _back(model, features, found, micro, schedule)
    return sums


def _shapes(model: JointModel, micro: Sequence[Batch]) -> list[tuple[int, int]]:
    return [model.visual_shape(batch.images) for batch in micro]


def _seen(model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> list[Tensor]:
    """The encoder's pass without gradients: features of every pack on the last stage, nothing elsewhere."""
    return schedule.forward_only(
        model.vision.trunk, lambda index: model.features(micro[index]), len(micro), lambda out, index: out
    )


def _bring(model: JointModel, features: Sequence[Tensor], micro: Sequence[Batch], schedule: Schedule) -> list[Tensor]:
    """Make visual tokens of features and bring them to the first stage; the last keeps what its heads see."""
    with torch.no_grad(), schedule.autocast():
        made = [model.visual(x_TD, batch) for x_TD, batch in zip(features, micro, strict=False)]
    brought = to_first_stage(made, _shapes(model, micro), schedule.mesh)
    return [x_ED.float() for x_ED in made] if model.heads_see_images and schedule.mesh.is_last_stage else brought


def _gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]


def _look(model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> list[Tensor]:
    """The second encoder's rows of every pack without gradients, on all stages; nothing without one."""
    if model.cross_cfg is None:
        return []
    with torch.no_grad(), schedule.autocast():
        made = [] if model.cross is None else [model.sharp_rows(batch) for batch in micro]
    return to_all_stages(made, [model.sharp_shape(batch) for batch in micro], schedule.mesh)


def _back_to_rows(model: JointModel, found: Sequence[Tensor], micro: Sequence[Batch], schedule: Schedule) -> None:
    """Back the rows' gradients through the second encoder, on the first stage, which has them all."""
    for gradient_EC, batch in zip(found, micro, strict=False):
        with schedule.autocast():
            row_EC = model.sharp_rows(batch)
        (row_EC.float() * gradient_EC).sum().backward()


def _back(
    model: JointModel,
    features: Sequence[Tensor],
    found: Sequence[Tensor],
    micro: Sequence[Batch],
    schedule: Schedule,
) -> None:
    """Back the visual tokens' gradients through adapter and encoder; of a frozen encoder the features are here."""

    def forward(index: int) -> Tensor:
        out = model.features(micro[index])
        return model.visual(out, micro[index]) if schedule.mesh.is_last_stage else out

    def loss(visual_ED: Tensor, index: int) -> tuple[Tensor, None]:
        # The schedule multiplies by the dp ranks once more.
        return (visual_ED.float() * found[index]).sum() / schedule.mesh.dp_size, None

    if "vision" not in model.frozen:
        schedule.forward_backward(model.vision.trunk, forward, len(micro), loss)
        return
    for patch_TD, gradient_ED, batch in zip(features, found, micro, strict=False):
        with schedule.autocast():
            visual_ED = model.visual(patch_TD, batch)
        (visual_ED.float() * gradient_ED).sum().backward()

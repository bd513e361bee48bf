"""Stage 1: regress the frozen teachers' features at the masked patches, and at the others too where they have a weight.

Source: paper section 2.1. Smooth-L1 and one linear head per teacher follow the reference; the loss of a step is the
mean over all masked tokens of the global batch, so neither packing nor layout weighs an image differently. A summary's
loss is a mean over images: the student's CLS token, or the mean of its patches, against the teacher's summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvit.batch import Batch, PackedImages
from cogvit.config import SUMMARY
from cogvit.model.tokens import PackedFeatures, pool_mean
from cogvit.objective.masking import mask_tokens, rows_of
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.schedule import Schedule

TargetError = Literal["smooth_l1", "cosine", "mse"]
_VISIBLE = "_visible"  # ends the name of the error at the patches that the student sees


class DistillModel(nn.Module):
    """This rank's stage of the student, with one linear head for each thing that is regressed on the last stage."""

    def __init__(self, vision: VisionStage, teacher_dims: Mapping[str, int], *, recompute: bool = False) -> None:
        super().__init__()
        self.vision, self.recompute = vision, recompute
        self.heads = nn.ModuleDict()
        if vision.trunk.mesh.is_last_stage:
            for name, dim in teacher_dims.items():
                self.heads[name] = nn.Linear(vision.cfg.embed_dim, dim)

    def error(self, name: str, kind: TargetError, x_MD: Tensor, target_MC: Tensor) -> Tensor:
        """[M] the error of one teacher's head."""

        def error_of(x_MD: Tensor) -> Tensor:
            return target_error(kind, self.heads[name](x_MD), target_MC)

        return checkpoint(error_of, x_MD, use_reentrant=False) if self.recompute else error_of(x_MD)


def target_error(kind: TargetError, guess_MC: Tensor, target_MC: Tensor) -> Tensor:
    """[M] how far a guess is from its target: mean over the channels, or 1 - cos."""
    match kind:
        case "smooth_l1":
            return F.smooth_l1_loss(guess_MC, target_MC, reduction="none").mean(dim=1)
        case "mse":
            return F.mse_loss(guess_MC, target_MC, reduction="none").mean(dim=1)
        case "cosine":
            return 1.0 - F.cosine_similarity(guess_MC, target_MC, dim=1)


@dataclass(frozen=True)
class Term:
    """A teacher's part of the loss."""

    weight: float
    error: TargetError


@dataclass(frozen=True)
class Distill:
    """Masked distillation of several teachers, and of their summaries where a term's name ends with SUMMARY."""

    terms: Mapping[str, Term]
    mask_ratio: float
    visible_weight: float = 0.0  # above 0 the targets are of all patches, and not of the masked ones alone

    def train(self, model: DistillModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Leave the gradients of one step on the parameters; returns the global loss terms (0-dim tensors)."""
        return self._run(model, micro, schedule, train=True)

    def evaluate(self, model: DistillModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the loss terms without gradients."""
        return self._run(model, micro, schedule, train=False)

    def _run(
        self, model: DistillModel, micro: Sequence[Batch], schedule: Schedule, *, train: bool
    ) -> dict[str, Tensor]:
        mesh = schedule.mesh
        masks = [mask_tokens(batch.images, self.mask_ratio) for batch in micro]
        rows = [self._asked(m, batch.images) for batch, m in zip(micro, masks, strict=True)]
        shares = self._shares(micro, masks, rows, schedule)

        def forward(index: int) -> Tensor | PackedFeatures:
            return model.vision(micro[index].images, masks[index])

        def loss(features: PackedFeatures, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            errors = self._errors(model, features, micro[index], masks[index], rows[index], shares)
            return self._total(errors), {name: error.detach() for name, error in errors.items()}

        if train:
            reports = schedule.forward_backward(model.vision.trunk, forward, len(micro), loss)
        else:
            reports = schedule.forward_only(
                model.vision.trunk, forward, len(micro), lambda out, index: loss(out, index)[1]
            )
        zero = torch.zeros((), device=mesh.device)
        local = torch.stack([sum((report[name] for report in reports), zero) for name in self._weights])
        errors = dict(zip(self._weights, reduce_terms(local, schedule), strict=True))
        return {"loss": self._total(errors)} | {f"loss_{name}": error for name, error in errors.items()}

    @property
    def _weights(self) -> dict[str, float]:
        """The weight of every error, by its name."""
        weights = {name: term.weight for name, term in self.terms.items()}
        if self.visible_weight > 0.0:
            seen = {name: weight for name, weight in weights.items() if not name.endswith(SUMMARY)}
            weights |= {name + _VISIBLE: self.visible_weight * weight for name, weight in seen.items()}
        return weights

    def _total(self, errors: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([weight * errors[name] for name, weight in self._weights.items()]).sum()

    def _asked(self, mask_T: Tensor, images: PackedImages) -> Tensor:
        """Return the tokens [M] int64 that the targets are of, in their order: the masked ones, or all of the images."""
        if self.visible_weight == 0.0:
            return rows_of(mask_T, images, self.mask_ratio)
        return rows_of(images.segment() < images.num_slots, images, 1.0)

    def _shares(
        self, micro: Sequence[Batch], masks: Sequence[Tensor], rows: Sequence[Tensor], schedule: Schedule
    ) -> _Shares:
        """Count what the global batch has. Collective over the data-parallel ranks."""
        weights = [token_weight(batch.images)[rows_M] for batch, rows_M in zip(micro, rows, strict=True)]
        counts = [weight_M.sum() for weight_M in weights]
        if self.visible_weight > 0.0:
            chosen = [mask_T[rows_M] for mask_T, rows_M in zip(masks, rows, strict=True)]
            counts = [(weight_M * chosen_M).sum() for weight_M, chosen_M in zip(weights, chosen, strict=True)]
        num_masked = sum_over_data(torch.stack(counts).sum(), schedule).clamp(min=1.0)
        num_visible = num_images = num_masked
        if self.visible_weight > 0.0:
            counts = [(weight_M * ~chosen_M).sum() for weight_M, chosen_M in zip(weights, chosen, strict=True)]
            num_visible = sum_over_data(torch.stack(counts).sum(), schedule).clamp(min=1.0)
        if any(name.endswith(SUMMARY) for name in self.terms):
            local = torch.stack([batch.images.weight.sum() for batch in micro]).sum()
            num_images = sum_over_data(local, schedule).clamp(min=1.0)
        return _Shares(num_masked, num_visible, num_images)

    def _errors(
        self,
        model: DistillModel,
        features: PackedFeatures,
        batch: Batch,
        mask_T: Tensor,
        rows_M: Tensor,
        shares: _Shares,
    ) -> dict[str, Tensor]:
        """Return this microbatch's part of every error."""
        targets, images = batch.targets, batch.images
        assert targets is not None, "stage 1 needs teacher targets"
        x_MD, weight_M = features.patch_TD[rows_M].float(), token_weight(images)[rows_M]
        errors = {}
        for name, term in self.terms.items():
            target = targets.features[name]
            if name.endswith(SUMMARY):
                present = present_slots(images)
                error_N = model.error(name, term.error, summary(features, images)[present], target)
                errors[name] = (error_N * images.weight[present]).sum() / shares.num_images
                continue
            error_M = model.error(name, term.error, x_MD, target) * weight_M
            if self.visible_weight == 0.0:
                errors[name] = error_M.sum() / shares.num_masked
                continue
            chosen_M = mask_T[rows_M]
            errors[name] = (error_M * chosen_M).sum() / shares.num_masked
            errors[name + _VISIBLE] = (error_M * ~chosen_M).sum() / shares.num_visible
        return errors


@dataclass(frozen=True)
class _Shares:
    """What the errors of a step are means over, on all ranks together; 0-dim tensors of at least 1."""

    num_masked: Tensor
    num_visible: Tensor
    num_images: Tensor


def token_weight(images: PackedImages) -> Tensor:
    """[T] the weight of the image that a patch belongs to; 0 for padding."""
    return torch.cat([images.weight, images.weight.new_zeros(1)])[images.segment()]


def present_slots(images: PackedImages) -> Tensor:
    """Return the slots [n] int64 that hold an image."""
    present_N = images.grid_hw[:, 0] > 0
    if images.host is None:
        return present_N.nonzero().squeeze(1)
    return torch.nonzero_static(present_N, size=sum(rows > 0 for rows, _ in images.host.grids)).squeeze(1)


def summary(features: PackedFeatures, images: PackedImages) -> Tensor:
    """[N, D] what the student says of each image as a whole: its CLS token, else the mean of its patches."""
    if features.cls_ND is not None:
        return features.cls_ND.float()
    return pool_mean(features.patch_TD, images.segment(), images.num_slots)


def sum_over_data(value: Tensor, schedule: Schedule) -> Tensor:
    """Sum a local scalar over the dp ranks; every tensor and pipeline rank of a replica brings the same value."""
    mesh = schedule.mesh
    total = value.reshape(1).clone()
    torch.distributed.all_reduce(total, group=mesh.dp_group)
    return total[0]


def reduce_terms(local: Tensor, schedule: Schedule) -> Tensor:
    """Sum the last stage's loss shares over dp and hand them to every rank."""
    mesh = schedule.mesh
    counted = local if mesh.is_last_stage and mesh.tp_rank == 0 else torch.zeros_like(local)
    return mesh.all_reduce(counted.clone())

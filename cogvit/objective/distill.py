"""Stage 1: regress the frozen teachers' features at the masked patches.

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
        masked = [rows_of(m, b.images, self.mask_ratio) for b, m in zip(micro, masks, strict=True)]
        weights = [
            torch.cat([b.images.weight, b.images.weight.new_zeros(1)])[b.images.segment()[rows_M]]
            for b, rows_M in zip(micro, masked, strict=True)
        ]
        num_tokens = sum_over_data(torch.stack([weight_M.sum() for weight_M in weights]).sum(), schedule).clamp(min=1.0)
        num_images = num_tokens
        if any(name.endswith(SUMMARY) for name in self.terms):
            local = torch.stack([batch.images.weight.sum() for batch in micro]).sum()
            num_images = sum_over_data(local, schedule).clamp(min=1.0)

        def forward(index: int) -> Tensor | PackedFeatures:
            return model.vision(micro[index].images, masks[index])

        def loss(features: PackedFeatures, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            targets = micro[index].targets
            assert targets is not None, "stage 1 needs teacher targets"
            images, x_MD = micro[index].images, features.patch_TD[masked[index]].float()
            errors = {}
            for name, term in self.terms.items():
                if name.endswith(SUMMARY):
                    present = present_slots(images)
                    x_ND = summary(features, images)[present]
                    error_N = model.error(name, term.error, x_ND, targets.features[name])
                    errors[name] = (error_N * images.weight[present]).sum() / num_images
                else:
                    error_M = model.error(name, term.error, x_MD, targets.features[name])
                    errors[name] = (error_M * weights[index]).sum() / num_tokens
            return self._total(errors), {name: error.detach() for name, error in errors.items()}

        if train:
            reports = schedule.forward_backward(model.vision.trunk, forward, len(micro), loss)
        else:
            reports = schedule.forward_only(
                model.vision.trunk, forward, len(micro), lambda out, index: loss(out, index)[1]
            )
        zero = torch.zeros((), device=mesh.device)
        local = torch.stack([sum((report[name] for report in reports), zero) for name in self.terms])
        errors = dict(zip(self.terms, reduce_terms(local, schedule), strict=True))
        return {"loss": self._total(errors)} | {f"loss_{name}": error for name, error in errors.items()}

    def _total(self, errors: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.terms[name].weight * error for name, error in errors.items()]).sum()


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

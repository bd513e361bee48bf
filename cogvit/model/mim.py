"""Stage 1 in plain PyTorch: masked regression of frozen teachers' features (the reference's classes)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvit.model.packing import Grid
from cogvit.model.vit import CogViT


class TeacherWrapper(nn.Module):
    """A frozen teacher whose features are brought to the student's grid.

    Args:
        model: maps images to features [B, N, C]; its parameters are frozen and it stays in eval mode.
        feature_dim: C.
        out_grid: the teacher's own grid; None where it is the student's.
        preprocess: applied to the images before the teacher (its own size and normalization).
        feature_mean: [C], subtracted from the features.
        feature_std: [C], divides the features.
        patch_size: of the teacher, in px. In training by `cogvit.train` an image of the student's grid reaches the
            teacher at grid * patch_size px, or at out_grid * patch_size px where it has a grid of its own.

    Errors: ValueError when the mean or deviation is not [C] or the patch size is below 1.
    """

    feature_mean: Tensor | None
    feature_std: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        feature_dim: int,
        out_grid: Grid | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        feature_mean: Tensor | None = None,
        feature_std: Tensor | None = None,
        patch_size: int = 16,
    ) -> None:
        """Freeze a teacher."""
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size} must be at least 1")
        self.model = model.requires_grad_(False)
        self.feature_dim, self.out_grid, self.preprocess = feature_dim, out_grid, preprocess
        self.patch_size = patch_size
        for name, given in (("feature_mean", feature_mean), ("feature_std", feature_std)):
            if given is not None and given.shape != (feature_dim,):
                raise ValueError(f"{name} has shape {tuple(given.shape)}; expected ({feature_dim},)")
        self.register_buffer("feature_mean", feature_mean)
        self.register_buffer("feature_std", feature_std)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a teacher is never trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor, target_grid: Grid) -> Tensor:
        """Return features of images [B, 3, H, W] at a target grid, [B, rows * columns, C].

        Errors: ValueError when the teacher's output is not [B, N, C] on its grid.
        """
        features = self.model(x if self.preprocess is None else self.preprocess(x))
        rows, columns = out_grid = target_grid if self.out_grid is None else self.out_grid
        expected = (len(x), rows * columns, self.feature_dim)
        if features.shape != expected:
            raise ValueError(f"the teacher gave features of shape {tuple(features.shape)}; expected {expected}")
        if out_grid != target_grid:
            image = rearrange(features, "b (rows columns) c -> b c rows columns", rows=rows)
            image = F.interpolate(image, size=target_grid, mode="bicubic", align_corners=False)
            features = rearrange(image, "b c rows columns -> b (rows columns) c")
        if self.feature_mean is not None:
            features = features - self.feature_mean
        return features if self.feature_std is None else features / self.feature_std


def draw_mask(valid_BN: Tensor, ratio: float) -> Tensor:
    """Choose round(ratio * n), at least one, of each image's n valid patches by torch's generator; bool [B, N]."""
    noise = torch.rand(valid_BN.shape, device=valid_BN.device).masked_fill(~valid_BN, torch.inf)
    quota_B1 = (valid_BN.sum(1, keepdim=True) * ratio + 0.5).long().clamp(min=1)
    return noise.argsort(dim=1).argsort(dim=1) < quota_B1


class CogViTForMIM(nn.Module):
    """The student with one linear head per frozen teacher.

    The teachers follow `.to()` but are no submodules: training mode, gradients and state dicts never reach them, and
    teacher weights in a reference checkpoint are skipped.

    Args:
        encoder: the student.
        teachers: by name.
        mask_ratio: share of each image's patches that is masked.
        loss_weights: by teacher; 1 where not given.

    Errors: ValueError when the ratio is outside (0, 1), there is no teacher or a name is unknown, reserved or dotted.
    """

    def __init__(
        self,
        encoder: CogViT,
        teachers: Mapping[str, TeacherWrapper],
        mask_ratio: float = 0.35,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Put new heads on a student, one for each teacher."""
        super().__init__()
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"mask_ratio={mask_ratio} must be in (0, 1)")
        if not teachers:
            raise ValueError("at least one teacher is required")
        weights = dict(loss_weights or {})
        if dotted := [name for name in teachers if "." in name]:
            raise ValueError(f"teacher name {dotted[0]!r} has a dot, as names of parameters; choose another")
        if reserved := {"total", "mask"} & set(teachers):
            raise ValueError(f"teacher name {sorted(reserved)[0]!r} is taken by the output; choose another")
        if unknown := set(weights) - set(teachers):
            raise ValueError(f"loss_weights names {sorted(unknown)[0]!r}; the teachers are {sorted(teachers)}")
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.loss_weights = {name: weights.get(name, 1.0) for name in teachers}
        self.heads = nn.ModuleDict(
            {name: nn.Linear(encoder.cfg.embed_dim, teacher.feature_dim) for name, teacher in teachers.items()}
        )
        self.teachers = dict(teachers)
        self.register_load_state_dict_pre_hook(_drop_teacher_weights)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for teacher in self.teachers.values():
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @staticmethod
    def random_mask(B: int, N: int, ratio: float, device: torch.device) -> Tensor:
        """Return a bool mask [B, N] with the same number of masked patches in each row."""
        return draw_mask(torch.ones(B, N, dtype=torch.bool, device=device), ratio)

    def forward(self, x: Tensor, valid_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return each teacher's Smooth-L1 loss at masked patches, their weighted sum "total" and the "mask" [B, N].

        Args:
            x: images [B, 3, H, W] of any grid; uint8 is brought to [-1, 1].
            valid_mask: bool [B, N]; padding is neither masked nor seen.

        Errors: ValueError when these are no images, the patch does not divide them or the mask is not [B, N].
        """
        if x.ndim != 4:
            raise ValueError(
                f"the input has shape {tuple(x.shape)}; expected images (B, 3, H, W), which teachers can see. Sequences"
                " are what naflex_collate makes of wide images beside tall ones: collate those apart"
            )
        x = x / 127.5 - 1.0 if x.dtype == torch.uint8 else x
        patch_size = self.encoder.cfg.patch_size
        grid = x.shape[2] // patch_size, x.shape[3] // patch_size
        valid = x.new_ones(len(x), grid[0] * grid[1], dtype=torch.bool) if valid_mask is None else valid_mask.bool()
        if valid.shape != (len(x), grid[0] * grid[1]):
            raise ValueError(f"valid_mask has shape {tuple(valid.shape)}; expected {(len(x), grid[0] * grid[1])}")
        mask = draw_mask(valid, self.mask_ratio)
        student = self.encoder(x, mask=mask, valid_mask=None if valid_mask is None else valid)["patch_tokens"][mask]
        losses = {
            name: F.smooth_l1_loss(self.heads[name](student), teacher(x, target_grid=grid)[mask])
            for name, teacher in self.teachers.items()
        }
        total = torch.stack([self.loss_weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "total": total, "mask": mask}


def _drop_teacher_weights(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}teachers.")]:
        del state_dict[name]

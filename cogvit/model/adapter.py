"""From vision tokens to a language model: the adapters and the splice at the image placeholders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cogvit.model.config import AdapterConfig, AdapterKind
from cogvit.model.glm_ocr import adapter_to_glm_ocr, shape_of, tower_to_glm_ocr
from cogvit.model.interop import load_checked, read_glm_adapter, write_glm_ocr
from cogvit.model.language_config import LanguageShape
from cogvit.model.packing import Grid
from cogvit.model.vit import CogViT


class PatchGroups(nn.Module, ABC):
    """Merges s x s neighboring patches into one vector and projects it: what the adapters share.

    Args:
        vision_dim: D of the patch tokens.
        llm_dim: width of the language model.
        spatial_pool: s; 1 keeps every patch.

    Errors: ValueError when a size is below 1.
    """

    fc2: nn.Linear  # the last layer of every kind

    def __init__(self, vision_dim: int, llm_dim: int, spatial_pool: int) -> None:
        super().__init__()
        sizes = {"vision_dim": vision_dim, "llm_dim": llm_dim, "spatial_pool": spatial_pool}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.vision_dim, self.llm_dim, self.spatial_pool = vision_dim, llm_dim, spatial_pool

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Return [..., llm_dim] of the patches of each group side by side, [..., s * s * D]."""

    def forward(self, patch_tokens: Tensor, grid: Grid | list[Grid], valid_mask: Tensor | None = None) -> Tensor:
        """Return visual embeddings [B, V, llm_dim]; V = ceil(rows / s) * ceil(columns / s) of the largest grid.

        Patches outside the grid (odd grids) or not valid count as zeros in their group; a group without a valid patch
        gives zero and is false in `valid_groups`.

        Args:
            patch_tokens: [B, N, D].
            grid: rows and columns of the batch, or a list of each image's for sequences, as in the encoder's output.
            valid_mask: bool [B, N], as given to the encoder.

        Errors: ValueError when the tokens are not [B, N, D], the grid is not that of N or the mask is not [B, N].
        """
        x, present_BV1 = self._merge(patch_tokens, grid, valid_mask)
        return self.project(x) * present_BV1.to(x.dtype)

    def forward_packed(self, patch_TD: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the visual embeddings of a pack's images end to end, [E, llm_dim], each as `forward` gives it alone.

        Args:
            patch_TD: of the images in their order; rows behind the last image are left out.
            grids: rows and columns of patches of each image, (0, 0) where absent.

        Errors: ValueError when the tokens are not [T, D] or fewer than the grids say.
        """
        starts = [0, *accumulate(rows * columns for rows, columns in grids)]
        if patch_TD.ndim != 2 or patch_TD.shape[1] != self.vision_dim or len(patch_TD) < starts[-1]:
            shape = tuple(patch_TD.shape)
            raise ValueError(f"patch tokens have shape {shape}; expected ({starts[-1]} or more, {self.vision_dim})")
        absent = len(patch_TD)
        groups = [torch.zeros(0, self.spatial_pool**2, dtype=torch.int64)]
        for grid, start in zip(grids, starts, strict=False):
            if grid[0] and grid[1]:
                index = _groups(grid, self.spatial_pool, absent)
                groups.append(torch.where(index == absent, absent, index + start))
        index = torch.cat(groups)
        if patch_TD.is_cuda:
            index = index.pin_memory()  # so that the host need not wait for the device
        return self.project(F.pad(patch_TD, (0, 0, 0, 1))[index.to(patch_TD.device, non_blocking=True)].flatten(1))

    def valid_groups(self, patch_tokens: Tensor, grid: Grid | list[Grid], valid_mask: Tensor | None = None) -> Tensor:
        """Return which of the V embeddings of `forward` hold a valid patch, bool [B, V]; the arguments are the same."""
        return (self._group_index(patch_tokens, grid, valid_mask) < patch_tokens.shape[1]).any(2)

    def _merge(self, patch_tokens: Tensor, grid: Grid | list[Grid], valid_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The groups' patches side by side, [B, V, s * s * D], and which groups have any, bool [B, V, 1]."""
        if patch_tokens.ndim != 3 or patch_tokens.shape[2] != self.vision_dim:
            raise ValueError(f"patch tokens have shape {tuple(patch_tokens.shape)}; expected (B, N, {self.vision_dim})")
        index_BVG = self._group_index(patch_tokens, grid, valid_mask)
        padded = F.pad(patch_tokens, (0, 0, 0, 1))  # one zero token that absent patches point at
        image_B11 = torch.arange(len(padded), device=padded.device)[:, None, None]
        present_BV1 = (index_BVG < patch_tokens.shape[1]).any(2, keepdim=True)
        return rearrange(padded[image_B11, index_BVG], "b v g d -> b v (g d)"), present_BV1

    def _group_index(self, patch_tokens: Tensor, grid: Grid | list[Grid], valid_mask: Tensor | None) -> Tensor:
        """[B, V, s * s] int64: the patch in each place of each group; N where there is none."""
        batch, num_tokens = patch_tokens.shape[:2]
        if valid_mask is not None and valid_mask.shape != (batch, num_tokens):
            raise ValueError(f"valid_mask has shape {tuple(valid_mask.shape)}; expected {(batch, num_tokens)}")
        if isinstance(grid, list):
            if len(grid) != batch or any(rows * columns > num_tokens for rows, columns in grid):
                raise ValueError(f"grids {grid} do not match {batch} images of up to {num_tokens} patch tokens")
            groups = [_groups(each, self.spatial_pool, num_tokens) for each in grid]
            index_BVG = pad_sequence(groups, batch_first=True, padding_value=num_tokens)
        else:
            if grid[0] * grid[1] != num_tokens:
                raise ValueError(f"grid {grid} does not match the {num_tokens} patch tokens of an image")
            index_BVG = _groups(grid, self.spatial_pool, num_tokens).expand(batch, -1, -1)
        index_BVG = index_BVG.to(patch_tokens.device)
        if valid_mask is None:
            return index_BVG
        valid = F.pad(valid_mask.bool(), (0, 1))
        present = valid.gather(1, index_BVG.flatten(1)).view_as(index_BVG)
        return torch.where(present, index_BVG, num_tokens)


class MLPAdapter(PatchGroups):
    """Merges s x s neighboring patches by pixel shuffle and maps them to the language model's width by a two-layer MLP.

    Args:
        vision_dim: D of the patch tokens.
        llm_dim: width of the language model.
        hidden_dim: of the MLP; llm_dim if None.
        spatial_pool: s; 1 keeps every patch.

    Errors: ValueError when spatial_pool is below 1.
    """

    def __init__(self, vision_dim: int, llm_dim: int, hidden_dim: int | None = None, spatial_pool: int = 1) -> None:
        """Build an adapter with new weights."""
        super().__init__(vision_dim, llm_dim, spatial_pool)
        hidden_dim = llm_dim if hidden_dim is None else hidden_dim
        self.fc1 = nn.Linear(vision_dim * spatial_pool**2, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, llm_dim)

    def project(self, x: Tensor) -> Tensor:
        """Return [..., llm_dim] of the patches of each group side by side, [..., s * s * D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class GlmAdapter(PatchGroups):
    """The merger of GLM-OCR: a strided convolution, a projection with norm and GELU, and a SwiGLU MLP.

    Args:
        vision_dim: D of the patch tokens.
        llm_dim: width of the language model.
        hidden_dim: of the MLP; 3 * llm_dim if None, as in GLM-OCR.
        spatial_pool: s, side of the convolution.

    Errors: ValueError when spatial_pool is below 1.
    Source: GlmOcrVisionPatchMerger of transformers.
    """

    def __init__(self, vision_dim: int, llm_dim: int, hidden_dim: int | None = None, spatial_pool: int = 2) -> None:
        """Build an adapter with new weights."""
        super().__init__(vision_dim, llm_dim, spatial_pool)
        hidden_dim = 3 * llm_dim if hidden_dim is None else hidden_dim
        self.downsample = nn.Linear(vision_dim * spatial_pool**2, llm_dim)
        self.proj = nn.Linear(llm_dim, llm_dim, bias=False)
        self.norm = nn.LayerNorm(llm_dim)
        self.fc1 = nn.Linear(llm_dim, 2 * hidden_dim, bias=False)  # rows are [gate; up]
        self.fc2 = nn.Linear(hidden_dim, llm_dim, bias=False)

    def project(self, x: Tensor) -> Tensor:
        """Return [..., llm_dim] of the patches of each group side by side, [..., s * s * D]."""
        x = F.gelu(self.norm(self.proj(self.downsample(x))))
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GlmAdapter:
        """Read the merger of a GLM-OCR checkpoint, or of what `save_glm_ocr` wrote.

        Errors: CheckpointError when a file is missing or damaged, or names every missing, extra or misshaped weight.
        """
        shape, weights = read_glm_adapter(Path(directory))
        hidden_dim = shape.out_hidden_size * shape.in_channels
        adapter = cls(shape.hidden_size, shape.out_hidden_size, hidden_dim, shape.spatial_merge_size)
        load_checked(adapter, weights)
        return adapter


class SwiGLUAdapter(PatchGroups):
    """The projection of CogVLM: a linear map to the language model's width, norm and GELU, and a SwiGLU MLP.

    Args:
        vision_dim: D of the patch tokens.
        llm_dim: width of the language model.
        hidden_dim: of the MLP, the language model's own in CogVLM; 3 * llm_dim if None.
        spatial_pool: s; above 1 the patches of a group lie side by side before the map.

    Errors: ValueError when a size is below 1.
    Source: GLU of CogVLM's modeling_cogvlm.py (arXiv 2311.03079).
    """

    def __init__(self, vision_dim: int, llm_dim: int, hidden_dim: int | None = None, spatial_pool: int = 1) -> None:
        """Build an adapter with new weights."""
        super().__init__(vision_dim, llm_dim, spatial_pool)
        hidden_dim = 3 * llm_dim if hidden_dim is None else hidden_dim
        self.proj = nn.Linear(self._proj_dim(), llm_dim, bias=False)
        self.norm = nn.LayerNorm(llm_dim)
        self.fc1 = nn.Linear(llm_dim, 2 * hidden_dim, bias=False)  # rows are [gate; up]
        self.fc2 = nn.Linear(hidden_dim, llm_dim, bias=False)

    def _proj_dim(self) -> int:
        return self.vision_dim * self.spatial_pool**2

    def project(self, x: Tensor) -> Tensor:
        """Return [..., llm_dim] of the patches of each group side by side, [..., s * s * D]."""
        gate, up = self.fc1(F.gelu(self.norm(self.proj(x)))).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)


class ConvAdapter(SwiGLUAdapter):
    """The projection of CogVLM2: an s x s convolution of stride s in the vision width, then CogVLM's projection.

    The arguments are those of `SwiGLUAdapter`; s is 2 by default.

    Errors: ValueError when a size is below 1.
    Source: EVA2CLIPModel of CogVLM2's visual.py (arXiv 2408.16500).
    """

    def __init__(self, vision_dim: int, llm_dim: int, hidden_dim: int | None = None, spatial_pool: int = 2) -> None:
        """Build an adapter with new weights."""
        super().__init__(vision_dim, llm_dim, hidden_dim, spatial_pool)
        self.downsample = nn.Linear(vision_dim * spatial_pool**2, vision_dim)

    def _proj_dim(self) -> int:
        return self.vision_dim

    def project(self, x: Tensor) -> Tensor:
        """Return [..., llm_dim] of the patches of each group side by side, [..., s * s * D]."""
        return super().project(self.downsample(x))


class WideConvAdapter(SwiGLUAdapter):
    """The projection of GLM-4V-9B: an s x s convolution of stride s to the language width, then CogVLM's projection.

    The arguments are those of `ConvAdapter`.

    Errors: ValueError when a size is below 1.
    Source: EVA2CLIPModel of GLM-4V-9B's visual.py.
    """

    def __init__(self, vision_dim: int, llm_dim: int, hidden_dim: int | None = None, spatial_pool: int = 2) -> None:
        """Build an adapter with new weights."""
        super().__init__(vision_dim, llm_dim, hidden_dim, spatial_pool)
        self.downsample = nn.Linear(vision_dim * spatial_pool**2, llm_dim)

    def _proj_dim(self) -> int:
        return self.llm_dim

    def project(self, x: Tensor) -> Tensor:
        """Return [..., llm_dim] of the patches of each group side by side, [..., s * s * D]."""
        return super().project(self.downsample(x))


_KINDS: dict[AdapterKind, type[MLPAdapter | GlmAdapter | SwiGLUAdapter]] = {
    "mlp": MLPAdapter,
    "glm": GlmAdapter,
    "swiglu": SwiGLUAdapter,
    "conv": ConvAdapter,
    "wide_conv": WideConvAdapter,
}


def make_adapter(cfg: AdapterConfig, vision_dim: int, llm_dim: int) -> PatchGroups:
    """Return the adapter that a configuration asks for, with new weights."""
    return _KINDS[cfg.kind](vision_dim, llm_dim, cfg.hidden_dim, cfg.spatial_pool)


def fitted_adapter(cfg: AdapterConfig, vision_dim: int, language: LanguageShape) -> PatchGroups:
    """Return a new adapter before a language model, whose MLP width the CogVLM family's have by default."""
    if cfg.hidden_dim is None and cfg.kind in ("swiglu", "conv", "wide_conv"):
        cfg = replace(cfg, hidden_dim=language.mlp_dim)
    return make_adapter(cfg, vision_dim, language.embed_dim)


def adapter_config(adapter: PatchGroups) -> AdapterConfig:
    """Return the configuration from which `make_adapter` builds the same."""
    kind = next(kind for kind, made in _KINDS.items() if made is type(adapter))
    return AdapterConfig(kind, adapter.fc2.in_features, adapter.spatial_pool)


def save_glm_ocr(
    directory: str | Path,
    vision: CogViT,
    adapter: GlmAdapter | None = None,
    *,
    family: Literal["glm_ocr", "glm5_next"] = "glm_ocr",
) -> None:
    """Write an encoder of the `cogvit_l` family, and its adapter, for transformers' GlmOcrVisionModel.from_pretrained.

    family glm5_next writes for Glm5NextVisionModel, whose tower is the same.

    `CogViT.from_pretrained` and `GlmAdapter.from_pretrained` read the directory too. Without an adapter transformers
    starts a new merger and says so. The mask token is left out.

    Errors: CheckpointError names every option of the encoder that GLM-OCR does not have, or the adapter's shape.
    """
    shape, merger = shape_of(vision.cfg), {}
    if adapter is not None:
        shape = replace(shape, out_hidden_size=adapter.llm_dim, spatial_merge_size=adapter.spatial_pool)
        merger = adapter_to_glm_ocr(adapter.state_dict(), shape)
    tensors = {**tower_to_glm_ocr(vision.state_dict(), shape), **merger}
    write_glm_ocr(Path(directory), shape, tensors, vision.preprocessing, family)


def _groups(grid: Grid, pool: int, absent: int) -> Tensor:
    """[V, s * s]: patches of each s x s group of one grid, groups and patches in raster order."""
    rows, columns = grid
    index = torch.arange(rows * columns).view(rows, columns)
    index = F.pad(index, (0, -columns % pool, 0, -rows % pool), value=absent)
    return rearrange(index, "(rows p) (columns q) -> (rows columns) (p q)", p=pool, q=pool)


def insert_visual_tokens_mmtp(
    text_embeds: Tensor,
    visual_embeds: Tensor | Sequence[Tensor],
    image_token_id: int,
    input_ids: Tensor,
    visual_mask: Tensor | None = None,
) -> Tensor:
    """Return text_embeds with the visual embeddings at the `<|image|>` placeholders, in reading order, [B, T, D].

    input_ids stays as it is: the multi-token-prediction heads see the shared placeholder token (paper section 2.2,
    Figure 2, option 3). Rows without a placeholder take no embedding.

    Args:
        text_embeds: [B, T, D].
        visual_embeds: [B, V, D], each row with an image having V placeholders; or one [V_b, D] for each row.
        image_token_id: of the placeholder.
        input_ids: [B, T].
        visual_mask: bool [B, V], which embeddings of a row are real (`MLPAdapter.valid_groups`); all if None.

    Errors: ValueError when shapes differ or a row's placeholders are not as many as its embeddings.
    """
    if text_embeds.shape[:2] != input_ids.shape:
        raise ValueError(
            f"text_embeds {tuple(text_embeds.shape)} and input_ids {tuple(input_ids.shape)} must share (B, T)"
        )
    if len(visual_embeds) != len(input_ids):
        raise ValueError(
            f"visual_embeds has {len(visual_embeds)} rows; expected {len(input_ids)}, one for each of input_ids"
        )
    rows, width = list(visual_embeds), text_embeds.shape[2]
    if any(row.ndim != 2 or row.shape[1] != width for row in rows):
        raise ValueError(f"visual_embeds are {[tuple(row.shape) for row in rows]}; expected (V, {width}) for each row")
    if visual_mask is not None:
        if [len(real) for real in visual_mask] != [len(row) for row in rows]:
            raise ValueError(f"visual_mask has shape {tuple(visual_mask.shape)}; expected one value for each embedding")
        rows = [row[real] for row, real in zip(rows, visual_mask.bool(), strict=True)]
    placeholder = input_ids == image_token_id
    counts = placeholder.sum(dim=1).tolist()
    sizes = [len(row) for row in rows]
    if any(count not in (0, size) for count, size in zip(counts, sizes, strict=True)):
        raise ValueError(
            f"rows have {counts} <|image|> placeholders for {sizes} visual embeddings; give each row as many as it has"
            " placeholders (a list of tensors, or visual_mask)"
        )
    visual = torch.cat(
        [row for row, count in zip(rows, counts, strict=True) if count] or [text_embeds.flatten(0, 1)[:0]]
    )
    return text_embeds.masked_scatter(placeholder.unsqueeze(-1), visual.to(text_embeds.dtype))

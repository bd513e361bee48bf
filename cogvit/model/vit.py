"""CogViT: the vision encoder, on packs of images and on the reference's dense batches.

A dense batch is a pack too: padding patches are left out, so there is one path and no image can see its neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvit.batch import PackedImages, to_device
from cogvit.model.attention import segments_of
from cogvit.model.blocks import Block, make_norm, random_keys, run_blocks
from cogvit.model.config import CogViTConfig
from cogvit.model.hub import dtype_of, local_directory, push_directory
from cogvit.model.images import ImageLike
from cogvit.model.init import init_model
from cogvit.model.interop import load_checked, read_model, read_processing, write_model
from cogvit.model.packing import Grid, pack_batch
from cogvit.model.position import PositionTable, resized_table, rotary_2d
from cogvit.model.preprocess import EncodedImages, Preprocessing, default_preprocessing, image_packs
from cogvit.model.tokens import PackedFeatures, PackedLayout, PackedTokens, pool_mean, token_order

_POSITIONS = "pos_embed.embed"  # the name of a learned position table


def vision_layout(images: PackedImages, cfg: CogViTConfig) -> PackedLayout:
    """Return the layout of a pack's S tokens: S = T, or T + N where the tower has a CLS token (first in each image)."""
    slot_S, row_col_S2 = images.segment(), images.row_col
    if cfg.use_cls_token:
        num_slots = images.num_slots
        present_N = images.cu_seqlens[:-1].diff() > 0
        slot_N = torch.where(present_N, torch.arange(num_slots, device=slot_S.device), num_slots)
        slot_S = torch.cat([slot_S, slot_N])
        row_col_S2 = F.pad(row_col_S2, (0, 0, 0, num_slots))
    order = token_order(segments_of(images.cu_seqlens, images.host), cls=cfg.use_cls_token)
    cos_SK = sin_SK = None
    if cfg.position == "rotary":
        cos_SK, sin_SK = rotary_2d(order.arrange(row_col_S2), cfg.head_dim)
    return PackedLayout(order, cos_SK, sin_SK, order.arrange(slot_S), images.key)


def grids_of(images: PackedImages) -> tuple[Grid, ...]:
    """Return rows and columns of each slot; waits for the device where the host does not know them."""
    if images.host is not None:
        return images.host.grids
    return tuple((rows, columns) for rows, columns in images.grid_hw.tolist())


def split_packed(x_SD: Tensor, layout: PackedLayout, num_tokens: int) -> PackedFeatures:
    """Return a tower's tokens to their pack's order: its num_tokens patches, and CLS tokens by slot."""
    x_SD = layout.order.restore(x_SD)
    return PackedFeatures(x_SD[:num_tokens], x_SD[num_tokens:] if len(x_SD) > num_tokens else None)


class PatchEmbed(nn.Module):
    """One linear map of each P x P patch, kept as the strided convolution of the reference's checkpoints."""

    def __init__(self, cfg: CogViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(cfg.in_chans, cfg.embed_dim, kernel_size=cfg.patch_size, stride=cfg.patch_size)

    def forward(self, patches_TE: Tensor) -> Tensor:
        """Embed channel-major patches [T, C * P * P] to [T, D]; uint8 is normalized to [-1, 1] first.

        Floats may be of any precision; they become the weights'.
        """
        x_TE = patches_TE.to(self.proj.weight.dtype)
        if patches_TE.dtype == torch.uint8:
            x_TE = x_TE / 127.5 - 1.0
        return F.linear(x_TE, self.proj.weight.flatten(1), self.proj.bias)


class VisionEmbedding(nn.Module):
    """What the vision tower has outside its blocks."""

    def __init__(self, cfg: CogViTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.pos_embed = PositionTable(cfg.embed_dim, cfg.base_grid) if cfg.position == "learned" else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim)) if cfg.use_cls_token else None
        self.norm = nn.Identity() if cfg.norm_after else make_norm(cfg, cfg.embed_dim)

    def embed_packed(self, images: PackedImages, mask_T: Tensor | None = None) -> PackedTokens:
        """Embed a pack; patches where the bool mask [T] is true become the mask token before positions are added."""
        layout = vision_layout(images, self.cfg)
        # Under autocast the patches come out in bf16, but the residual stream is fp32.
        x_SD = self.patch_embed(images.patches).to(self.mask_token.dtype)
        if mask_T is not None:
            x_SD = torch.where(mask_T.unsqueeze(1), self.mask_token[0], x_SD)
        if self.pos_embed is not None:
            x_SD = x_SD + self.pos_embed(grids_of(images), images.row_col, images.segment())
        if self.cls_token is not None:
            x_SD = torch.cat([x_SD, self.cls_token[0].expand(images.num_slots, -1)])
        x_SD = layout.order.arrange(x_SD)
        return PackedTokens(layout.order, layout.cos_SK, layout.sin_SK, layout.slot_S, layout.key_N, x_SD)


class EncoderOutput(TypedDict):
    """What the encoder returns for a dense batch."""

    patch_tokens: Tensor  # [B, N, D], zeros at padding
    cls_token: Tensor | None  # [B, D]
    grid: Grid | list[Grid]  # rows and columns of the batch; of each image for a batch of sequences


class CogViT(VisionEmbedding):
    """The CogViT vision encoder (arXiv 2604.26752, section 2.1); names and state-dict keys are the reference build's.

    Initial weights follow torch's default generator (`torch.manual_seed`).

    Attributes:
        cfg: the shape and options that it was built with.
        preprocessing: how `encode` prepares images.
        recompute: set it to compute each block again in the backward pass instead of keeping its activations.
    """

    def __init__(self, cfg: CogViTConfig) -> None:
        """Build an encoder with new weights."""
        super().__init__(cfg)
        self.recompute = False
        self.preprocessing: Preprocessing = default_preprocessing(cfg)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        init_model(self, int(torch.randint(2**62, (), device="cpu")), layer_scale=cfg.layer_scale_init)

    def forward_packed(self, images: PackedImages, mask_T: Tensor | None = None) -> PackedFeatures:
        """Encode a pack; its features are those of its images one by one.

        Args:
            images: the pack, as `naflex_pack` makes it.
            mask_T: bool [T], true where a patch is replaced by the mask token.

        Errors: ValueError when the patches are not [T, C * P * P] of uint8 or floats, or the mask is not [T].
        """
        patch_dim = self.patch_embed.proj.weight[0].numel()
        if images.patches.shape[1:] != (patch_dim,):
            raise ValueError(f"patches have shape {tuple(images.patches.shape)}; expected (T, {patch_dim})")
        if not (images.patches.dtype == torch.uint8 or images.patches.is_floating_point()):
            raise ValueError(f"patches are {images.patches.dtype}; expected torch.uint8 or floats")
        if mask_T is not None and (mask_T.shape != (images.num_tokens,) or mask_T.dtype != torch.bool):
            raise ValueError(
                f"mask is {mask_T.dtype} of shape {tuple(mask_T.shape)}; expected torch.bool of ({images.num_tokens},)"
            )
        tokens = self.embed_packed(images, mask_T)
        x_SD = run_blocks(self.blocks, tokens, self.recompute and torch.is_grad_enabled())
        return split_packed(self.norm(x_SD), tokens, images.num_tokens)

    def forward(self, x: Tensor, mask: Tensor | None = None, valid_mask: Tensor | None = None) -> EncoderOutput:
        """Encode a dense batch; padding is left out, so an image's features do not depend on its batch.

        Args:
            x: images [B, C, H, W], both sides multiples of the patch; or the sequences of `naflex_collate`.
            mask: bool [B, N], true where a patch is replaced by the mask token.
            valid_mask: bool [B, N], true where a patch belongs to its image; its grid is the smallest that holds them.

        Returns a dict: "patch_tokens" [B, N, D], zeros at padding; "cls_token" [B, D] or None; "grid", rows and columns
        of the batch, or a list of each image's for sequences.

        Errors: ValueError when a shape is wrong or an image has no valid patch. What is not finite comes out so.
        """
        grid, num_patches = self._check_batch(x)
        for name, given in (("mask", mask), ("valid_mask", valid_mask)):
            if given is not None and given.shape != (len(x), num_patches):
                raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {(len(x), num_patches)}")
        valid = None if valid_mask is None else valid_mask.bool()
        drawn = self.training and self.cfg.drop_path_rate > 0.0
        key_B = random_keys(len(x), x.device) if drawn else torch.zeros(len(x), dtype=torch.int64, device=x.device)
        images = pack_batch(x, valid, self.cfg.patch_size, key_B)
        mask_T = mask if mask is None else mask.flatten() if valid is None else mask[valid]
        features = self.forward_packed(images, mask_T)
        if valid is None:
            patch_tokens = rearrange(features.patch_TD, "(b n) d -> b n d", b=len(x))
        else:
            patch_tokens = features.patch_TD.new_zeros(*valid.shape, self.cfg.embed_dim)
            patch_tokens[valid] = features.patch_TD
        return EncoderOutput(
            patch_tokens=patch_tokens,
            cls_token=features.cls_ND,
            grid=[(rows, columns) for rows, columns in images.grid_hw.tolist()] if grid is None else grid,
        )

    def _check_batch(self, x: Tensor) -> tuple[Grid | None, int]:
        """The common grid of images (None for sequences) and N."""
        cfg = self.cfg
        patch_dim = cfg.in_chans * cfg.patch_size**2
        images = x.ndim == 4 and x.shape[1] == cfg.in_chans
        if not len(x) or not (images or (x.ndim == 3 and x.shape[2] == patch_dim + 2)):
            raise ValueError(
                f"the input has shape {tuple(x.shape)}; expected images (B, {cfg.in_chans}, H, W), B at least 1, or"
                f" sequences (B, N, {patch_dim + 2})"
            )
        if not images:
            return None, x.shape[1]
        rows, columns = x.shape[2] // cfg.patch_size, x.shape[3] // cfg.patch_size
        return (rows, columns), rows * columns

    @torch.no_grad()
    def encode(self, images: Sequence[ImageLike] | Tensor, *, tokens_per_pack: int = 8192) -> EncodedImages:
        """Return the features of a user's images, prepared as `preprocessing` says, without gradients.

        Args:
            images: any mix of sizes and kinds: PIL images, uint8 arrays [H, W, 3], tensors [3, H, W] (uint8, or floats
                in [-1, 1]) and paths; or a batch of tensors. A JPEG at a path is decoded as training does, maybe at a
                fraction of its size; a PIL image is taken as it is.
            tokens_per_pack: patches that are encoded together; bounds memory and changes no feature but by rounding.

        Errors: DataError when the list is empty or an image cannot be taken, with its number.
        """
        kernel, was_training = self.patch_embed.proj.weight, self.training
        patches: list[Tensor] = []
        pooled: list[Tensor] = []
        self.eval()
        try:
            for pack in image_packs(images, self.preprocessing, self.cfg, tokens_per_pack):
                pack = to_device(pack, kernel.device)
                if pack.patches.is_floating_point():
                    pack = replace(pack, patches=pack.patches.to(kernel.dtype))
                patch_TD = self.forward_packed(pack).patch_TD
                grids = pack.grid_hw.tolist()
                images_TD = patch_TD.split([rows * columns for rows, columns in grids])
                patches += [
                    x.unflatten(0, (rows, columns)) for x, (rows, columns) in zip(images_TD, grids, strict=True)
                ]
                pooled.append(pool_mean(patch_TD, pack.segment(), pack.num_slots))
        finally:
            self.train(was_training)
        return EncodedImages(patches, torch.cat(pooled))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json into a directory, which is made.

        AutoModel.from_pretrained(directory, trust_remote_code=True) of transformers reads it where cogvit is installed.
        """
        write_model(Path(directory), self.cfg, self.state_dict(), self.preprocessing)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Write the directory of `save_pretrained` to a repository of the Hugging Face hub; returns its address.

        Errors: CheckpointError when huggingface_hub is not installed or the hub refuses.
        """
        return push_directory(self.save_pretrained, repo_id, private=private)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        image_size: int | None = None,
    ) -> CogViT:
        """Read what `save_pretrained` wrote, or the vision tower of a GLM-OCR checkpoint; in eval mode.

        Where GLM-OCR's preprocessor_config.json names another normalization of images, it is folded into the weights:
        images are in [-1, 1] here, and the mask token is new.

        Args:
            directory: or a name of the Hugging Face hub, where huggingface_hub is installed.
            device: where the weights go.
            dtype: of the weights: a torch dtype or its name (bfloat16, bf16).
            image_size: another side of the square images in px, to whose grid a learned position table is resized
                (bicubic); a multiple of the patch.

        Errors: CheckpointError when a file is missing or damaged, or names every missing, extra or misshaped weight;
        ConfigError for an unknown dtype.
        """
        wanted, path = dtype_of(dtype), local_directory(directory)
        cfg, weights = read_model(path)
        if image_size is not None:
            cfg = replace(cfg, image_size=image_size)
            if _POSITIONS in weights:
                weights[_POSITIONS] = resized_table(weights[_POSITIONS], cfg.base_grid)
        model = cls(cfg)
        load_checked(model, weights)
        model.preprocessing = read_processing(path, cfg)
        return model.to(device=device, dtype=wanted).eval()

"""Stage 2 in plain PyTorch: the sigmoid loss over all ranks and the two-tower model (the reference's classes)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from cogvit.config import from_json
from cogvit.errors import CheckpointError, DataError
from cogvit.model.hub import dtype_of, local_directory, push_directory
from cogvit.model.images import ImageLike
from cogvit.model.interop import load_checked, read_text_side, write_text_side
from cogvit.model.sigmoid import Logits, Side, add_pairs, agreements, block_edges, no_sums
from cogvit.model.text_side import TextSide, new_text_tower
from cogvit.model.vit import CogViT

_PROJECTIONS = ("vision_proj.", "text_proj.")
_CHUNK_PAIRS = 1024  # rows and columns of the largest block of logits


def _all_gather(x: Tensor) -> Tensor:
    """Concatenate every rank's tensor of one shape; no gradient."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _all_reduce(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


class _SigmoidLoss(torch.autograd.Function):
    """Sum over all pairs of the global batch of -log sigmoid(+-logit), with its gradients, a block of logits at a time.

    A rank compares its own images with everybody's texts. Gradients are multiplied by the number of ranks, because
    DistributedDataParallel averages them over the ranks while the loss is already that of all.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, image_nE: Tensor, text_nE: Tensor, log_t: Tensor, bias: Tensor) -> Tensor:
        all_texts_RnE = _all_gather(text_nE.unsqueeze(0))
        num_ranks = len(all_texts_RnE)
        rank = dist.get_rank() if num_ranks > 1 else 0
        no_identity_nK = torch.empty(len(image_nE), 0, dtype=torch.int64, device=image_nE.device)
        images, logits = Side(image_nE, no_identity_nK), Logits(log_t.exp(), bias, _CHUNK_PAIRS)
        sums, d_texts_RnE = no_sums(images), torch.zeros_like(all_texts_RnE)
        agree = agreements(no_identity_nK, no_identity_nK, _CHUNK_PAIRS, block_edges(len(text_nE), _CHUNK_PAIRS))
        for owner, (texts_nE, d_texts_nE) in enumerate(zip(all_texts_RnE, d_texts_RnE, strict=True)):
            own = 0 if owner == rank else None
            add_pairs(sums, images, Side(texts_nE, no_identity_nK), d_texts_nE, logits, agree, own=own)
        scalars = (sums.d_log_t(images, _CHUNK_PAIRS).to(log_t), sums.d_bias.to(bias))
        gradients = (sums.d_image_nE, _all_reduce(d_texts_RnE)[rank], *scalars)
        ctx.save_for_backward(*(g * num_ranks for g in gradients))
        return _all_reduce(sums.loss).to(image_nE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad * saved for saved in ctx.saved_tensors)


class SigLIPLoss(nn.Module):
    """The sigmoid loss with learned temperature and bias (Zhai et al. 2023, arXiv 2303.15343), over all ranks' pairs.

    Under torch.distributed every rank returns the loss of the global batch, and gradients averaged over the ranks (as
    DistributedDataParallel does) are those of one process with the whole batch. No rank holds more logits than its own
    images by a block of texts.

    Args:
        init_t: temperature at the start; kept as its logarithm.
        init_b: bias at the start.
        normalization: "images" divides by the n pairs on the diagonal, as the paper; "pairs" by all n^2, as the
            reference.

    Errors: ValueError when init_t is not positive or the normalization is unknown.
    """

    def __init__(
        self, init_t: float = 10.0, init_b: float = -10.0, normalization: Literal["images", "pairs"] = "images"
    ) -> None:
        """Start temperature and bias."""
        super().__init__()
        if init_t <= 0.0:
            raise ValueError(f"init_t={init_t} must be positive")
        if normalization not in ("images", "pairs"):
            raise ValueError(f"normalization={normalization!r} must be 'images' or 'pairs'")
        self.normalization = normalization
        self.log_t = nn.Parameter(torch.tensor(math.log(init_t)))
        self.bias = nn.Parameter(torch.tensor(float(init_b)))

    def forward(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """Return the loss in fp32; row i of each [B, E] belongs together, any length, the same B on every rank.

        Errors: ValueError when the shapes differ, between the two or between ranks.
        """
        fit = image_embed.shape == text_embed.shape and image_embed.ndim == 2 and len(image_embed) > 0
        own = tuple(image_embed.shape) if fit else (0, 0)
        # Before any rank raises: the others would wait for it.
        shapes = _all_gather(torch.tensor([own], device=image_embed.device)).tolist()
        if not fit:
            raise ValueError(
                f"image embeddings {tuple(image_embed.shape)} and text embeddings {tuple(text_embed.shape)} must share"
                " the shape (B, E), B at least 1"
            )
        sizes, widths = zip(*shapes, strict=True)
        if len(set(sizes)) > 1 or len(set(widths)) > 1:
            raise ValueError(
                f"ranks bring {list(sizes)} pairs of {list(widths)} channels; the loss needs the same on each, and 0 is"
                " of a rank whose shapes are wrong"
            )
        with torch.autocast(image_embed.device.type, enabled=False):
            # fp64 stays fp64; whatever is narrower than fp32 is widened to it.
            dtype = torch.promote_types(torch.promote_types(image_embed.dtype, text_embed.dtype), torch.float32)
            image_BE = F.normalize(image_embed.to(dtype), dim=-1)
            text_BE = F.normalize(text_embed.to(dtype), dim=-1)
            total: Tensor = _SigmoidLoss.apply(  # type: ignore[no-untyped-call]
                image_BE, text_BE, self.log_t.to(dtype), self.bias.to(dtype)
            )
        num_images = sum(sizes)
        return total / (num_images if self.normalization == "images" else num_images**2)


class Projection(nn.Linear):
    """A tower's map into the shared space; it knows the loss whose temperature and bias train with it.

    `build_param_groups` over towers and projections, as in the reference's recipe, therefore trains these too.
    """

    def __init__(self, in_dim: int, out_dim: int, loss: SigLIPLoss, bias: bool = False) -> None:
        super().__init__(in_dim, out_dim, bias=bias)
        self.trains_with = (loss,)  # in a tuple, lest it become a submodule and enter the state dict twice


class ContrastiveOutput(TypedDict):
    """What the two-tower model returns."""

    loss: Tensor
    image_embed: Tensor  # [B, E], not normalized
    text_embed: Tensor  # [B, E], not normalized


class CogViTForContrastive(nn.Module):
    """Vision and text towers with projections into one space and the sigmoid loss.

    Args:
        vision: the vision tower.
        text_encoder: maps (input_ids, attention_mask) to pooled features [B, text_dim]; `TextTower` is one.
        text_dim: width of the text features.
        proj_dim: E.
        loss: with its start values; SigLIPLoss() if None.

    Attributes:
        text_side: how texts become tokens; None unless `from_pretrained` has read it.
    """

    def __init__(
        self,
        vision: CogViT,
        text_encoder: nn.Module,
        text_dim: int,
        proj_dim: int = 768,
        loss: SigLIPLoss | None = None,
    ) -> None:
        """Join two towers by new projections."""
        super().__init__()
        self.vision = vision
        self.text_encoder = text_encoder
        self.text_side: TextSide | None = None
        self.loss_fn = SigLIPLoss() if loss is None else loss
        self.vision_proj = Projection(vision.cfg.embed_dim, proj_dim, self.loss_fn)
        self.text_proj = Projection(text_dim, proj_dim, self.loss_fn)

    def encode_image(self, x: Tensor | Sequence[ImageLike], valid_mask: Tensor | None = None) -> Tensor:
        """Return [B, E] of the mean over each image's valid patches, not normalized.

        Args:
            x: a dense batch and its valid_mask as `CogViT` takes them; or a list of images as `CogViT.encode` takes
                them, prepared as in training and without gradients.
            valid_mask: bool [B, N] of a dense batch.

        Errors: DataError when an image of a list cannot be taken.
        """
        if not isinstance(x, Tensor):
            pooled_BD = self.vision.encode(x).pooled
            with torch.no_grad():
                return self.vision_proj(pooled_BD.to(self.vision_proj.weight.dtype))
        patch_tokens = self.vision(x, valid_mask=valid_mask)["patch_tokens"]
        if valid_mask is None:
            return self.vision_proj(patch_tokens.mean(dim=1))
        return self.vision_proj(patch_tokens.sum(dim=1) / valid_mask.sum(dim=1, keepdim=True))

    def encode_text(self, input_ids: Tensor | Sequence[str], attention_mask: Tensor | None = None) -> Tensor:
        """Return [B, E], not normalized, of token ids and their mask [B, L]; or of a list of texts, without gradients.

        Errors: ValueError when the text encoder does not give [B, text_dim]; DataError when a list holds no texts, or
        the model has no tokenizer, which `from_pretrained` gives it.
        """
        if not isinstance(input_ids, Tensor):
            if self.text_side is None:
                raise DataError("this model has no tokenizer; pass token ids, or load it by from_pretrained")
            device = self.text_proj.weight.device
            with torch.no_grad():
                ids, valid = self.text_side.tokens(input_ids)
                return self.encode_text(ids.to(device), valid.to(device))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = self.text_encoder(input_ids, mask)
        expected = (len(input_ids), self.text_proj.in_features)
        if not isinstance(pooled, Tensor) or pooled.shape != expected:
            given = f"shape {tuple(pooled.shape)}" if isinstance(pooled, Tensor) else f"a {type(pooled).__name__}"
            raise ValueError(f"the text encoder gave {given}; expected pooled features of shape {expected}")
        return self.text_proj(pooled.to(self.text_proj.weight.dtype))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both towers as `tools.export --layout two_towers` does.

        Errors: DataError where the model has no `text_side`, which says how texts become tokens.
        """
        if self.text_side is None:
            raise DataError("this model has no text_side, without which nobody can make its tokens; set it first")
        self.vision.save_pretrained(directory)
        state = {f"text.{name}": tensor for name, tensor in self.text_encoder.state_dict().items()}
        state |= {name: tensor for name, tensor in self.state_dict().items() if name.startswith(_PROJECTIONS)}
        state |= {"log_t": self.loss_fn.log_t.reshape(1), "bias": self.loss_fn.bias.reshape(1)}
        write_text_side(Path(directory), self.text_side.to_json(), state)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Write the directory of `save_pretrained` to a repository of the Hugging Face hub; returns its address.

        Errors: CheckpointError when huggingface_hub is not installed or the hub refuses.
        """
        return push_directory(self.save_pretrained, repo_id, private=private)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = torch.float32
    ) -> CogViTForContrastive:
        """Read both towers of an export with --layout two_towers, in eval mode; the arguments are `CogViT`'s.

        Errors: CheckpointError when a file is missing or damaged, or a weight does not fit; ConfigError for an unknown
        dtype; DataError when the tokenizer cannot be loaded.
        """
        wanted, path = dtype_of(dtype), local_directory(directory)
        vision, found = CogViT.from_pretrained(path), read_text_side(path)
        if found is None:
            raise CheckpointError(f"{path} has no text side; export the run with --layout two_towers")
        side, tensors = from_json(TextSide, found[0]), found[1]
        missing = [name for name in ("vision_proj.weight", "text_proj.weight") if name not in tensors]
        if missing:
            raise CheckpointError(f"the text side of {path} lacks {', '.join(missing)}")
        proj_dim, text_dim = tensors["text_proj.weight"].shape
        model = cls(vision, new_text_tower(side), text_dim, proj_dim)
        model.text_side = side
        if "text_proj.bias" in tensors:  # of a run; the reference's projections have none
            model.vision_proj = Projection(vision.cfg.embed_dim, proj_dim, model.loss_fn, bias=True)
            model.text_proj = Projection(text_dim, proj_dim, model.loss_fn, bias=True)
        own = {name.replace("text.", "text_encoder.", 1): tensor for name, tensor in tensors.items()}
        for name in ("log_t", "bias"):
            own[f"loss_fn.{name}"] = own.pop(name, getattr(model.loss_fn, name).detach()).reshape(())
        load_checked(model, own | {f"vision.{name}": tensor for name, tensor in vision.state_dict().items()})
        return model.to(device=device, dtype=wanted).eval()

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, valid_mask: Tensor | None = None
    ) -> ContrastiveOutput:
        """Return the "loss" over all ranks' pairs and this rank's "image_embed" and "text_embed" [B, E].

        Args:
            images: [B, C, H, W], or the sequences of `naflex_collate`.
            input_ids: [B, L]; text i belongs to image i.
            attention_mask: [B, L], nonzero where a token belongs to the text.
            valid_mask: bool [B, N], true where a patch belongs to its image; all if None.

        Errors: ValueError when a shape is wrong or there are not as many texts as images.
        """
        image_embed = self.encode_image(images, valid_mask=valid_mask)
        text_embed = self.encode_text(input_ids, attention_mask)
        loss = self.loss_fn(image_embed, text_embed)
        return ContrastiveOutput(loss=loss, image_embed=image_embed, text_embed=text_embed)

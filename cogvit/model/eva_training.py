"""EVA2-CLIP-E as it is trained, a `CogViT` whose norms stand behind its branches, brought to its released form."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvit.errors import CheckpointError
from cogvit.model.config import CogViTConfig
from cogvit.model.eva import DEVIATION, MEAN, EvaConfig, EvaEncoder
from cogvit.model.image_input import ImageSize, SquareImages
from cogvit.model.vit import CogViT


def eva_encoder(vit: CogViT, shown: ImageSize, *, output_position: bool = False) -> EvaEncoder:
    """Return the same encoder as an `EvaEncoder`; CLIP's normalization of images is folded into its patch embedding.

    Features agree but for rounding. The mask token stays behind. output_position: it has positions for what comes out,
    as CogAgent's has; they are 0.

    Errors: CheckpointError names what the released encoder does not have.
    """
    cfg = vit.cfg
    wrong = _differences(cfg, shown)
    if wrong:
        raise CheckpointError(f"EVA2-CLIP-E, the encoder of this layout, has {'; '.join(wrong)}")
    with torch.device("meta"):
        encoder = EvaEncoder(
            EvaConfig(
                "e",
                cfg.image_size,
                cfg.patch_size,
                cfg.embed_dim,
                cfg.depth,
                cfg.num_heads,
                cfg.mlp_dim,
                cfg.eps,
                output_position,
            )
        )
    weights = _weights(vit.state_dict())
    if output_position:
        weights["out_pos_embed"] = torch.zeros_like(weights["pos_embed"][1:])
    encoder.load_state_dict(weights, assign=True)
    return encoder.train(vit.training)


def _differences(cfg: CogViTConfig, shown: ImageSize) -> list[str]:
    side = shown.side_px if isinstance(shown, SquareImages) else None
    asked = {
        "norms behind its branches (--vision.norm-after true)": cfg.norm_after,
        "--vision.norm layernorm": cfg.norm == "layernorm",
        "--vision.mlp gelu": cfg.mlp == "gelu",
        "--vision.position learned": cfg.position == "learned",
        "a CLS token": cfg.use_cls_token,
        "no QK-norm": not cfg.use_qk_norm,
        "no LayerScale": cfg.layer_scale_init is None,
        "all biases": cfg.qkv_bias and cfg.proj_bias,
        f"squares of {cfg.image_size} px (--data.sizing square)": side == cfg.image_size,
    }
    return [what for what, holds in asked.items() if not holds]


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    kernel_DCPP, table_1DHW = state["patch_embed.proj.weight"], state["pos_embed.embed"]
    mean_C, deviation_C = torch.tensor(MEAN), torch.tensor(DEVIATION)
    # Ours takes 2 x - 1, theirs (x - mean) / deviation of an image in [0, 1].
    shift_D = (kernel_DCPP.sum((2, 3)) * (2 * mean_C - 1)).sum(1)
    places_TD = table_1DHW[0].flatten(1).T
    weights = {
        "patch_embed.weight": kernel_DCPP * (2 * deviation_C)[:, None, None],
        "patch_embed.bias": state["patch_embed.proj.bias"] + shift_D,
        "cls_token": state["cls_token"][0],
        "pos_embed": torch.cat([torch.zeros_like(places_TD[:1]), places_TD]),  # ours adds none to CLS
    }
    blocks = {name: weight for name, weight in state.items() if name.startswith("blocks.")}
    return weights | {name.replace(".mlp.", "."): weight for name, weight in blocks.items()}

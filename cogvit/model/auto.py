"""The encoder for transformers' Auto classes; an export's modeling_cogvit.py imports these two."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cogvit.model.config import CogViTConfig
from cogvit.model.vit import CogViT


class CogViTModelConfig(PreTrainedConfig):  # type: ignore[misc]
    """A `CogViTConfig` with what transformers keeps beside it."""

    model_type = "cogvit"
    attribute_map: ClassVar = {
        "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"
    }  # fmt: skip

    def cogvit(self) -> CogViTConfig:
        """Return the encoder's own configuration."""
        return CogViTConfig(**{field.name: getattr(self, field.name) for field in fields(CogViTConfig)})


class CogViTModel(PreTrainedModel):  # type: ignore[misc]
    """The encoder under transformers' conventions.

    Attributes:
        vit: the encoder.
    """

    config_class = CogViTModelConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"

    def __init__(self, config: CogViTModelConfig) -> None:
        """Build an encoder with new weights."""
        super().__init__(config)
        self.vit = CogViT(config.cogvit())
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Leave weights as `CogViT` starts them."""

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> Any:
        """Encode images [B, C, H, W] in [-1, 1] to patch features [B, N, D] and their mean [B, D]."""
        patches_BND = self.vit(pixel_values)["patch_tokens"]
        output = BaseModelOutputWithPooling(last_hidden_state=patches_BND, pooler_output=patches_BND.mean(dim=1))
        return output if return_dict else output.to_tuple()

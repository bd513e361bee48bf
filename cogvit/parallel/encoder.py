"""The towers as pipeline stages: the plain model's embedding and norm around Megatron's layers.

A stage keeps the parts of the plain tower that it owns (embeddings on the first, the norm on the last) under the plain
names, and its share of the layers under `trunk`.
"""

from __future__ import annotations

from torch import Tensor, nn

from cogvit.batch import PackedImages, PackedText
from cogvit.config import ActivationConfig, ParallelConfig
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.pretrained import PretrainedText
from cogvit.model.text import TextEmbedding, text_layout
from cogvit.model.tokens import PackedFeatures, PackedLayout, pool_mean
from cogvit.model.vit import VisionEmbedding, split_packed, vision_layout
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.pieces import Fusion, pieces_on
from cogvit.parallel.stage import TrunkStage
from cogvit.parallel.trunk import PackedStream, build_trunk, local_layout, megatron_config, tower_shape


def tower_stage(
    cfg: CogViTConfig | TextConfig,
    mesh: Mesh,
    parallel: ParallelConfig,
    memory: ActivationConfig,
    num_tokens: int,
    fusion: Fusion,
) -> TrunkStage:
    """Return this rank's layers of a tower, for packs of num_tokens tokens, CLS tokens included."""
    config = megatron_config(tower_shape(cfg), mesh, memory, sequence=parallel.sequence)
    layers = build_trunk(cfg, config, mesh, memory, pieces_on(mesh.device, fusion))
    return TrunkStage(layers, mesh, num_tokens, offload=memory.offload)


def _run(trunk: TrunkStage, x_SD: Tensor | None, layout: PackedLayout) -> Tensor:
    local = local_layout(layout, trunk.mesh, trunk.config.sequence_parallel)
    return trunk.run(x_SD, PackedStream(qkv_format="thd", layout=layout, local=local))


def _disown(stage: nn.Module, *names: str) -> None:
    """Drop what another stage of the pipeline owns."""
    for name in names:
        setattr(stage, name, None)


class VisionStage(VisionEmbedding):
    """This rank's stage of the vision tower, for packs of num_tokens patches and num_slots images."""

    def __init__(
        self,
        cfg: CogViTConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        memory: ActivationConfig,
        *,
        num_tokens: int,
        num_slots: int,
        fusion: Fusion = "auto",
    ) -> None:
        super().__init__(cfg)
        if not mesh.is_first_stage:
            _disown(self, "patch_embed", "pos_embed", "mask_token", "cls_token")
        if not mesh.is_last_stage:
            _disown(self, "norm")
        cls_tokens = num_slots if cfg.use_cls_token else 0
        self.trunk = tower_stage(cfg, mesh, parallel, memory, num_tokens + cls_tokens, fusion)

    def forward(self, images: PackedImages, mask_T: Tensor | None = None) -> Tensor | PackedFeatures:
        """Return the features on the last stage, hidden states for the next one elsewhere."""
        if self.trunk.mesh.is_first_stage:
            tokens = self.embed_packed(images, mask_T)
            layout: PackedLayout = tokens
            x = _run(self.trunk, tokens.x_SD, tokens)
        else:
            layout = vision_layout(images, self.cfg)
            x = _run(self.trunk, None, layout)
        return split_packed(self.norm(x), layout, images.num_tokens) if self.trunk.mesh.is_last_stage else x


class TextStage(TextEmbedding):
    """This rank's stage of the text tower, for packs of num_tokens caption tokens."""

    def __init__(
        self,
        cfg: TextConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        memory: ActivationConfig,
        *,
        num_tokens: int,
        fusion: Fusion = "auto",
    ) -> None:
        super().__init__(cfg)
        if not mesh.is_first_stage:
            _disown(self, "token_embed", "pos_embed")
        if not mesh.is_last_stage:
            _disown(self, "norm")
        self.trunk = tower_stage(cfg, mesh, parallel, memory, num_tokens, fusion)

    @property
    def dim(self) -> int:
        """D, width of the pooled captions."""
        return self.cfg.embed_dim

    def forward(self, text: PackedText, key_N: Tensor) -> Tensor:
        """Return each caption's mean token [N, D] on the last stage, hidden states for the next one elsewhere.

        key_N: `PackedImages.key`, the seeds of stochastic depth.
        """
        if self.trunk.mesh.is_first_stage:
            tokens = self.embed_packed(text, key_N)
            layout: PackedLayout = tokens
            x = _run(self.trunk, tokens.x_SD, tokens)
        else:
            layout = text_layout(text, key_N)
            x = _run(self.trunk, None, layout)
        return pool_mean(self.norm(x), layout.slot_S, len(text.caption_id)) if self.trunk.mesh.is_last_stage else x


class WholeTextStage(PretrainedText):
    """A text encoder of transformers, whole on every rank of the last stage: no stage and no tensor rank shares it."""

    trunk = None

    def forward(self, text: PackedText, key_N: Tensor) -> Tensor:
        """Return [N, D]: each caption pooled; it has no draws, so the keys mean nothing to it."""
        return self.pool_packed(text)

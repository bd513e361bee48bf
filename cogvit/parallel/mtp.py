"""The heads for more tokens on Megatron's layers, whole on the last stage: the twin of `cogvit.model.mtp`.

What a head sees of text and images stands on every tensor rank; its layer is split over them as those of the trunk.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cogvit.batch import PackedSequence
from cogvit.config import ActivationConfig, ParallelConfig
from cogvit.model.attention import segments_of
from cogvit.model.blocks import RMSNorm
from cogvit.model.config import ExpertConfig
from cogvit.model.decoder import CausalLayout, rotary_1d
from cogvit.model.language_config import CrossConfig, LanguageConfig
from cogvit.model.mtp import reading_of, seen_by_heads
from cogvit.parallel.decoder import build_decoder, decoder_shape
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.pieces import Fusion, pieces_on
from cogvit.parallel.stage import TrunkStage
from cogvit.parallel.trunk import PackedStream, megatron_config


class MtpLayerStage(nn.Module):
    """Joins a token with what is known before it, then one layer and a norm."""

    def __init__(self, cfg: LanguageConfig, trunk: TrunkStage) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = (RMSNorm(cfg.embed_dim, eps=cfg.eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * cfg.embed_dim, cfg.embed_dim, bias=False)
        self.trunk = trunk

    def forward(self, token_SD: Tensor, hidden_SD: Tensor, stream: PackedStream) -> Tensor:
        """Return what the output matrix reads and the next depth goes on from, [S, D]."""
        joined = torch.cat([self.enorm(token_SD), self.hnorm(hidden_SD)], dim=1)
        return self.norm(self.trunk.run(self.eh_proj(joined).float(), stream))


class MtpStage(nn.Module):
    """The layers of all depths, one for all or one for each, and what stands for images."""

    def __init__(
        self,
        cfg: LanguageConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        memory: ActivationConfig,
        *,
        num_tokens: int,
        fusion: Fusion,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        alone = replace(mesh, pp_rank=0, pp_size=1)
        one_layer = replace(cfg, depth=1, expert=ExpertConfig(), cross=CrossConfig())
        if memory.recompute_blocks > 1:
            memory = replace(memory, recompute_blocks=1)
        layers = []
        for _ in range(cfg.mmtp.num_layers):
            config = megatron_config(decoder_shape(one_layer), alone, memory, parallel)
            block = build_decoder(one_layer, config, alone, memory, pieces_on(mesh.device, fusion))
            layers.append(MtpLayerStage(cfg, TrunkStage(block, alone, num_tokens, offload=memory.offload)))
        self.layers = nn.ModuleList(layers)
        learned = cfg.mmtp.images == "tokens"
        self.image_token = nn.Parameter(torch.empty(cfg.mmtp.tokens, cfg.embed_dim)) if learned else None

    def seen(self, embedded_SD: Tensor, x_SD: Tensor, slot_S: Tensor) -> Tensor:
        """Return what the heads see of each token of a pack, [S, D]; as `MtpHeads.seen`."""
        return seen_by_heads(self.cfg.mmtp.images, self.image_token, embedded_SD, x_SD, slot_S)

    def forward(self, hidden_SD: Tensor, seen_SD: Tensor, sequence: PackedSequence) -> list[Tensor]:
        """Return for each depth what the output matrix reads, [S, D].

        Args:
            hidden_SD: what it reads for the next token.
            seen_SD: of `seen`.
            sequence: the pack, with its `ahead`.
        """
        assert sequence.ahead is not None, "heads for more tokens need what lies ahead"
        if not self.cfg.mmtp.trunk_gradient:
            hidden_SD = hidden_SD.detach()
        segments, outputs = segments_of(sequence.cu_seqlens, sequence.host), []
        for depth in range(self.cfg.mmtp.depths):
            reading = reading_of(sequence.ahead, depth, segments)
            cos_sin = rotary_1d(sequence.position[:, reading.source_S], self.cfg)
            stream = PackedStream(qkv_format="thd", layout=CausalLayout(reading.segments, *cos_sin))
            layer = self.layers[0 if self.cfg.mmtp.share else depth]
            hidden_SD = reading.restored(
                hidden_SD, layer(seen_SD[reading.source_S], reading.ordered(hidden_SD), stream)
            )
            outputs.append(hidden_SD)
        return outputs

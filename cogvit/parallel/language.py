"""The causal language model as pipeline stages: embedding and head over the tensor ranks, Megatron's layers between.

A stage keeps the parts of `cogvit.model.language.CausalLM` that it owns under the plain names: `embed` on the first,
`norm` and `head` on the last, and its share of the blocks under `trunk`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cogvit.batch import PackedSequence
from cogvit.config import ActivationConfig, ParallelConfig
from cogvit.model.attention import segments_of
from cogvit.model.blocks import RMSNorm
from cogvit.model.cross import CrossRows
from cogvit.model.decoder import CausalLayout, rotary_1d
from cogvit.model.expert import ExpertRows, expert_rows, is_grown
from cogvit.model.language import place_visual
from cogvit.model.language_config import LanguageConfig, check_layout
from cogvit.parallel.convert import plain_tensors
from cogvit.parallel.decoder import build_decoder, decoder_shape
from cogvit.parallel.ends import to_first_stage, to_last_stage
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.mtp import MtpStage
from cogvit.parallel.pieces import Fusion, pieces_on
from cogvit.parallel.stage import TrunkStage
from cogvit.parallel.trunk import PackedStream, megatron_config
from cogvit.parallel.vocabulary import Vocabulary, embedded, label_logprobs, label_loss, rows_with_weight

from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region  # isort: skip


class LanguageStage(nn.Module):
    """This rank's stage of a language model, for packs of num_tokens tokens.

    What the last stage needs of the embedding (a tied head, the heads for more tokens) is lent to it by the first,
    which owns the weight, for a pass: it has one owner, one place in a checkpoint and one share of the gradient's norm.

    Errors: ConfigError when the layout does not divide it.
    """

    def __init__(
        self,
        cfg: LanguageConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        memory: ActivationConfig,
        *,
        num_tokens: int,
        fusion: Fusion = "auto",
    ) -> None:
        super().__init__()
        check_layout(cfg, mesh.tp_size, mesh.pp_size)
        self.cfg, self.mesh, self.recompute = cfg, mesh, memory.recompute != "none"
        self.embed = Vocabulary(cfg.vocab_size, cfg.embed_dim, mesh) if mesh.is_first_stage else None
        config = megatron_config(decoder_shape(cfg), mesh, memory, parallel)
        layers = build_decoder(cfg, config, mesh, memory, pieces_on(mesh.device, fusion))
        self.trunk = TrunkStage(layers, mesh, num_tokens, offload=memory.offload)
        self.norm = RMSNorm(cfg.embed_dim, eps=cfg.eps) if mesh.is_last_stage else None
        self.head = None
        if mesh.is_last_stage and not cfg.tied:
            self.head = Vocabulary(cfg.vocab_size, cfg.embed_dim, mesh)
        self.mtp = None
        if mesh.is_last_stage and cfg.mmtp.depths:
            self.mtp = MtpStage(cfg, mesh, parallel, memory, num_tokens=num_tokens, fusion=fusion)
        self._lent: Tensor | None = None  # the first stage's weight, on the last

    @property
    def head_weight(self) -> Tensor:
        """This tensor rank's rows [V / tp, D] of the head; on the last stage."""
        return self.embed_weight if self.head is None else self.head.weight

    @property
    def embed_weight(self) -> Tensor:
        """This tensor rank's rows [V / tp, D] of the embedding; on the last stage of several while it is lent."""
        weight = self._lent if self.embed is None else self.embed.weight
        assert weight is not None, "the first stage owns the embedding; it is lent to the last for a pass"
        return weight

    def forward(
        self, sequence: PackedSequence, visual_ED: Tensor | None = None, cross: CrossRows | None = None
    ) -> Tensor:
        """Return what the head reads [S, D] on the last stage, hidden states for the next one elsewhere.

        Args:
            sequence: the pack; its ids are of the vocabulary, which is not looked at here.
            visual_ED: the adapter's output, on the first stage: `sequence.visual_row` names its rows.
            cross: what cross attention looks at, on every stage, where there is any.
        """
        segments, rows = segments_of(sequence.cu_seqlens, sequence.host), self._expert_rows(sequence)
        if cross is not None and self.mesh.tp_size > 1:  # each rank's heads give a part of the gradient
            cross = CrossRows(copy_to_tensor_model_parallel_region(cross.row_EC), cross.count_N)
        layout = CausalLayout(segments, *rotary_1d(sequence.position, self.cfg), rows, cross)
        x_SD = None
        if self.embed is not None:
            x_SD = place_visual(self.embed(sequence.ids), visual_ED, sequence.visual_row)
        x_SD = self.trunk.run(x_SD, PackedStream(qkv_format="thd", layout=layout))
        return x_SD if self.norm is None else self.norm(x_SD)

    def _expert_rows(self, sequence: PackedSequence) -> ExpertRows | None:
        if not self.cfg.expert.every:
            return None
        assert sequence.expert is not None, "a pack says which of its tokens go through the visual experts"
        return expert_rows(sequence.expert, None if sequence.host is None else sequence.host.experts)

    def loss(self, hidden_SD: Tensor, sequence: PackedSequence) -> Tensor:
        """Return the sum over the pack's labels of weight times cross entropy in nats, 0-dim fp32; on the last stage.

        hidden_SD: what `forward` gave.
        """
        count = None if sequence.host is None else sequence.host.labels
        return self._label_loss(hidden_SD, sequence.labels, sequence.weight, count)

    def _label_loss(self, hidden_SD: Tensor, label_S: Tensor, weight_S: Tensor, count: int | None) -> Tensor:
        return label_loss(hidden_SD, self.head_weight, label_S, weight_S, count, recompute=self.recompute)

    def logprobs(self, hidden_SD: Tensor, sequence: PackedSequence, temperature: float) -> Tensor:
        """Return the log-probability of each of the pack's labels that has a weight, [R] fp32; on the last stage.

        Args:
            hidden_SD: what `forward` gave.
            sequence: the pack.
            temperature: of the distribution.
        """
        row_R = rows_with_weight(sequence.weight, None if sequence.host is None else sequence.host.labels)
        hidden_RD, label_R = hidden_SD.index_select(0, row_R) / temperature, sequence.labels.index_select(0, row_R)
        return label_logprobs(hidden_RD, self.head_weight, label_R)

    def losses(self, hidden_SD: Tensor, sequence: PackedSequence, visual_ED: Tensor | None = None) -> Tensor:
        """Return the sums over the pack's labels, [1 + M] fp32: of the next token and of those after it.

        Args:
            hidden_SD: what `forward` gave, on the last stage.
            sequence: the pack, with its `ahead` where the model has heads for more tokens.
            visual_ED: the adapter's output, which those heads see where `mmtp.images` is `embeddings`.
        """
        sums = [self.loss(hidden_SD, sequence)]
        if self.mtp is not None and sequence.ahead is not None:
            ids_SD = embedded(sequence.ids, self.embed_weight, self.mesh.tp_rank * len(self.embed_weight))
            seen_SD = self.mtp.seen(ids_SD, place_visual(ids_SD, visual_ED, sequence.visual_row), sequence.ahead.slot)
            depths = zip(
                self.mtp(hidden_SD, seen_SD, sequence), *sequence.ahead_labels(), sequence.ahead.counts, strict=True
            )
            sums += [self._label_loss(*depth) for depth in depths]
        return torch.stack(sums)

    @contextmanager
    def lent_embedding(self, *, train: bool) -> Iterator[None]:
        """Lend the embedding to the last stage, where that needs what is not its own, for the passes inside.

        What their backwards find there is added to the embedding's gradient. Collective over the stages.
        """
        if not (self.cfg.tied or self.cfg.mmtp.depths) or self.mesh.pp_size == 1:
            yield
            return
        shape = (self.cfg.vocab_size // self.mesh.tp_size, self.cfg.embed_dim)
        own = (tensor.parameter for tensor in plain_tensors(self) if not is_grown(tensor.name))
        learns = train and any(parameter.requires_grad for parameter in own)  # the same on all stages
        for weight in to_last_stage([] if self.embed is None else [self.embed.weight], [shape], self.mesh):
            self._lent = weight.requires_grad_(learns)
        try:
            yield
            found = [] if self._lent is None or self._lent.grad is None else [self._lent.grad]
        finally:
            self._lent = None
        for gradient in to_first_stage(found, [shape], self.mesh) if learns else ():
            assert self.embed is not None and self.embed.weight.grad is not None
            self.embed.weight.grad += gradient

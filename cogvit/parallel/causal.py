"""Self-attention of a causal language model on Megatron's linear layers, on packed sequences."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cogvit.model.attention import packed_attention
from cogvit.model.decoder import CausalLayout, turn
from cogvit.parallel.pieces import compute_dtype
from cogvit.parallel.trunk import PackedSelfAttention

_turn_neighbors = partial(turn, interleaved=True)
_turn_halves = partial(turn, interleaved=False)


class CausalSelfAttention(PackedSelfAttention):
    """Attention of each token over its predecessors; key-value heads lie with the queries that they serve."""

    interleaved = False  # whether neighboring channels turn together

    def _attend(self, qkv_S1F: Tensor, layout: CausalLayout) -> Tensor:
        groups, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        sharing = self.num_attention_heads_per_partition // groups
        by_group_SGMK = qkv_S1F.view(len(qkv_S1F), groups, sharing + 2, head_dim)
        q_SGMK, k_SG1K, v_SG1K = by_group_SGMK.split((sharing, 1, 1), dim=2)  # its gradient is one concatenation
        norms = None if self.q_layernorm is None else (self.q_layernorm.synced(), self.k_layernorm.synced())
        q_SHK, k_SGK = self.pieces.heads(
            q_SGMK.flatten(1, 2),
            k_SG1K.squeeze(2),
            norms,
            (layout.cos_SR, layout.sin_SR),
            self.config.layernorm_epsilon,
            compute_dtype(qkv_S1F),
            _turn_neighbors if self.interleaved else _turn_halves,
        )
        assert layout.segments is not None
        return packed_attention(q_SHK, k_SGK, v_SG1K.squeeze(2), layout.segments, causal=True).flatten(1)

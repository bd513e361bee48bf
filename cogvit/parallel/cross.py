"""Cross attention in Megatron's layers: the twin of `cogvit.model.cross`, its heads split over the tensor ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cogvit.model.cross import look, split_heads
from cogvit.model.decoder import CausalLayout
from cogvit.model.language_config import CrossConfig
from cogvit.parallel.linear import ColumnLinear, RowLinear
from cogvit.parallel.trunk import checkpointed

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


class CrossAttentionOnRows(nn.Module):
    """What stands in a Megatron layer's place for cross attention; its norm stands before it.

    The rows are on every tensor rank, and whoever gives them sums their gradient over the ranks.
    """

    recompute = False  # do attention again in backward, from queries, keys and values

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        cross: CrossConfig,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads // config.tensor_model_parallel_size
        shared = {"config": config, "bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        into = {"init_method": config.init_method, "gather_output": False, **shared}
        self.query = ColumnLinear(config.hidden_size, cross.dim, **into)
        self.key_value = ColumnLinear(cross.encoder_dim, 2 * cross.dim, **into)
        self.proj = RowLinear(
            cross.dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **shared,
        )
        self.layout: CausalLayout | None = None  # of the call under way

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """Look at the rows of each token's sequence: [S, 1, D] in; the output and no bias."""
        layout = self.layout
        assert layout is not None and layout.cross is not None, "a layer with cross attention is told what it looks at"
        query_S1F, _ = self.query(hidden_states)
        key_value_EF, _ = self.key_value.product(layout.cross.row_EC)
        inputs = (query_S1F, key_value_EF, layout)
        seen_SF = checkpointed(self._look, *inputs) if self.recompute else self._look(*inputs)
        return self.proj(seen_SF.unsqueeze(1))[0], None

    def _look(self, query_S1F: Tensor, key_value_EF: Tensor, layout: CausalLayout) -> Tensor:
        assert layout.segments is not None and layout.cross is not None
        query_SHK = query_S1F.view(len(query_S1F), self.num_heads, -1)
        keys_and_values = split_heads(key_value_EF, self.num_heads)
        return look(query_SHK, *keys_and_values, layout.segments.lengths, layout.cross.count_N).flatten(1)

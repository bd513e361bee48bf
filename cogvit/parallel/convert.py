"""Maps weights between Megatron's shards and the plain model, exactly and both ways.

The plain model's names and full tensors are what is stored, exported and initialized; a shard is a view of them.
Megatron fuses and reorders two matrices: attention's qkv lies by key-value head, each with the queries that it serves,
and a rank's SwiGLU fc1 is [gate_r; up_r], so their concatenation over ranks is not the plain tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from cogvit.errors import CheckpointError
from cogvit.parallel.mesh import Mesh


class Split(Enum):
    """How a plain tensor is laid out over the tensor ranks."""

    REPLICATED = "replicated"
    ROWS = "rows"
    COLUMNS = "columns"
    QKV = "qkv"  # rows, [H + G + G, K] in the plain model, [G, H / G + 2, K] in Megatron
    GATE_UP = "gate_up"  # rows, [2, F] in the plain model, [gate_r; up_r] on each rank; likewise keys and values


@dataclass(frozen=True)
class PlainTensor:
    """A local parameter, the plain name it has in every layout, and how it is split."""

    name: str
    parameter: nn.Parameter
    split: Split
    num_heads: int  # H of its tower, of the queries; used by QKV
    num_kv_heads: int  # G, of keys and values; H where each query has its own

    def plain_shape(self, tp_size: int) -> tuple[int, ...]:
        """The shape of the full tensor."""
        shape = list(self.parameter.shape)
        if self.split is not Split.REPLICATED:
            shape[1 if self.split is Split.COLUMNS else 0] *= tp_size
        return tuple(shape)


_LAYER = re.compile(r"^(?P<tower>.*?)trunk\.layers\.layers\.(?P<index>\d+)\.(?P<rest>.*)$")
_RENAMES = (
    ("input_layernorm.", "norm1.", Split.REPLICATED),
    ("pre_mlp_layernorm.", "norm2.", Split.REPLICATED),
    ("self_attention.q_layernorm.", "attn.q_norm.", Split.REPLICATED),
    ("self_attention.k_layernorm.", "attn.k_norm.", Split.REPLICATED),
    ("self_attention.linear_qkv.", "attn.qkv.", Split.QKV),
    ("self_attention.linear_proj.weight", "attn.proj.weight", Split.COLUMNS),
    ("self_attention.linear_proj.bias", "attn.proj.bias", Split.REPLICATED),
    ("self_attention.expert.qkv.", "expert.qkv.", Split.QKV),
    ("self_attention.expert.proj.weight", "expert.proj.weight", Split.COLUMNS),
    ("self_attention.expert.proj.bias", "expert.proj.bias", Split.REPLICATED),
    ("pre_cross_attn_layernorm.", "cross.norm.", Split.REPLICATED),
    ("cross_attention.query.", "cross.query.", Split.ROWS),
    ("cross_attention.key_value.", "cross.key_value.", Split.GATE_UP),
    ("cross_attention.proj.", "cross.proj.", Split.COLUMNS),
    ("mlp.expert.linear_fc1.", "expert.mlp.fc1.", Split.ROWS),
    ("mlp.expert.linear_fc2.weight", "expert.mlp.fc2.weight", Split.COLUMNS),
    ("mlp.expert.linear_fc2.bias", "expert.mlp.fc2.bias", Split.REPLICATED),
    ("mlp.linear_fc1.", "mlp.fc1.", Split.ROWS),
    ("mlp.linear_fc2.weight", "mlp.fc2.weight", Split.COLUMNS),
    ("mlp.linear_fc2.bias", "mlp.fc2.bias", Split.REPLICATED),
    ("self_attn_bda.after.", "norm1.", Split.REPLICATED),
    ("mlp_bda.after.", "norm2.", Split.REPLICATED),
    ("self_attn_bda.norm.", "post_norm1.", Split.REPLICATED),
    ("mlp_bda.norm.", "post_norm2.", Split.REPLICATED),
    ("self_attn_bda.", "ls1.", Split.REPLICATED),
    ("mlp_bda.", "ls2.", Split.REPLICATED),
)


def plain_tensors(module: nn.Module) -> Iterator[PlainTensor]:
    """Yield every parameter of this rank with its plain name, in the module's order."""
    for local_name, parameter in module.named_parameters():
        match = _LAYER.match(local_name)
        if match is None:
            # Outside the layers only a vocabulary is cut, by rows.
            split = Split.ROWS if getattr(parameter, "tensor_model_parallel", False) else Split.REPLICATED
            yield PlainTensor(local_name, parameter, split, 0, 0)
            continue
        layers = module.get_submodule(f"{match['tower']}trunk.layers.layers")
        layer = cast(Any, layers)[int(match["index"])]
        old, new, split = next(rule for rule in _RENAMES if match["rest"].startswith(rule[0]))
        if new.endswith("fc1.") and layer.config.gated_linear_unit:
            split = Split.GATE_UP
        name = f"{match['tower']}blocks.{layer.layer_number - 1}.{new}{match['rest'][len(old) :]}"
        config = layer.config
        yield PlainTensor(name, parameter, split, config.num_attention_heads, config.num_query_groups)


def to_local(tensor: PlainTensor, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Cut this rank's shard out of the plain tensor."""
    if tensor.split is Split.REPLICATED:
        return full
    if tensor.split is Split.COLUMNS:
        return full.chunk(tp_size, dim=1)[tp_rank].contiguous()
    if tensor.split is Split.ROWS:
        return full.chunk(tp_size, dim=0)[tp_rank].contiguous()
    if tensor.split is Split.GATE_UP:
        by_rank = rearrange(full, "(gate_up tp f) ... -> tp gate_up f ...", gate_up=2, tp=tp_size)
        return rearrange(by_rank[tp_rank], "gate_up f ... -> (gate_up f) ...").contiguous()
    heads, groups = tensor.num_heads, tensor.num_kv_heads
    by_head = rearrange(full, "(n k) ... -> n k ...", n=heads + 2 * groups)
    query, key, value = by_head.split([heads, groups, groups])
    by_group = torch.cat([query.unflatten(0, (groups, -1)), key.unsqueeze(1), value.unsqueeze(1)], dim=1)
    return rearrange(by_group.chunk(tp_size)[tp_rank], "g n k ... -> (g n k) ...").contiguous()


def to_plain(tensor: PlainTensor, shards: list[Tensor]) -> Tensor:
    """Put the shards of all tensor ranks together again; the inverse of `to_local`."""
    if tensor.split is Split.REPLICATED:
        return shards[0]
    if tensor.split is Split.COLUMNS:
        return torch.cat(shards, dim=1)
    if tensor.split is Split.ROWS:
        return torch.cat(shards, dim=0)
    if tensor.split is Split.GATE_UP:
        return rearrange(shards, "tp (gate_up f) ... -> (gate_up tp f) ...", gate_up=2)
    heads, groups = tensor.num_heads, tensor.num_kv_heads
    by_group = rearrange(torch.cat(shards), "(g n k) ... -> g n k ...", g=groups, n=heads // groups + 2)
    query, key, value = by_group.split([heads // groups, 1, 1], dim=1)
    return torch.cat([rearrange(part, "g n k ... -> (g n k) ...") for part in (query, key, value)])


def gather_plain(tensor: PlainTensor, local: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the plain tensor of a local one (a weight, a gradient or a moment); collective over the tensor ranks."""
    tp_size = dist.get_world_size(tp_group)
    if tensor.split is Split.REPLICATED or tp_size == 1:
        return to_plain(tensor, [local])
    shards = [torch.empty_like(local) for _ in range(tp_size)]
    dist.all_gather(shards, local.contiguous(), group=tp_group)
    return to_plain(tensor, shards)


def fill(module: nn.Module, mesh: Mesh, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Set every parameter of this rank from a source of plain tensors, called with plain name and full shape.

    All are NaN until they are set, so that none can keep what its memory held. Errors: CheckpointError names the
    parameter that the source left unset or gave values that are not finite.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
        for tensor in plain_tensors(module):
            full = source(tensor.name, tensor.plain_shape(mesh.tp_size))
            tensor.parameter.copy_(to_local(tensor, full, mesh.tp_rank, mesh.tp_size))
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{name} has no finite initial value; every parameter needs one")

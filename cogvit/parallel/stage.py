"""This rank's layers of a model as Megatron's schedule sees them, whatever the layers are."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cogvit.parallel.mesh import Mesh

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.tensor_parallel.mappings import (  # isort: skip
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlock  # isort: skip


def offloaded() -> saved_tensors_hooks:
    """Keep what autograd saves in host memory; weights, which stay where they are anyway, are left there."""

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if isinstance(tensor, nn.Parameter):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor)

    def unpack(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved[1].to(saved[0], non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


class TrunkStage(nn.Module):
    """This rank's layers of one tower, with what Megatron's schedule asks of a model."""

    def __init__(self, layers: TransformerBlock, mesh: Mesh, num_tokens: int, *, offload: bool) -> None:
        super().__init__()
        self.mesh = mesh
        self.num_tokens = num_tokens  # S: the rows that travel between stages
        self.offload = offload
        self.config = layers.config
        self.model_type = ModelType.encoder_or_decoder
        self.layers = layers

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        """Take the previous stage's output (the schedule calls it before each forward)."""
        self.layers.set_input_tensor(received[0])

    def run(self, x_SD: Tensor | None, stream: PackedSeqParams) -> Tensor:
        """Run the layers on the embedded tokens, or on the previous stage's output where x_SD is None.

        stream: what the layers need to know of the pack.
        Returns [S, 1, D] for the next stage (a share of S under sequence parallelism), or [S, D] on the last.
        """
        x_S1D = None if x_SD is None else x_SD.unsqueeze(1)
        if x_S1D is not None and self.config.sequence_parallel:
            x_S1D = scatter_to_sequence_parallel_region(x_S1D)
        with offloaded() if self.offload else nullcontext():
            x_S1D = self.layers(hidden_states=x_S1D, attention_mask=None, packed_seq_params=stream)
        if not self.mesh.is_last_stage:
            return x_S1D
        if self.config.sequence_parallel:
            x_S1D = gather_from_sequence_parallel_region(x_S1D, tensor_parallel_output_grad=False)
        return x_S1D.squeeze(1)

"""Runs the trunk on a CUDA device without data and prints what it did as JSON; in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.fake_cuda import fake

TOKENS, SLOTS = 16_384, 64
# Images of a NaFlex pack: patches of each; what is left is padding.
LENGTHS = (*range(200, 1000, 40), 1024, 1024, 576, 576, 256)


def mesh_of(tp: int, dp: int = 1) -> Any:
    """Rank 0 of tp * dp ranks."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from cogvit.parallel.mesh import Mesh

    parallel_state.destroy_model_parallel()
    fake.world_of(tp * dp)
    parallel_state.initialize_model_parallel(tp, 1, order="tp-cp-ep-pp-dp", create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    return Mesh(0, tp * dp, 0, tp, 0, 1, 0, dp, torch.device(fake.DEVICE))


@contextmanager
def count_saved(trace: fake.Trace, parameters: set[int]) -> Iterator[None]:
    """Count the bytes that autograd keeps of what runs inside, parameters left out."""
    import torch

    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if tensor.is_cuda and storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    trace.saved_bytes = sum(storage.nbytes() for storage in kept.values())


def fused(stage: Any, trace: fake.Trace) -> None:
    """Let each piece between products be one kernel, as where torch.compile makes it; it cannot without a device."""
    from cogvit.parallel.pieces import Pieces, activated, heads, normalized, with_branch

    keeps = {normalized: True, heads: True, activated: True, with_branch: False}  # cogvit_l has no LayerScale
    pieces = Pieces(*(fake.as_one_kernel(trace, piece, keeps=kept) for piece, kept in keeps.items()))
    for module in stage.modules():
        if hasattr(module, "pieces"):
            module.pieces = pieces


def step(tp: int, recompute: str, depth: int, fusion: bool = False) -> dict[str, Any]:
    """One forward and backward of cogvit_l in bf16 on one pack."""
    import torch

    from cogvit.batch import HostView, PackedImages
    from cogvit.config import ActivationConfig, ParallelConfig
    from cogvit.parallel.encoder import VisionStage
    from configs.models import cogvit_l_vision

    mesh, trace = mesh_of(tp), fake.Trace()
    parallel = ParallelConfig(tp=tp, sequence=tp > 1)
    with fake.on_fake_cuda(trace), torch.device(fake.DEVICE):
        stage = VisionStage(
            replace(cogvit_l_vision(), depth=depth),
            mesh,
            parallel,
            ActivationConfig(recompute),
            num_tokens=TOKENS,
            num_slots=SLOTS,
            fusion="off",
        )
        images = PackedImages(
            patches=torch.empty(TOKENS, 588, dtype=torch.uint8),
            row_col=torch.empty(TOKENS, 2, dtype=torch.int32),
            cu_seqlens=torch.empty(SLOTS + 2, dtype=torch.int32),
            grid_hw=torch.empty(SLOTS, 2, dtype=torch.int32),
            key=torch.empty(SLOTS, dtype=torch.int64),
            weight=torch.empty(SLOTS),
            host=HostView((*LENGTHS, *[0] * (SLOTS - len(LENGTHS)), TOKENS - sum(LENGTHS))),
        )
        if fusion:
            fused(stage, trace)
        parameters = {parameter.untyped_storage()._cdata for parameter in stage.parameters()}
        trace.clear()
        with count_saved(trace, parameters), torch.autocast("cuda", torch.bfloat16):
            features = stage(images, torch.empty(TOKENS, dtype=torch.bool))
            loss = features.patch_TD.sum()
        forward = dict(trace.calls)
        loss.backward()
    return {
        "forward": forward,
        "calls": dict(trace.calls),
        "products": dict(trace.products),
        "waits": dict(trace.waits),
        "collectives": trace.collectives,
        "kernels": trace.kernels,
        "milliseconds": trace.milliseconds(14 * depth * stage.cfg.embed_dim * sum(n * n for n in LENGTHS)),
        "other_bytes": trace.other_bytes,
        "saved_gib": trace.saved_bytes / 2**30,
        "out": str(features.patch_TD.dtype),
        "gradients": sorted({str(parameter.grad.dtype) for parameter in stage.parameters()}),
    }


def language_step(tp: int, depth: int) -> dict[str, Any]:
    """One forward and backward of GLM-4-9B's layers and head in bf16 on one pack."""
    import torch

    from cogvit.batch import HostView, PackedSequence
    from cogvit.config import ActivationConfig, ParallelConfig
    from cogvit.model.language_config import LanguageConfig
    from cogvit.parallel.language import LanguageStage

    mesh, trace = mesh_of(tp), fake.Trace()
    cfg = LanguageConfig("glm4", 151_552, 4096, depth, 32, 2, 128, 13_696, rotary_fraction=0.5, qkv_bias=True)
    with fake.on_fake_cuda(trace), torch.device(fake.DEVICE):
        parallel = ParallelConfig(tp=tp, sequence=tp > 1)
        stage = LanguageStage(cfg, mesh, parallel, ActivationConfig(), num_tokens=8192, fusion="off")
        sequence = PackedSequence(
            ids=torch.empty(8192, dtype=torch.int64),
            position=torch.empty(3, 8192, dtype=torch.int32),
            cu_seqlens=torch.empty(6, dtype=torch.int32),
            visual_row=torch.empty(8192, dtype=torch.int32),
            labels=torch.empty(8192, dtype=torch.int64),
            weight=torch.empty(8192),
            key=torch.empty(4, dtype=torch.int64),
            host=HostView((4000, 3000, 100, 0, 1092), labels=3000),
        )
        visual_ED = torch.empty(1024, 4096, requires_grad=True)
        trace.clear()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = stage(sequence, visual_ED)
            loss = stage.loss(hidden, sequence)
        forward = dict(trace.calls)
        loss.backward()
    return {
        "forward": forward,
        "products": dict(trace.products),
        "waits": dict(trace.waits),
        "collectives": trace.collectives,
        "out": str(loss.dtype),
        "gradients": sorted({str(parameter.grad.dtype) for parameter in stage.parameters()}),
    }


def resized_table(deterministic: bool) -> list[str]:
    """The operators of a learned table of positions on another grid, forward and backward."""
    import torch

    from cogvit.model import position

    trace = fake.Trace()
    torch.use_deterministic_algorithms(deterministic)
    with fake.on_fake_cuda(trace), torch.device(fake.DEVICE):
        position.resized_table(torch.empty(1, 64, 4, 4, requires_grad=True), (3, 5)).sum().backward()
    torch.use_deterministic_algorithms(False)
    return sorted(trace.calls)


def main(library: str) -> None:
    """Print the figures of every case."""
    fake.pretend(Path(library))
    cases = {
        "none": (1, "none", 24),
        "fused": (1, "none", 24, True),
        "full": (1, "full", 24),
        "selective": (1, "selective", 4),
        "selective_2": (1, "selective", 2),
        "sequence": (2, "none", 2),
        "sequence_fused": (2, "none", 2, True),
    }
    found: dict[str, Any] = {name: step(*case) for name, case in cases.items()}
    found["language"] = language_step(2, 2)
    found["table"] = {str(asked): resized_table(asked) for asked in (False, True)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])

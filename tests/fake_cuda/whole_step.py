"""A step of stage 3 on one rank of a layout, on a CUDA device without data: how many bytes live at once.

usage: python -m tests.fake_cuda.whole_step LIBRARY PRESET --tp T --dp D [--images N] [trainer's flags]

LIBRARY is what `tests.fake_cuda.fake.build_guard` compiled. Prints JSON. Live bytes are those of all tensors on the
device, by the lives of their storages: parameters, gradients, what is kept for backward, what a kernel gives. What the
optimizer holds on a rank (master copies, moments, averaged gradients, buckets) is added as ZeRO cuts it; a step runs in
none. Nothing is known here of fragments, of a kernel's own workspace and of what CUDA and NCCL take.
"""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.fake_cuda import fake
from tests.fake_cuda.measure import mesh_of

_FP32_BYTES, _BUCKETS = 4, 3  # of gradients: filled, under way twice
_MOMENTS = {"adamw": 2, "muon": 1, "sgd": 1}


class Live:
    """Bytes on the device, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensor: Any) -> None:
        """Count a tensor's storage until it dies."""
        storage, key = tensor.untyped_storage(), tensor.untyped_storage()._cdata
        if key in self._held:
            return
        size = storage.nbytes()

        def forget(reference: Any) -> None:
            self._held.pop(key, None)
            self.now -= size

        self._held[key] = weakref.ref(storage, forget)
        self.now += size
        self.most = max(self.most, self.now)


def watching(live: Live) -> Any:
    """Return a mode under which what operators give is counted, and what only data or a driver can do is done by none.

    Numbers read from tensors without data are 1: seeds of initial weights.
    """
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith("aten.is_pinned"):
                return True
            try:
                out = func(*args, **(kwargs or {}))
            except DataDependentOutputException:
                return 1
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.is_cuda:
                    live.hold(x)
            return out

    return Watch()


def batch_of(config: Any, images: int) -> Any:
    """A pack of samples of the greatest length, each with one image."""
    import torch

    from cogvit.batch import Batch, HostView, PackedImages, PackedSequence, SharpImages

    data, own, vision = config.data, config.language, config.vision
    rows, columns = vision.base_grid
    patches, slots = rows * columns * images, data.images_per_pack
    tokens, absent = own.max_tokens * images, slots - images
    pool = config.adapter.spatial_pool
    seen = rows * columns // pool**2 + 2 * (config.expert.every > 0)
    shown = PackedImages(
        patches=torch.empty(patches, 3 * vision.patch_size**2, dtype=torch.uint8),
        row_col=torch.empty(patches, 2, dtype=torch.int32),
        cu_seqlens=torch.empty(slots + 2, dtype=torch.int32),
        grid_hw=torch.empty(slots, 2, dtype=torch.int32),
        key=torch.empty(slots, dtype=torch.int64),
        weight=torch.empty(slots),
        host=HostView(
            (*[rows * columns] * images, *[0] * absent, 0), (*[(rows, columns)] * images, *[(0, 0)] * absent)
        ),
    )
    sequence = PackedSequence(
        ids=torch.empty(tokens, dtype=torch.int64),
        position=torch.empty(3, tokens, dtype=torch.int32),
        cu_seqlens=torch.empty(slots + 2, dtype=torch.int32),
        visual_row=torch.empty(tokens, dtype=torch.int32),
        labels=torch.empty(tokens, dtype=torch.int64),
        weight=torch.empty(tokens),
        key=torch.empty(slots, dtype=torch.int64),
        host=HostView(
            (*[own.max_tokens] * images, *[0] * absent, 0),
            labels=images * (own.max_tokens - seen),
            experts=images * (seen - 1),
        ),
        expert=torch.empty(tokens, dtype=torch.bool) if config.expert.every else None,
    )
    sharp = None
    if config.cross.image_size:
        own_patches = torch.empty(images * config.cross.rows_per_image, 3 * config.cross.patch_size**2)
        sharp = SharpImages(own_patches.to(torch.uint8), (*[1] * images, *[0] * absent))
    return Batch(shown, None, None, (None,) * slots, sequence, sharp=sharp)


def measure(config: Any, tp: int, dp: int, images: int) -> dict[str, Any]:
    """Two microbatches of a step: the second meets the gradients of the first."""
    import torch

    from cogvit.config.recipe import frozen_parts
    from cogvit.model.eva import second_encoder
    from cogvit.objective.language import JointModel, Language
    from cogvit.parallel.language import LanguageStage
    from cogvit.parallel.schedule import Schedule
    from cogvit.stages.language import language_shape
    from cogvit.training.build import vision_stage

    data = replace(config.data, tokens_per_pack=config.vision.base_grid[0] ** 2 * images)
    tokens = config.language.max_tokens * images
    parallel = replace(config.parallel, tp=tp, pp=1, sequence=tp > 1)
    config = replace(config, data=replace(data, text_tokens_per_pack=tokens), parallel=parallel, fusion="off")
    mesh, shape = mesh_of(tp, dp), language_shape(config)
    live, trace = Live(), fake.Trace()
    with fake.on_fake_cuda(trace), watching(live):
        with torch.device(fake.DEVICE):
            vision = vision_stage(config, mesh)
            memory = config.memory.language
            language = LanguageStage(shape, mesh, parallel, memory, num_tokens=tokens, fusion="off")
            cross = second_encoder(config.cross) if config.cross.image_size else None
            model = JointModel(vision, config.adapter, language, frozen_parts(config), cross)
            batch = batch_of(config, images)
        if model.cross is not None:
            model.cross.recompute = config.memory.vision.recompute != "none"
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parameters = sum(p.numel() for p in model.parameters())
        begun = live.most = live.now
        trace.clear()
        Language().train(model, [batch, batch], Schedule(mesh, config.precision))
    shares = _FP32_BYTES * learned * (2 + _MOMENTS[config.optim.name]) / dp
    buckets = _FP32_BYTES * min(_BUCKETS * config.zero.reduce_bucket_elements, learned) * (dp > 1)
    return {
        "layout": {"tp": tp, "dp": dp, "sequence": tp > 1},
        "images": images,
        "tokens": tokens,
        "parameters": parameters,
        "learned": learned,
        "begun_gb": begun / 1e9,
        "after_gb": live.now / 1e9,
        "peak_gb": live.most / 1e9,
        "optimizer_gb": shares / 1e9,
        "buckets_gb": buckets / 1e9,
        "total_gb": (live.most + shares + buckets) / 1e9,
        "kernels": trace.kernels,
        "waits": dict(trace.waits),
        "products": dict(trace.products),
    }


def main(argv: list[str]) -> None:
    """Print the figures."""
    library, preset, *words = argv
    fake.pretend(Path(library))
    from cogvit.config.arguments import take_flag
    from cogvit.config.flags import load_preset, parse

    tp, words = take_flag(words, "--tp")
    dp, words = take_flag(words, "--dp")
    images, words = take_flag(words, "--images")
    config = parse(load_preset(preset), words)
    json.dump(measure(config, int(tp or 1), int(dp or 1), int(images or 1)), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Other programs' encoders of the same size beside ours, forward and backward in bf16; those that are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from cogvit.model.config import CogViTConfig
from cogvit.model.vit import CogViT
from tools.bench._peers import TimmEncoder, TransformersEncoder
from tools.bench.encoder import MIXES, compared_shape, contenders, draw_images, measure, peak_bytes
from tools.gpu_check.work import Figures, Setting

_BATCHES = 2
_KINDS: dict[str, Callable[[CogViTConfig], nn.Module]] = {"timm": TimmEncoder, "transformers": TransformersEncoder}


def peers(setting: Setting) -> Figures:
    """Encode images of native sizes with each encoder of 24 layers of 1,024 channels: tokens a second, peak memory."""
    width, depth, heads = (32, 1, 2) if setting.small else (1024, 24, 16)
    cfg = compared_shape(width, depth, heads)
    missing, models = {}, {}
    for name, make in _KINDS.items():
        try:
            if find_spec(name) is None:
                raise ImportError("not installed")
            models[name] = make(cfg).to(setting.device)
        except Exception as error:  # of a version that does not fit, anything
            missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    mix = next(mix for mix in MIXES if mix.name == ("fit-256" if setting.small else "native"))
    batch_images = 2 if setting.small else 32
    images = draw_images(mix, batch_images * (1 if setting.small else _BATCHES))
    ways = contenders(images, batch_images, CogViT(cfg).to(setting.device), models)
    precision = "bf16"
    peaks = [0 if setting.small else peak_bytes(way, precision) for way in ways]
    tokens = sum(len(image.patches) for image in images)
    rows = [
        {"encoder": one.name, "forward_tokens_per_s": tokens / one.time.forward_s,
         "forward_backward_tokens_per_s": tokens / one.time.forward_backward_s,
         "peak_gib": one.peak_bytes / 2**30 if one.peak_bytes else None}
        for one in measure(ways, precision, 1 if setting.small else 3, peaks)
    ]  # fmt: skip
    return {"mix": mix.what, "images": len(images), "missing": missing, "encoders": rows, "torch": torch.__version__}

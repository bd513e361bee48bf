"""Tiny teacher checkpoints and the images they see, for tests; actors import this module too."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from cogvit.batch import Batch, DataPosition, PackedImages, SampleRef, StepBatch
from cogvit.errors import DataError
from cogvit.model.mim import TeacherWrapper
from cogvit.teacher.stream import FeatureRequest, Grid, Pixels

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SHAPE | {"vocab_size": 64, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
UNREADABLE = 13  # the sample id of an image that does not decode
LOST = 14  # of one whose shard is gone
FAULTY = 15  # of one that no code of ours expects


def siglip2() -> transformers.PreTrainedModel:
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SHAPE, patch_size=4, num_patches=16))


def dinov3() -> transformers.PreTrainedModel:
    config = transformers.DINOv3ViTConfig(**SHAPE, patch_size=8, image_size=32, num_register_tokens=3)
    return transformers.DINOv3ViTModel(config)


def siglip() -> transformers.PreTrainedModel:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE, patch_size=4, image_size=16))


def siglip2_with_text() -> transformers.PreTrainedModel:
    vision = SHAPE | {"patch_size": 4, "num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=TEXT))


class Convolutions(torch.nn.Module):
    """A teacher that is no transformer: 12 channels for each 4 x 4 px, from two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.GELU(), torch.nn.Conv2d(8, 12, 2, stride=2)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


def own() -> TeacherWrapper:
    """What `tests.teachers:own` names."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return TeacherWrapper(Convolutions(), feature_dim=12, patch_size=4)


def own_of_one_grid() -> TeacherWrapper:
    """One that sees 16 x 16 px whatever the student's grid is, in [0, 1]."""
    wrapper = own()
    return TeacherWrapper(wrapper.model, 12, out_grid=(4, 4), preprocess=lambda x: (x + 1) / 2, patch_size=4)


def own_of_another_width() -> TeacherWrapper:
    """One that says 10 channels and gives 12."""
    return TeacherWrapper(own().model, feature_dim=10, patch_size=4)


def no_wrapper() -> torch.nn.Module:
    """A module as it is."""
    return own().model


def failing() -> TeacherWrapper:
    """A function that does not find its weights."""
    raise FileNotFoundError("weights.pt is gone")


def write_teachers(directory: Path) -> dict[str, str]:
    """Write a siglip2 and a dinov3 checkpoint with random weights and return their paths by name."""
    paths = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, model in (("siglip2", siglip2()), ("dinov3", dinov3())):
            model.save_pretrained(directory / name)
            paths[name] = str(directory / name)
    return paths


def draw(sample: SampleRef, key: int | None, size_hw_px: tuple[int, int]) -> Pixels | None:
    """An image that depends on everything a decoder is given."""
    if sample.sample_id == UNREADABLE:
        return None
    if sample.sample_id == LOST:
        raise DataError("cannot read shard.tar: no such file")
    if sample.sample_id == FAULTY:
        raise RuntimeError("out of luck\nand of lines")
    rng = np.random.default_rng([sample.sample_id, 0 if key is None else key])
    return rng.integers(0, 256, (*size_hw_px, 3), dtype=np.uint8)


def draw_or_die(sample: SampleRef, key: int, size_hw_px: tuple[int, int], *, alive: str) -> Pixels | None:
    """Kill the process at the first image; later processes find the file `alive` and live."""
    if not os.path.exists(alive):
        Path(alive).touch()
        os._exit(1)
    return draw(sample, key, size_hw_px)


def draw_or_hang(
    sample: SampleRef, key: int, size_hw_px: tuple[int, int], *, alive: str, gil: bool = False
) -> Pixels | None:
    """Wait an hour, with the GIL or not, at the first image without the file `alive`; later ones find it and live."""
    if not os.path.exists(alive):
        Path(alive).touch()
        ctypes.PyDLL(None).sleep(3600) if gil else time.sleep(3600)
    return draw(sample, key, size_hw_px)


def draw_slowly(sample: SampleRef, key: int, size_hw_px: tuple[int, int]) -> Pixels | None:
    """Take a second for an image."""
    time.sleep(1.0)
    return draw(sample, key, size_hw_px)


def ref(sample_id: int) -> SampleRef:
    return SampleRef(sample_id, "shard.tar", 0, 0)


def request(sample_ids: tuple[int | None, ...], grids: tuple[Grid, ...], mask_ratio: float = 0.35) -> FeatureRequest:
    samples = tuple(None if sample_id is None else ref(sample_id) for sample_id in sample_ids)
    keys = tuple(1000 + slot for slot in range(len(samples)))
    return FeatureRequest(samples, grids, keys, mask_ratio)


def step_batch(step: int, packs: tuple[tuple[tuple[int, Grid], ...], ...]) -> StepBatch:
    """A step whose packs hold the given (sample id, grid) and one absent slot; 40 tokens each, the rest padding."""
    micro = []
    for pack in packs:
        lengths = [rows * columns for _, (rows, columns) in pack]
        bounds = [0, *np.cumsum(lengths).tolist(), sum(lengths), 40]
        images = PackedImages(
            patches=torch.zeros(40, 48, dtype=torch.uint8),
            row_col=torch.zeros(40, 2, dtype=torch.int32),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            grid_hw=torch.tensor([*(grid for _, grid in pack), (0, 0)], dtype=torch.int32),
            key=torch.tensor([*(step * 100 + sample_id for sample_id, _ in pack), 0]),
            weight=torch.tensor([*(1.0 for _ in pack), 0.0]),
        )
        micro.append(Batch(images, None, None, (*(ref(sample_id) for sample_id, _ in pack), None)))
    return StepBatch(tuple(micro), DataPosition("plan", step + 1))

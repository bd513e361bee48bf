"""Run directories as the trainer leaves them, written without training, and a small corpus to evaluate them on."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import nn

from cogvit.batch import DataPosition
from cogvit.config import DataConfig, RunConfig, TeacherConfig, TeachersConfig, to_json
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.text import TextTower
from cogvit.model.vit import CogViT
from cogvit.training.chrono import Chrono
from cogvit.training.state import TrainState, state_to_json
from data_pipeline.index import build_index
from tests.data.corpus import members, picture, write_tar
from tests.e2e.corpus import write_shards as write_numbers
from tests.teachers import write_teachers

COLORS = ("red", "green", "blue")
NUM_HELDOUT = 9  # of each source
VISION = CogViTConfig(image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
TEXT = TextConfig(embed_dim=32, depth=1, num_heads=2, max_tokens=16)


def write_run(directory: Path, config: RunConfig, modules: Mapping[str, nn.Module], step: int = 3) -> Path:
    """Write a run directory with one checkpoint of modules by the names of their parts."""
    checkpoint = directory / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    tensors = {
        f"master/{part}.{name}": tensor.detach().clone()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saving from one process
        dcp.save(tensors, checkpoint_id=checkpoint, no_dist=True)
    state = TrainState(step, DataPosition("plan", step), images=10 * step, tokens=90 * step, chrono=Chrono(step_s=1.5))
    (checkpoint / "state.json").write_text(json.dumps(state_to_json(state)))
    files = {
        str(file.relative_to(checkpoint)): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 2, "step": step, "files": files}))
    (directory / "config.json").write_text(json.dumps(to_json(config)))
    (directory / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")
    return directory


def tinted(height_px: int, width_px: int, seed: int, channel: int) -> bytes:
    """An encoded picture of dark noise with one bright channel."""
    pixels = np.random.default_rng(seed).integers(0, 60, (height_px, width_px, 3), dtype=np.uint8)
    pixels[..., channel] += 180
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_shards(directory: Path) -> DataConfig:
    """Write and index shards of a labeled source, `colors`, and a captioned one, `things` whose captions are equal."""
    for split, seed in (("train", 100), ("heldout", 200)):
        entries = []
        for number in range(NUM_HELDOUT):
            label = number % len(COLORS)
            color = COLORS[label]
            captions = {"en": [f"a {color} picture"], "zh": [f"图{label}"]}
            image = tinted(12 + 4 * (number % 2), 16, seed + number, label)
            entries += members(f"c{number}", image, source="colors", captions=captions, label=label)
            image = picture(16, 12, seed + number)
            entries += members(f"t{number}", image, source="things", captions={"en": ["a thing"]})
        write_tar(directory / split / "shard-00000.tar", entries)
        assert all(not report.problems for report in build_index(str(directory / split)))
    return DataConfig(shards=str(directory / "train"), eval_shards=str(directory / "heldout"), max_patches=16)


def contrast_run(directory: Path, data: DataConfig, *, blind: bool = False) -> Path:
    """A stage-2 run with random weights, or one whose encoder tells nothing of an image but its size."""
    torch.manual_seed(1)
    vision = CogViT(VISION)
    if blind:
        nn.init.zeros_(vision.patch_embed.proj.weight)
    config = RunConfig(objective="contrast", vision=VISION, text=TEXT, proj_dim=8, data=data)
    modules = {
        "vision": vision,
        "text": TextTower(TEXT),
        "vision_proj": nn.Linear(VISION.embed_dim, 8),
        "text_proj": nn.Linear(TEXT.embed_dim, 8),
    }
    return write_run(directory, config, modules)


def distill_run(directory: Path, config: RunConfig, teacher_dims: Mapping[str, int]) -> Path:
    """A stage-1 run with random towers whose heads predict zero."""
    torch.manual_seed(2)
    heads = {f"heads.{name}": nn.Linear(VISION.embed_dim, dim) for name, dim in teacher_dims.items()}
    for head in heads.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return write_run(
        directory, replace(config, objective="distill", vision=VISION), {"vision": CogViT(VISION), **heads}
    )


def store_run(path: Path) -> RunConfig:
    """Write two shards and two teachers, and return the run of a feature store over them."""
    write_numbers(path / "shards", "a", 70)
    write_numbers(path / "shards", "b", 5)
    members = tuple(TeacherConfig(name, directory) for name, directory in write_teachers(path).items())
    return RunConfig(
        vision=CogViTConfig(image_size=32, patch_size=8, embed_dim=32, num_heads=2),
        data=DataConfig(shards=str(path / "shards"), max_patches=16, duplicates="keep"),
        teachers=TeachersConfig(members=members),
        out=str(path / "store"),
    )

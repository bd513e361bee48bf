"""What is evaluated on what: the towers of a run or an export, with held-out shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cogvit.config import RunConfig, load_config
from cogvit.config.split import held_out_part
from cogvit.errors import ConfigError
from cogvit.evaluation.ranks import ALONE, Ranks
from cogvit.evaluation.samples import Samples, read_samples, rows_of
from cogvit.model.vit import CogViT
from cogvit.model.vlm import VisionLanguageModel
from cogvit.training.joint import is_joint, load_joint
from cogvit.training.restore import Towers, is_run, load_towers
from data_pipeline.index import Index, load_index
from data_pipeline.sizing import Sizing, sizing_of


@dataclass(frozen=True)
class Subject:
    """The towers of a run or an export, on a GPU where there is one, and what they are shown."""

    path: Path
    config: RunConfig | None  # None for an export
    towers: Towers
    sizing: Sizing
    heldout: Index
    samples: tuple[Samples, ...]  # of the held-out shards, one for each source
    ranks: Ranks = ALONE  # who shares the encoding
    trained_on: tuple[str, ...] = ()  # sources that are left out, since all of their images are training images
    joint: VisionLanguageModel | None = None  # of stage 3
    talks: Index | None = None  # held-out samples for it, of which some may be without an image

    @property
    def labeled(self) -> list[Samples]:
        """The sources whose samples have classes."""
        return [samples for samples in self.samples if samples.label is not None]

    @property
    def captioned(self) -> list[Samples]:
        """The sources whose samples have captions."""
        return [samples for samples in self.samples if samples.captions]


def load_subject(
    path: Path, data: str = "", index_dir: str = "", ranks: Ranks = ALONE, device: torch.device | None = None
) -> Subject:
    """Load a run's newest good checkpoint, or an export, and what is said of the held-out shards.

    data and index_dir are by default what the run holds out and its data.index_dir; device is a GPU where torch
    sees one.
    Errors: ConfigError, CheckpointError or DataError when one of them is missing or cannot be used.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; pass a run directory or an export")
    joint = load_joint(path) if is_joint(path) else None
    if joint is None:
        towers = load_towers(path)
    elif isinstance(joint.vision, CogViT):
        towers = Towers(joint.vision)
    else:
        raise ConfigError(f"{path} has an encoder of another family; evaluation reads CogViT's")
    config = load_config(path / "config.json") if is_run(path) else None
    if config is not None:
        index_dir = index_dir or config.data.index_dir
    part = held_out_part(config.data) if config is not None else None
    if not data and part is None:
        raise ConfigError(f"{path} names no held-out shards; pass --data PATTERN")
    heldout = (
        load_index(data, index_dir) if data or part is None else load_index(part.shards, index_dir, where=part.where)
    )
    talks, heldout = heldout, heldout.having("image")
    field = config.data.caption_field if config is not None else ""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module in (joint, towers.vision, towers.text, towers.vision_proj, towers.text_proj, *towers.heads.values()):
        if module is not None:
            module.to(device)
    return Subject(
        path,
        config,
        towers,
        _sizing(config, towers.vision),
        heldout,
        tuple(read_samples(heldout, source, rows_of(heldout, source), field) for source in heldout.sources),
        ranks,
        joint=joint,
        talks=talks,
    )


def _sizing(config: RunConfig | None, vision: CogViT) -> Sizing:
    """As the run sized images; for an export as its preprocessor_config.json says."""
    if config is not None:
        return sizing_of(config)
    cfg, own = vision.cfg, vision.preprocessing
    kind: Literal["square", "naflex"] = "square" if own.square else "naflex"
    return Sizing(kind, cfg.patch_size, cfg.base_grid, own.max_patches, enlarge=own.enlarge, multiple=own.multiple)

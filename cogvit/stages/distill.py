"""Stage 1's room: masked distillation from frozen teachers. Who makes its targets is in `distill_targets.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from einops import repeat
from numpy.typing import NDArray

from cogvit.batch import Reads
from cogvit.config import RunConfig, TeacherConfig
from cogvit.config.rules import Tower, is_rate, require, vision_tower
from cogvit.stages.protocol import ReadsShards

if TYPE_CHECKING:  # a configuration is checked before any of these is imported
    from torch import Tensor, nn

    from cogvit.evaluation.examples import Example
    from cogvit.evaluation.subject import Subject
    from cogvit.parallel.mesh import Mesh
    from cogvit.stages.cost import Load
    from cogvit.teacher.targets import Targets
    from cogvit.training.feed import Corpus
    from cogvit.training.objective import Objective

MASK_COLOR = (255, 0, 128)


@dataclass(frozen=True)
class DistillStage(ReadsShards):
    """The vision tower, images alone, and teachers who say what is behind the masked patches."""

    title: str = "Stage 1: distillation"
    shows: str = ""
    fields: tuple[str, ...] = (
        "teachers.members", "teachers.members.", "teachers.source", "teachers.store", "teachers.mask_ratio",
        "teachers.visible_weight",
        "teachers.actors_per_teacher", "teachers.actor_cpus", "teachers.actor_gpus", "teachers.share_gpus",
        "teachers.in_flight_steps", "teachers.max_in_flight_bytes", "teachers.max_wait_s", "teachers.precision",
        "teachers.compile", "teachers.stats", "teachers.stats_images", "teachers.standardize",
    )  # fmt: skip
    execution: tuple[str, ...] = (
        "teachers.actors_per_teacher", "teachers.actor_cpus", "teachers.actor_gpus", "teachers.share_gpus",
        "teachers.in_flight_steps", "teachers.max_in_flight_bytes", "teachers.max_wait_s",
        "teachers.source", "teachers.store", "teachers.stats_images",
    )  # fmt: skip
    reads: Reads = "images"
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = (("masked patch", MASK_COLOR),)

    def towers(self, config: RunConfig) -> tuple[Tower, ...]:
        """The vision tower alone."""
        return (vision_tower(config),)

    def check(self, config: RunConfig) -> None:
        """Check the teachers. Errors: ConfigError."""
        encoder = config.text_encoder.path
        require(not encoder, f"--text-encoder.path {encoder} is of stage 2")
        _check_teachers(config)
        require(
            not (config.deterministic and config.teachers.compile and self.asks_actors(config)),
            "--deterministic: a compiled teacher is tuned by the clock, with other last bits each time; pass"
            " --teachers.compile false, or store its features and pass --teachers.source store",
        )

    def completed(self, config: RunConfig) -> RunConfig:
        """Nothing is left open; looks for the teachers, their store and --init."""
        check_files(config)
        return config

    def asks_actors(self, config: RunConfig) -> bool:
        """Unless all features are stored."""
        return config.teachers.source != "store"

    def targets(self, config: RunConfig, corpus: Corpus, mesh: Mesh) -> Targets | None:
        """The teachers' actors or their store; the Ray cluster of actors is there already."""
        from cogvit.stages.distill_targets import shared_targets  # transformers takes seconds

        return shared_targets(config, corpus.train, corpus.held_out, mesh)

    def build(self, config: RunConfig, mesh: Mesh, target_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
        """The student with a head for each target, and the masked loss."""
        from cogvit.objective.distill import Distill, DistillModel, Term
        from cogvit.training.build import fill_on_device, initial_weights, vision_stage

        terms = {
            member.name + part: Term(weight, member.error)
            for member in config.teachers.members
            for part, weight in member.parts.items()
        }
        recompute = config.memory.projection_recompute
        model = DistillModel(vision_stage(config, mesh), target_dims, recompute=recompute)
        given = started_from(config) if config.init else {}
        # Heads guess the mean at first, which the targets were standardized to. A cosine has no slope at 0.
        zeros = {f"heads.{name}.weight": 0.0 for name, term in terms.items() if term.error != "cosine"}
        fill_on_device(model, mesh, initial_weights(config, given, zeros, {}))
        return model, Distill(terms, config.teachers.mask_ratio, config.teachers.visible_weight)

    def loads(self, config: RunConfig) -> list[Load]:
        """The student; teachers count with nothing."""
        from cogvit.stages.cost import vision_load

        return [vision_load(config)]

    def concern(self, config: RunConfig, step: int, values: dict[str, float]) -> str:
        """Nothing that the losses do not say."""
        return ""

    def examples(self, subject: Subject) -> list[Example]:
        """None: it has learned no words."""
        return []

    def shade(self, pixels: NDArray[np.uint8], key: int, config: RunConfig) -> NDArray[np.uint8]:
        """Tint the patches that are masked."""
        from cogvit.objective.masking import mask_image

        patch_px = config.vision.patch_size
        rows, columns = pixels.shape[0] // patch_px, pixels.shape[1] // patch_px
        mask_T = mask_image(key, rows * columns, config.teachers.mask_ratio)
        masked = repeat(mask_T, "(rows columns) -> (rows p) (columns q) 1", rows=rows, p=patch_px, q=patch_px).numpy()
        return np.where(masked, pixels // 3 + np.array(MASK_COLOR) // 3 * 2, pixels).astype(np.uint8)


def check_files(config: RunConfig) -> None:
    """Look for the files that stage 1 needs before it trains. Errors: ConfigError or CheckpointError."""
    from cogvit.model.pretrained import check_location
    from cogvit.teacher.own import is_own
    from cogvit.training.restore import check_init

    for member in config.teachers.members:
        if not is_own(member.path):
            check_location(member.path, "teacher")
    if config.teachers.source != "online":
        from cogvit.teacher.store import read_manifest

        for name in (member.name + part for member in config.teachers.members for part in member.parts):
            manifest = Path(config.teachers.store) / name / "manifest.json"
            read_manifest(manifest, "pass another --teachers.store")
    if config.init:
        check_init(config)


def started_from(config: RunConfig) -> dict[str, Tensor]:
    """Return the plain tensors that a run takes from its --init: the vision tower's.

    Errors: CheckpointError when it is another vision tower.
    """
    from cogvit.training.restore import initial_towers

    return {name: tensor for name, tensor in initial_towers(config).items() if name.startswith("vision.")}


def _check_teachers(config: RunConfig) -> None:
    teachers = config.teachers
    require(bool(teachers.members), "stage 1 needs teachers.members: at least one teacher")
    names = [member.name for member in teachers.members]
    require(len(set(names)) == len(names) and all(names), f"teacher names must be set and differ: {names}")
    for member in teachers.members:
        _check_teacher(member)
    for name in ("actors_per_teacher", "in_flight_steps", "stats_images"):
        require(getattr(teachers, name) >= 1, f"teachers.{name}={getattr(teachers, name)} must be at least 1")
    for name, holds in (("actor_cpus", teachers.actor_cpus > 0.0), ("actor_gpus", teachers.actor_gpus >= 0.0)):
        share = getattr(teachers, name)
        require(
            holds and (share <= 1.0 or share.is_integer()),
            f"teachers.{name}={share} must be a share of one{'' if holds else ' above 0'}, or a whole number of them",
        )
    require(
        teachers.max_in_flight_bytes >= 1,
        f"teachers.max_in_flight_bytes={teachers.max_in_flight_bytes} must be at least 1",
    )
    require(0.0 < teachers.max_wait_s < math.inf, f"teachers.max_wait_s={teachers.max_wait_s} must be positive")
    require(is_rate(teachers.visible_weight), f"teachers.visible_weight={teachers.visible_weight} must not be negative")
    require(0.0 < teachers.mask_ratio < 1.0, f"teachers.mask_ratio={teachers.mask_ratio} must be in (0, 1)")
    require(
        teachers.source == "store" or not 0.0 < config.parallel.step_timeout_s <= teachers.max_wait_s,
        f"parallel.step_timeout_s={config.parallel.step_timeout_s} must be above"
        f" teachers.max_wait_s={teachers.max_wait_s}: a step may wait that long for features",
    )
    require(
        teachers.source == "online" or config.data.order == "planned",
        f"--teachers.source {teachers.source} finds features by the index, and --data.order sequential has none; pass"
        " --teachers.source online",
    )
    for name, off in (("flip", False), ("crop", 1.0), ("color", 0.0)):
        require(
            teachers.source == "online" or getattr(config.data, name) == off,
            f"--teachers.source {teachers.source} holds features of images as they are, and --data.{name} shows the"
            f" student others; pass --data.{name} {str(off).lower()} or --teachers.source online",
        )
    require(
        teachers.source == "online" or not (config.data.budgets_patches or config.data.budget_schedule),
        f"--teachers.source {teachers.source} holds features of one size of each image; leave data.budgets_patches and"
        " data.budget_schedule empty, or pass --teachers.source online",
    )
    require(
        teachers.source == "online" or bool(teachers.store),
        f"--teachers.source {teachers.source} needs --teachers.store DIR (make one with tools.precompute_features)",
    )


def _check_teacher(member: TeacherConfig) -> None:
    require(
        not member.name.endswith("_summary"), f"teacher {member.name!r}: names that end in _summary are of summaries"
    )
    for what, weight in (("weight", member.weight), ("summary_weight", member.summary_weight)):
        require(is_rate(weight), f"{what}={weight} of teacher {member.name!r} must be finite and not negative")
    require(bool(member.parts), f"teacher {member.name!r} has no loss: weight and summary_weight are both 0")
    require(member.layer < 0, f"layer={member.layer} of teacher {member.name!r} counts from the end: -1 is the last")

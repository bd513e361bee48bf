"""Trains: `python -m cogvit.train PRESET [flags]`, one process per rank under torchrun or srun, also bare.

This is the composition root: it reads the configuration, puts data, teachers, model, engine and loop together, and turns
errors into one line and an exit status. The same command with the same --out resumes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cogvit.config import RunConfig, load_config, recipe_differences, to_json
from cogvit.errors import CogViTError, ConfigError
from cogvit.flags import help_text, load_preset, parse

if TYPE_CHECKING:
    from cogvit.batch import DataPosition, StepBatch
    from cogvit.parallel.mesh import Mesh
    from cogvit.teacher.stream import FeatureSource
    from cogvit.training.engine import Objective
    from data_pipeline.index import Index

REQUEUE = 75
USAGE = """usage: python -m cogvit.train PRESET [flags]

Trains a stage. PRESET names a file of configs/ (demo_stage1, stage1_cogvit_l, ...) or is a path to a config.json.
Run it bare, under torchrun, or under srun; the same command in the same --out resumes.
--dry-run prints the resolved configuration and stops.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n" + help_text())
        return 0 if argv else 2
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    try:
        dry_run = "--dry-run" in argv
        config = parse(load_preset(argv[0]), [word for word in argv[1:] if word != "--dry-run"])
        config.check(world_size)
        if dry_run:
            print(json.dumps(to_json(config), indent=1))
            return 0
        if not config.out:
            raise ConfigError("--out DIR is needed: the run directory")
        claim_directory(config, writer=rank == 0)
        return run(config)
    except CogViTError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def claim_directory(config: RunConfig, *, writer: bool) -> None:
    """Make the run directory, or accept it as the same run's. Errors: ConfigError when it holds another run."""
    path = Path(config.out) / "config.json"
    if path.exists():
        differences = recipe_differences(load_config(path), config)
        if differences:
            raise ConfigError(f"{config.out} holds another run ({'; '.join(differences[:3])}); choose another --out")
    if writer:
        (Path(config.out) / "logs").mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_json(config), indent=1) + "\n")


def run(config: RunConfig) -> int:
    """Train to the end or to a requested stop; returns 0 or 75. Heavy libraries are imported from here on."""
    from cogvit.parallel.mesh import start_mesh, stop_mesh
    from cogvit.training.checkpoint import Checkpoints
    from cogvit.training.engine import Engine
    from cogvit.training.loop import Evaluation, train
    from cogvit.training.meter import Meter
    from cogvit.training.signals import StopRequest
    from data_pipeline.index import load_index

    mesh = start_mesh(config.parallel)
    with ExitStack() as resources:
        resources.callback(stop_mesh)
        stop = resources.enter_context(StopRequest())
        index = load_index(config.data.shards, config.data.index_dir)
        source = resources.enter_context(feature_source(config, index, mesh)) if config.objective == "distill" else None
        model, objective = build(config, mesh, {} if source is None else source.dims)
        engine = Engine(model, config, mesh)
        checkpoints = Checkpoints(
            Path(config.out) / "checkpoints", mesh, config.checkpoint.every_steps, config.checkpoint.keep_last
        )
        state = checkpoints.resume(engine) or fresh_state(config, index)
        meter = resources.enter_context(Meter(Path(config.out), config, writer=mesh.is_writer, start_step=state.step))
        evaluation = Evaluation(config.eval.every_steps, lambda: held_out(config, mesh, source))
        batches = training_batches(config, index, mesh, source, state.position)
        state = train(
            engine,
            objective,
            batches,
            state,
            steps=config.schedule.steps,
            checkpoints=checkpoints,
            evaluation=evaluation,
            meter=meter,
            stop=stop,
        )
    return 0 if state.step >= config.schedule.steps else REQUEUE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

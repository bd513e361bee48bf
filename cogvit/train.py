"""Trains: `python -m cogvit.train PRESET [flags]`, one process per rank under torchrun or srun, also bare.

This is the composition root: it reads the configuration, puts data, teachers, model, engine and loop together, and
turns errors into one line and an exit status. The same command with the same --out resumes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from cogvit.config import RunConfig, from_json, load_config, to_json
from cogvit.config.arguments import asks_for_help
from cogvit.config.environment import speaks, this_process
from cogvit.config.flags import help_text, load_preset
from cogvit.errors import CogViTError, ConfigError
from cogvit.stages import check_run, read_run, recipe_differences, stage_of
from cogvit.training.feed import (
    Corpus,
    Intake,
    batch_server,
    describe,
    first_position,
    held_out,
    open_corpus,
    rank_batches,
    ray_cluster,
    take_seat,
)
from cogvit.training.folder import Folder
from cogvit.training.lock import check_free, run_lock
from cogvit.training.slurm import place_line

REQUEUE_STATUS = 75
USAGE = """usage: python -m cogvit.train PRESET [flags]

Trains a stage. PRESET names a file of configs/ (demo_stage1, stage1_cogvit_l, ...) or is a path to a config.json.
Run it bare, under torchrun, or under srun; the same command in the same --out resumes.
--dry-run prints the resolved configuration and stops; it refuses what a start would refuse of it and of --out.
--help after a PRESET shows its defaults.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        if not argv or asks_for_help(argv):
            if speaks():
                print(USAGE + "\n" + help_text(load_preset(argv[0]) if argv and argv[0][0] != "-" else None))
            return 0 if argv else 2
        process = this_process()
        config = read_run(argv[0], [word for word in argv[1:] if word != "--dry-run"])
        stage = stage_of(config)
        check_run(config, process.world_size)
        config = stage.completed(config)
        if "--dry-run" in argv:
            if config.out:
                check_recipe(config)
                check_free(Path(config.out))
            print(json.dumps(to_json(config), indent=1))
            return 0
        process.check_meeting()
        if "SLURM_STEP_NUM_TASKS" in os.environ:
            print(place_line(config, process.rank), flush=True)
        corpus = open_corpus(config, stage.reads)
        with claimed_directory(config, writer=process.rank == 0):
            return run(config, corpus)
    except CogViTError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def check_recipe(config: RunConfig) -> None:
    """Compare the run with the one in its directory. Errors: ConfigError when that is another."""
    path = Path(config.out) / "config.json"
    if path.exists():
        differences = recipe_differences(load_config(path), config)
        if differences:
            raise ConfigError(f"{config.out} holds another run ({'; '.join(differences[:3])}); choose another --out")


@contextmanager
def claimed_directory(config: RunConfig, *, writer: bool) -> Iterator[None]:
    """Make the run directory, or accept it as the same run's; the writer locks it for the length of the block.

    Errors: ConfigError when it is another run's, is in use, or cannot be written.
    """
    if not config.out:
        raise ConfigError("--out DIR is needed: the run directory")
    out = Path(config.out)
    check_recipe(config)
    with ExitStack() as stack:
        if writer:
            try:
                (out / "logs").mkdir(parents=True, exist_ok=True)
                stack.enter_context(run_lock(out))
                # In one move, for other ranks may be reading it.
                Folder(str(out)).write("config.json", (json.dumps(to_json(config), indent=1) + "\n").encode())
            except OSError as error:
                raise ConfigError(f"--out {config.out} cannot be written: {error.strerror}") from None
        yield


@contextmanager
def claimed_checkpoints(config: RunConfig) -> Iterator[None]:
    """Leave the configuration in --checkpoint.dir, if there is one, or accept what lies there as the same run's.

    On a disk it is locked for the length of the block; an object store has no locks. Errors: ConfigError when it is
    another run's, by its recipe or its --out, or in use: its checkpoints would be resumed from and removed.
    """
    from cogvit.training.checkpoint import folder_in

    if not config.checkpoint.dir:
        yield
        return
    folder = folder_in(Path(config.out), config.checkpoint)
    # One file must not be locked twice: the kernel would free it at the end of either.
    lockable = folder.is_local and os.path.realpath(folder.path) != os.path.realpath(config.out)
    with run_lock(Path(folder.path), flag="--checkpoint.dir") if lockable else nullcontext():
        check_owner(folder, config)
        yield


def check_owner(folder: Folder, config: RunConfig) -> None:
    """Compare the run with the configuration in its --checkpoint.dir, or leave it there if there is none."""
    mine = replace(config, out=os.path.abspath(config.out))
    try:
        owner = from_json(RunConfig, json.loads(folder.read("config.json")))
    except FileNotFoundError:
        folder.write("config.json", (json.dumps(to_json(mine), indent=1) + "\n").encode())
        return
    except ValueError as error:
        raise ConfigError(
            f"{folder}/config.json is not JSON: {error}; remove it if the checkpoints are yours"
        ) from None
    if differences := recipe_differences(owner, mine):
        raise ConfigError(f"{folder} holds another run ({'; '.join(differences[:3])}); choose another --checkpoint.dir")
    if os.path.realpath(owner.out) != os.path.realpath(mine.out):
        raise ConfigError(
            f"{folder} holds the checkpoints of --out {owner.out}, and this is --out {mine.out}; choose another "
            f"--checkpoint.dir, or remove {folder}/config.json if it is the same run, moved or renamed"
        )


def run(config: RunConfig, corpus: Corpus) -> int:
    """Train to the end or to a requested stop; returns 0 or 75. Heavy libraries are imported from here on."""
    launched_s = time.monotonic()
    from cogvit.parallel.mesh import start_mesh, stop_mesh
    from cogvit.training.checkpoint import Checkpoints, folder_in
    from cogvit.training.chrono import after_restart
    from cogvit.training.engine import Engine
    from cogvit.training.loop import Evaluation, train
    from cogvit.training.meter import Meter
    from cogvit.training.signals import StopRequest
    from cogvit.training.spikes import SpikeLog
    from cogvit.training.state import TrainState
    from cogvit.training.watchdog import Watchdog

    mesh = start_mesh(config.parallel)
    stage = stage_of(config)
    with ExitStack() as resources:
        resources.callback(stop_mesh)
        seat = take_seat(config, mesh)
        start = first_position(config, corpus)
        if mesh.is_writer:
            print(describe(config, corpus), flush=True)
        resources.enter_context(ray_cluster(config, mesh, asks_actors=stage.asks_actors(config)))
        intake = Intake(seat, batch_server(config, mesh), mesh.device, stage.reads)
        source = stage.feature_source(config, corpus, mesh)
        stop = resources.enter_context(StopRequest())
        model, objective = stage.build(config, mesh, {} if source is None else dict(source.dims))
        engine = Engine(model, config, mesh)
        out = Path(config.out)
        checkpoints = resources.enter_context(
            Checkpoints(folder_in(out, config.checkpoint), mesh, config.checkpoint, out / "logs" / "newest_checkpoint")
        )
        mesh.from_writer(lambda: resources.enter_context(claimed_checkpoints(config)))
        state = checkpoints.resume(engine) or TrainState(step=0, position=start, images=0, tokens=0)
        if mesh.is_writer:
            elapsed_s = time.monotonic() - launched_s
            state = replace(state, chrono=after_restart(state.chrono, Path(config.out), state.step, elapsed_s))
        meter = resources.enter_context(Meter(Path(config.out), config, mesh.is_writer, state.step))
        stacks = Path(config.out) / "logs" / f"stacks_rank{mesh.rank}.txt"
        watchdog = resources.enter_context(Watchdog(stacks, config.parallel.step_timeout_s))
        evaluation = Evaluation(
            config.eval.every_steps, config.eval.steps, partial(held_out, config, corpus, intake, source)
        )
        batches = resources.enter_context(closing(rank_batches(config, corpus.train, intake, source, state.position)))
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
            watchdog=watchdog,
            spikes=SpikeLog(Path(config.out) / "logs" / "spikes.jsonl", config.guard.spike_factor),
        )
    return 0 if state.step >= config.schedule.steps else REQUEUE_STATUS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

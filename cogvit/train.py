"""Trains: `python -m cogvit.train PRESET [flags]`, one process per rank under torchrun or srun, also bare.

This is the composition root: it reads the configuration, puts data, teachers, model, engine and loop together, and
turns errors into one line and an exit status. The same command with the same --out resumes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cogvit import checkout  # noqa: F401  before what lies beside cogvit
from cogvit.config import RunConfig, to_json
from cogvit.config.arguments import asks_for_help
from cogvit.config.device import local_device
from cogvit.config.environment import Process, speaks, this_process
from cogvit.config.flags import load_preset, presets, purpose
from cogvit.config.help import ALL, first_page, section_text, sections, table
from cogvit.config.recipe import differences
from cogvit.errors import CogViTError, ConfigError
from cogvit.stages import check_run, read_run, recipe_differences, stage_of
from cogvit.stages.opening import in_millions, num_parameters, opening
from cogvit.training.deterministic import deterministic
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
from cogvit.training.slurm import place_line

if TYPE_CHECKING:
    from cogvit.training.claim import Start
    from cogvit.training.state import TrainState

REQUEUE_STATUS = 75
USAGE = """usage: python -m cogvit.train PRESET [flags]

Trains a stage. PRESET is one of those below, or a path to a preset's file or to a config.json. Run it bare, under
torchrun, or under srun; the same command in the same --out resumes.

--size NAME    another size of the towers: tiny, small, base, large, so400m
--dry-run      prints the resolved configuration and stops; it opens the shards, looks at --init, --teachers.store and
               --out, and refuses what a start would refuse of them. Beside it, on stderr: the data, and what differs
               from PRESET
--begin-anew   moves what a run has left in --out aside, into --out/before_1, and begins at step 1
--help         after a PRESET shows its defaults; with the name of a section that section's flags
"""
_OWN_FLAGS = ("--dry-run", "--begin-anew")


def help_page(argv: list[str]) -> str:
    """Return the help that a command line asks for. Errors: ConfigError for a section that does not exist."""
    known = (*sections(), ALL)
    preset = load_preset(argv[0]) if argv and argv[0] not in known and argv[0][0] != "-" else None
    for word, section in pairwise(argv):
        if word in ("--help", "-h") and section[0] != "-":
            return section_text(section, preset)
    rows = [(name, in_millions(num_parameters(stage_of(one), one)), purpose(name)) for name, one in presets()]
    return f"{USAGE}\npresets, their parameters (text tower included) and what they are for:\n{table(rows)}\n\n" + (
        first_page(preset)
    )


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        if not argv or asks_for_help(argv):
            if speaks():
                print(help_page(argv))
            return 0 if argv else 2
        return start(argv, this_process())
    except CogViTError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def start(argv: list[str], process: Process) -> int:
    """Check everything that can be checked alone, claim the run's directory, and train. Errors: CogViTError."""
    preset, words = argv[0], [word for word in argv[1:] if word not in _OWN_FLAGS]
    config = read_run(preset, words)
    stage = stage_of(config)
    check_run(config, process.world_size)
    from cogvit.training.claim import Start, check_claim, claimed_directory, placed

    config = placed(stage.completed(config))
    corpus = open_corpus(config, stage.reads)
    plan_hash = first_position(config, corpus).plan_hash
    asked = Start(config, recipe_differences, plan_hash, begin_anew="--begin-anew" in argv)
    if "--dry-run" in argv:
        check_claim(asked)
        print(json.dumps(to_json(config), indent=1))
        changed = ", ".join(map(str, differences(load_preset(preset), config))) or "nothing"
        print(f"{describe(config, corpus)}\ndiffers from {preset}: {changed}", file=sys.stderr)
        return 0
    process.check_meeting()
    with deterministic(config.deterministic):
        device = own_device(config, process)
        if "SLURM_STEP_NUM_TASKS" in os.environ:
            print(place_line(config, process.rank, str(device)), flush=True)
        with claimed_directory(asked, writer=process.rank == 0):
            return run(asked, corpus, device)


def own_device(config: RunConfig, process: Process) -> torch.device:
    """Return the device that this process trains on. Errors: ConfigError, which one process of a machine prints."""
    try:
        return local_device(config.device, process)
    except ConfigError as error:
        # Rank 0 speaks for its machine alone, and of too few GPUs only those know who get none.
        if not speaks() and process.local_rank in (0, torch.cuda.device_count()):
            print(f"error: rank {process.rank}: {error}", file=sys.stderr)
        raise


def set_out(state: TrainState, start: Start, elapsed_s: float) -> TrainState:
    """Say where a run goes on, and return its state with the time that the start took."""
    from cogvit.training.chrono import after_restart

    if state.step:
        said = f"resumes after step {state.step} of {start.config.schedule.steps}, from {start.checkpoints}"
        print(said, flush=True)
    return replace(state, chrono=after_restart(state.chrono, start.out, state.step, elapsed_s))


def leave(state: TrainState, start: Start, *, speaks: bool) -> int:
    """Return the status of a run that was asked to stop; one process says what is kept."""
    if speaks:
        kept = f"step {state.step} of {start.config.schedule.steps} is saved" if state.step else "no step was done"
        print(f"asked to stop: {kept}; the same command goes on", flush=True)
    return REQUEUE_STATUS


def run(start: Start, corpus: Corpus, device: torch.device) -> int:
    """Train to the end or to a requested stop; returns 0 or 75. Heavy libraries are imported from here on."""
    launched_s, config = time.monotonic(), start.config
    from cogvit.parallel.mesh import start_mesh, stop_mesh
    from cogvit.training.checkpoint import Checkpoints, folder_in
    from cogvit.training.claim import claimed_checkpoints
    from cogvit.training.engine import Engine
    from cogvit.training.loop import Evaluation, train
    from cogvit.training.meter import Meter
    from cogvit.training.signals import StopRequest
    from cogvit.training.spikes import SpikeLog
    from cogvit.training.state import TrainState
    from cogvit.training.watchdog import Watchdog

    mesh, stage = start_mesh(config.parallel, device), stage_of(config)
    with ExitStack() as resources:
        resources.callback(stop_mesh, mesh)
        seat = take_seat(config, mesh)
        if mesh.is_writer:
            print(*opening(stage, config, corpus, device, mesh.world_size), sep="\n", flush=True)
        resources.enter_context(ray_cluster(config, mesh, asks_actors=stage.asks_actors(config)))
        intake = Intake(seat, batch_server(config, mesh), mesh.device, stage.reads)
        targets = stage.targets(config, corpus, mesh)
        stop = resources.enter_context(StopRequest())
        model, objective = stage.build(config, mesh, {} if targets is None else dict(targets.dims))
        engine = Engine(model, config, mesh)
        resources.callback(engine.zero.close)
        out, newest = Path(config.out), Path(config.out) / "logs" / "newest_checkpoint"
        folder = folder_in(out, config.checkpoint)
        checkpoints = resources.enter_context(Checkpoints(folder, mesh, config.checkpoint, newest))
        mesh.from_writer(lambda: resources.enter_context(claimed_checkpoints(start)))
        state = checkpoints.resume(engine) or TrainState(0, first_position(config, corpus), images=0, tokens=0)
        if mesh.is_writer:
            state = set_out(state, start, time.monotonic() - launched_s)
        meter = resources.enter_context(Meter(out, config, mesh.is_writer, state.step))
        stacks = out / "logs" / f"stacks_rank{mesh.rank}.txt"
        watchdog = resources.enter_context(Watchdog(stacks, config.parallel.step_timeout_s))
        held, concern = partial(held_out, config, corpus, intake, targets), partial(stage.concern, config)
        evaluation = Evaluation(config.eval.every_steps, config.eval.steps, held, config.schedule.steps, concern)
        rounds = stage.rounds(config, engine, state.position, lambda: stop.requested)
        batches = rounds or closing(rank_batches(config, corpus.train, intake, targets, state.position))
        state = train(
            engine,
            objective,
            resources.enter_context(batches),
            state,
            deliver=tuple if targets is None else targets.delivered,
            steps=config.schedule.steps,
            checkpoints=checkpoints,
            evaluation=evaluation,
            meter=meter,
            stop=stop,
            watchdog=watchdog,
            spikes=SpikeLog(out / "logs" / "spikes.jsonl", config.guard.spike_factor),
            guard=stage.guard(config),
        )
    return 0 if state.step >= config.schedule.steps else leave(state, start, speaks=mesh.is_writer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Trains: `python -m cogvit.train PRESET [flags]`, one process per rank under torchrun or srun, also bare.

This is the composition root: it reads the configuration, puts data, teachers, model, engine and loop together, and
turns errors into one line and an exit status. The same command with the same --out resumes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogvit.arguments import asks_for_help
from cogvit.config import ModuleConfig, RunConfig, load_config, recipe_differences, to_json
from cogvit.errors import CogViTError, ConfigError
from cogvit.flags import help_text, load_preset, parse
from cogvit.training.lock import run_lock

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cogvit.batch import DataPosition, StepBatch
    from cogvit.parallel.mesh import Mesh
    from cogvit.teacher.store import StoreFeatures
    from cogvit.teacher.stream import FeatureSource
    from cogvit.training.objective import Objective
    from data_pipeline.index import Index
    from data_pipeline.topology import Seat

REQUEUE_STATUS = 75
STATS_REQUESTS = 16  # packs on which the teachers' mean and deviation are fitted
USAGE = """usage: python -m cogvit.train PRESET [flags]

Trains a stage. PRESET names a file of configs/ (demo_stage1, stage1_cogvit_l, ...) or is a path to a config.json.
Run it bare, under torchrun, or under srun; the same command in the same --out resumes.
--dry-run prints the resolved configuration and stops. --help after a PRESET shows its defaults.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        if not argv or asks_for_help(argv):
            if os.environ.get("RANK", "0") == "0":
                print(USAGE + "\n" + help_text(load_preset(argv[0]) if argv and argv[0][0] != "-" else None))
            return 0 if argv else 2
        join_slurm()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        config = parse(load_preset(argv[0]), [word for word in argv[1:] if word != "--dry-run"])
        config.check(world_size)
        if "--dry-run" in argv:
            print(json.dumps(to_json(config), indent=1))
            return 0
        if "SLURM_STEP_NUM_TASKS" in os.environ:
            print(place_line(config, rank), flush=True)
        corpus = open_corpus(config)
        with claimed_directory(config, writer=rank == 0):
            return run(config, corpus)
    except CogViTError as error:
        # In a Slurm step each rank has a log of its own.
        if os.environ.get("RANK", "0") == "0" or "SLURM_STEP_NUM_TASKS" in os.environ:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def join_slurm() -> None:
    """Under srun, take this process's rank from Slurm, unless a launcher inside the step has given it one.

    Errors: ConfigError when nobody said where the ranks meet.
    """
    environ = os.environ
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise ConfigError(
            "srun does not say where its ranks meet; use launch/stage1.sh or set MASTER_ADDR and MASTER_PORT"
        )
    environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]


def place_line(config: RunConfig, rank: int) -> str:
    """Say where a rank is: the first line of its log on a cluster."""
    tp_rank, pp_rank, dp_rank = config.parallel.place(rank)
    node = os.environ.get("SLURMD_NODENAME", "?")
    switches = os.environ.get("SLURM_TOPOLOGY_ADDR", node).split(".")[:-1]
    return f"rank={rank} tp={tp_rank} pp={pp_rank} dp={dp_rank} node={node} switch={switches[-1] if switches else '?'}"


@dataclass(frozen=True)
class Corpus:
    """The indexes of a run's shards."""

    train: Index
    held_out: Index | None  # None where the run does not evaluate


def open_corpus(config: RunConfig) -> Corpus:
    """Load the indexes, before any process group or heavy library. Errors: DataError, ConfigError."""
    from data_pipeline.index import open_index

    data = config.data
    if not data.shards:
        raise ConfigError("--data.shards PATTERN is needed: the training shards")
    if config.eval.every_steps and not data.eval_shards:
        raise ConfigError("--eval.every-steps needs --data.eval-shards: the held-out shards")
    held_out = open_index(data, data.eval_shards) if config.eval.every_steps else None
    return Corpus(open_index(data, data.shards), held_out)


@contextmanager
def claimed_directory(config: RunConfig, *, writer: bool) -> Iterator[None]:
    """Make the run directory, or accept it as the same run's; the writer locks it for the length of the block.

    Errors: ConfigError when it is another run's, is in use, or cannot be written.
    """
    if not config.out:
        raise ConfigError("--out DIR is needed: the run directory")
    out = Path(config.out)
    if (out / "config.json").exists():
        differences = recipe_differences(load_config(out / "config.json"), config)
        if differences:
            raise ConfigError(f"{config.out} holds another run ({'; '.join(differences[:3])}); choose another --out")
    with ExitStack() as stack:
        if writer:
            try:
                (out / "logs").mkdir(parents=True, exist_ok=True)
                stack.enter_context(run_lock(out))
                # In one move, for other ranks may be reading it.
                (out / "config.json.tmp").write_text(json.dumps(to_json(config), indent=1) + "\n")
                (out / "config.json.tmp").replace(out / "config.json")
            except OSError as error:
                raise ConfigError(f"--out {config.out} cannot be written: {error.strerror}") from None
        yield


def run(config: RunConfig, corpus: Corpus) -> int:
    """Train to the end or to a requested stop; returns 0 or 75. Heavy libraries are imported from here on."""
    launched_s = time.monotonic()
    from cogvit.parallel.mesh import start_mesh, stop_mesh
    from cogvit.training.checkpoint import Checkpoints
    from cogvit.training.chrono import after_restart
    from cogvit.training.engine import Engine
    from cogvit.training.loop import Evaluation, train
    from cogvit.training.meter import Meter
    from cogvit.training.signals import StopRequest
    from cogvit.training.spikes import SpikeLog
    from cogvit.training.state import TrainState
    from cogvit.training.watchdog import Watchdog
    from data_pipeline.loader import start_position

    mesh = start_mesh(config.parallel)
    contrast = config.objective == "contrast"
    with ExitStack() as resources:
        resources.callback(stop_mesh)
        seat = take_seat(config, mesh)
        start = start_position(corpus.train, config, with_text=contrast)
        source = None if contrast else resources.enter_context(feature_source(config, corpus, mesh))
        stop = resources.enter_context(StopRequest())
        model, objective = build(config, mesh, {} if source is None else dict(source.dims))
        engine = Engine(model, config, mesh)
        checkpoints = resources.enter_context(Checkpoints(Path(config.out) / "checkpoints", mesh, config.checkpoint))
        state = checkpoints.resume(engine) or TrainState(step=0, position=start, images=0, tokens=0)
        if mesh.is_writer:
            elapsed_s = time.monotonic() - launched_s
            state = replace(state, chrono=after_restart(state.chrono, Path(config.out), state.step, elapsed_s))
        meter = resources.enter_context(Meter(Path(config.out), config, mesh.is_writer, state.step))
        stacks = Path(config.out) / "logs" / f"stacks_rank{mesh.rank}.txt"
        watchdog = resources.enter_context(Watchdog(stacks, config.parallel.step_timeout_s))
        evaluation = Evaluation(
            config.eval.every_steps, config.eval.steps, partial(held_out, config, corpus, seat, source)
        )
        batches = resources.enter_context(closing(rank_batches(config, corpus.train, seat, source, state.position)))
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


def take_seat(config: RunConfig, mesh: Mesh) -> Seat:
    """Return this rank's part of the global batches, by where all ranks sit.

    Errors: ConfigError, on all ranks, when one does not find its place.
    """
    from data_pipeline.topology import local_address, topology_of

    address, failure = "", None
    try:
        address = local_address(config.data.topology)
    except ConfigError as error:
        failure = error
    mesh.raise_together(failure)
    # Where a replica spans nodes, its first rank reads the images.
    leaders = sorted(mesh.gather((mesh.pp_rank, mesh.tp_rank, mesh.dp_rank, address)))[: mesh.dp_size]
    return topology_of([place for *_, place in leaders], config.data.canonical_shares).seat(mesh.dp_rank)


def rank_batches(
    config: RunConfig, index: Index, seat: Seat, source: FeatureSource | None, position: DataPosition | None
) -> Generator[StepBatch]:
    """Yield this rank's batches with their teacher targets where the objective has teachers."""
    from cogvit.teacher.stream import attach_targets
    from data_pipeline.loader import step_batches

    with_text = config.objective == "contrast"
    with closing(step_batches(index, config, seat, position, with_text=with_text)) as batches:
        if source is None:
            yield from batches
        else:
            teachers = config.teachers
            yield from attach_targets(
                batches, source, mask_ratio=teachers.mask_ratio, in_flight_steps=teachers.in_flight_steps
            )


def held_out(config: RunConfig, corpus: Corpus, seat: Seat, source: FeatureSource | None) -> Generator[StepBatch]:
    """Return the global batches of the held-out shards, the same each time."""
    assert corpus.held_out is not None
    data = replace(config.data, mixture=(), flip=False, crop=1.0, color=0.0)
    return rank_batches(replace(config, data=data), corpus.held_out, seat, source, None)


@contextmanager
def feature_source(config: RunConfig, corpus: Corpus, mesh: Mesh) -> Iterator[FeatureSource]:
    """Start or join the teachers; one rank of each model replica asks them and shares the answers with its replica."""
    from cogvit.teacher.actors import TeacherPool, connect, plan_cluster
    from cogvit.teacher.stream import FirstThen
    from cogvit.teacher.zoo import fingerprint, inspect_teacher
    from data_pipeline.augment import augmentation_of
    from data_pipeline.loader import image_of

    teachers = config.teachers
    num_actors = len(teachers.members) * teachers.actors_per_teacher
    specs = mesh.from_writer(lambda: {member.name: inspect_teacher(member.path) for member in teachers.members})
    fingerprints = mesh.from_writer(lambda: {name: fingerprint(spec) for name, spec in specs.items()})
    dims = {name: spec.dim for name, spec in specs.items()}
    leads = mesh.tp_rank == 0 and mesh.pp_rank == 0
    with ExitStack() as stack:
        store, pool = None, None
        if teachers.source != "online" and leads:
            store = stored_features(config, corpus, fingerprints, dims)
        if teachers.source != "store":
            # The first rank starts the cluster; the others join it once it is there.
            cluster = plan_cluster(teachers.ray_address)
            if mesh.is_writer:
                cluster = stack.enter_context(connect(cluster, num_actors))
            cluster = mesh.from_writer(lambda: cluster)
            if leads and not mesh.is_writer:
                stack.enter_context(connect(cluster, num_actors))
            pool = (
                TeacherPool(teachers, partial(image_of, augmentation=augmentation_of(config.data))) if leads else None
            )
        source = FirstThen(store, pool) if store and pool else store or pool
        yield standardized(config, corpus.train, mesh, source, fingerprints, dims)


def stored_features(
    config: RunConfig, corpus: Corpus, fingerprints: dict[str, str], dims: dict[str, int]
) -> StoreFeatures:
    """Open the feature store of tools.precompute_features for the run's shards.

    Errors: ConfigError names what differs.
    """
    from cogvit.teacher.store import Maker, StoreFeatures, contents_of
    from data_pipeline.sizing import sizing_of

    sizing = sizing_of(config)
    contents: dict[str, str] = {}
    for index in [corpus.train] + ([] if corpus.held_out is None else [corpus.held_out]):
        grids = sizing.grids(index.rows["height_px"], index.rows["width_px"])
        contents |= contents_of(index.shards, index.rows, grids)
    makers = {name: Maker(fingerprints[name], config.teachers.precision, dim) for name, dim in dims.items()}
    return StoreFeatures(Path(config.teachers.store), makers, contents)


def standardized(
    config: RunConfig,
    index: Index,
    mesh: Mesh,
    source: FeatureSource | None,
    fingerprints: dict[str, str],
    dims: dict[str, int],
) -> FeatureSource:
    """Share one rank's source with its replica, with features standardized by what the run's first start fitted."""
    from cogvit.teacher.standardize import Standardized, fit_stats, load_stats, save_stats
    from cogvit.teacher.stream import Shared, request_of
    from data_pipeline.loader import step_batches
    from data_pipeline.topology import topology_of

    path = Path(config.out) / "teacher_stats.safetensors"

    def fit() -> None:
        if source is None or path.exists():
            return
        # On one stage, so that the packs, and with them the statistics, do not depend on the layout.
        alone = replace(config, parallel=replace(config.parallel, pp=1))
        seat = topology_of(["alone"], config.data.canonical_shares).seat(0)
        with closing(step_batches(index, alone, seat, None, with_text=False)) as batches:
            packs = (batch for step in batches for batch in step.micro)
            requests = [request_of(batch, 1.0) for batch in islice(packs, STATS_REQUESTS)]
        save_stats(path, fit_stats(source, requests, fingerprints, config.teachers.standardize))

    mesh.from_writer(fit)
    shared = Shared(source, dims, mesh.model_group, leader=0, device=mesh.device)
    return Standardized(shared, load_stats(path, fingerprints, config.teachers.standardize))


def build(config: RunConfig, mesh: Mesh, teacher_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
    """Return this rank's stage of the model with its initial weights, and what trains it."""
    from cogvit.objective.distill import Distill, DistillModel, Term
    from cogvit.objective.siglip import Contrast, ContrastModel
    from cogvit.parallel.convert import fill
    from cogvit.parallel.encoder import TextStage, VisionStage

    data, parallel, memory = config.data, config.parallel, config.memory
    vision = VisionStage(
        config.vision, mesh, parallel, memory.vision, num_tokens=data.tokens_per_pack, num_slots=data.images_per_pack
    )
    if config.objective == "distill":
        terms = {member.name: Term(member.weight, member.error) for member in config.teachers.members}
        model: nn.Module = DistillModel(vision, teacher_dims, recompute=memory.projection_recompute)
        objective: Any = Distill(terms, config.teachers.mask_ratio)
    else:
        text = TextStage(config.text, mesh, parallel, memory.text, num_tokens=data.text_tokens_per_pack)
        model, objective = (
            ContrastModel(vision, text, config.proj_dim, recompute=memory.projection_recompute),
            Contrast(config.contrast, locked_towers(config)),
        )
    fill(model.to(mesh.device), mesh, initial_weights(config))
    return model, objective


def locked_towers(config: RunConfig) -> tuple[Literal["vision", "text"], ...]:
    """Return the towers whose rate is 0: nothing needs their gradients."""
    towers: tuple[tuple[Literal["vision", "text"], ModuleConfig], ...] = (
        ("vision", config.optim.vision),
        ("text", config.optim.text),
    )
    return tuple(name for name, own in towers if own.lr_mult == 0.0)


def initial_weights(config: RunConfig) -> Any:
    """Return the source of initial plain tensors: --init for what it holds of the towers, the seed for the rest.

    Errors: CheckpointError when the vision tower of --init is not this run's.
    """
    import torch

    from cogvit.model.init import init_tensor
    from cogvit.training.restore import initial_towers

    given = initial_towers(config) if config.init else {}
    constants = {"log_t": config.init_log_t, "bias": config.init_bias}

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in given:
            return given[name]
        if name in constants:
            return torch.full(shape, constants[name])
        tower = config.text if name.startswith("text.") else config.vision
        scale = 1.0 if tower.layer_scale_init is None else tower.layer_scale_init
        return init_tensor(name, shape, config.seed, scale)

    return weight


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

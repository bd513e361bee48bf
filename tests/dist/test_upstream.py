"""A replica's ranks decode each image once, on the stage that embeds it, and train as if every rank had decoded all."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cogvit.batch import Batch, DataPosition, StepBatch
from cogvit.config import ParallelConfig, RunConfig, TeacherConfig, TeachersConfig
from cogvit.parallel.mesh import start_mesh, stop_mesh
from cogvit.stages import build
from cogvit.teacher.standardize import ChannelStats
from cogvit.teacher.stream import LocalFeatures
from cogvit.teacher.targets import Targets
from cogvit.teacher.zoo import load_teacher
from cogvit.training.engine import Engine
from cogvit.training.feed import leads_replica, take_seat
from cogvit.training.loop import Deliver, advance
from cogvit.training.state import TrainState
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import image_of, step_batches
from data_pipeline.topology import WHOLE
from tests.data.corpus import ANY_SIZE, members, picture, run_config, write_corpus, write_tar
from tests.pool import Pool

STEPS = 2
IMAGES = 31  # of a step: the corpus, of which one does not decode


@dataclass(frozen=True)
class Trained:
    """What a rank saw."""

    metrics: list[dict[str, float]]
    decoded: list[int]  # images, step by step
    learns: bool  # whether its batches had features of teachers


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, num_shards=1, per_shard=IMAGES - 1)
    write_tar(directory / "cut.tar", members("0", picture(12, 12, 1)[:60], captions={"en": ["cut short"]}))
    for _ in build_index(str(directory), rules=ANY_SIZE):
        continue
    return directory


def config_of(shards: Path, stage: str, parallel: ParallelConfig) -> RunConfig:
    config = run_config(
        shards=str(shards),
        global_batch_images=IMAGES,
        lookahead_steps=1,
        tokens_per_pack=128,
        images_per_pack=16,
        text_tokens_per_pack=256,
    )
    return replace(
        config,
        objective=stage,
        vision=replace(config.vision, depth=2),
        text=replace(config.text, embed_dim=32, depth=2, num_heads=2),
        teachers=TeachersConfig(members=(TeacherConfig(name="own", path="tests.teachers:own"),)),
        parallel=parallel,
    )


def train(rank: int, world: int, config: RunConfig, apart: bool) -> Trained:
    """Train on this worker, decoding this rank's part or, as the reference, all of its packs."""
    mesh = start_mesh(config.parallel)
    decoded: list[int] = []

    def counted(batches: Generator[StepBatch]) -> Generator[StepBatch]:
        for batch in batches:
            decoded.append(batch.decoded)
            yield batch

    features = 0

    def noting(deliver: Deliver) -> Deliver:
        def noted(micro: Sequence[Batch]) -> tuple[Batch, ...]:
            nonlocal features
            whole = deliver(micro)
            features += sum(len(batch.targets.features) for batch in whole if batch.targets is not None)
            return whole

        return noted

    deliver: Deliver = tuple

    try:
        seat = take_seat(config, mesh)
        seat = seat if apart else replace(seat, decodes=WHOLE)
        contrast = config.objective == "contrast"
        model, objective = build(config, mesh, {} if contrast else {"own": 12})
        engine = Engine(model, config, mesh)
        state = TrainState(0, DataPosition("plan", 0), images=0, tokens=0)
        metrics = []
        reads = "captions" if contrast else "images"
        with closing(step_batches(load_index(config.data.shards), config, seat, None, reads=reads)) as batches:
            source = counted(batches)
            if not contrast:
                teachers = LocalFeatures({"own": load_teacher("tests.teachers:own", "fp32")}, partial(image_of))
                targets = Targets(
                    source=teachers if leads_replica(mesh) or not apart else None,
                    dims=teachers.dims,
                    dtypes=teachers.dtypes,
                    stats={"own": ChannelStats(torch.zeros(12), torch.ones(12), "")},
                    mask_ratio=0.35,
                    group=mesh.new_target_group(),
                )
                source = targets.attached(source, in_flight_steps=0, augmented=True)
                deliver = noting(targets.delivered if apart else tuple)
            for _ in range(STEPS):
                state, values, _ = advance(engine, objective, source, state, deliver)
                metrics.append({name: values[name] for name in ("loss", "grad_norm", "images", "failed_images")})
        return Trained(metrics, decoded, features > 0)
    finally:
        stop_mesh(mesh)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("stage", "parallel"),
    [
        pytest.param("distill", ParallelConfig(tp=2, pp=2), id="stage1-tp2-pp2", marks=pytest.mark.long),
        pytest.param("distill", ParallelConfig(tp=2, sequence=True), id="stage1-sp2"),
        pytest.param("contrast", ParallelConfig(tp=2, pp=2), id="stage2-tp2-pp2"),
    ],
)
def test_each_image_is_decoded_once_and_no_number_changes(
    pool: Pool, shards: Path, stage: str, parallel: ParallelConfig
) -> None:
    config, world = config_of(shards, stage, parallel), parallel.tp * parallel.pp
    ranks, expected = (pool.run(train, world, (config, apart), timeout_s=110.0) for apart in (True, False))
    assert [rank.decoded for rank in expected] == [[IMAGES] * STEPS] * world
    first, last = ranks[: parallel.tp], ranks[parallel.tp :]  # tp counts fastest
    assert [sum(counts) for counts in zip(*(rank.decoded for rank in first), strict=True)] == [IMAGES] * STEPS
    assert all(min(rank.decoded) > 0 for rank in first)
    assert [rank.decoded for rank in last] == [[0] * STEPS] * len(last)
    if stage == "distill":
        # The first rank, which asks the teachers, and the last stage, which learns from them.
        learning = [0, *range(world - parallel.tp, world)]
        assert [number for number, rank in enumerate(ranks) if rank.learns] == sorted(set(learning))
    assert [rank.metrics for rank in ranks] == [rank.metrics for rank in expected]
    assert all(line["failed_images"] == 1 and line["images"] == IMAGES - 1 for line in ranks[-1].metrics)

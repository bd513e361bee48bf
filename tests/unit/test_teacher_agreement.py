"""Teachers in this process, behind Ray and in a store say the same of the images of a real plan, for both real classes.

Squares of 224 px and NaFlex images; as they are, and with every augmentation, which the actors replay from the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import pytest
import torch

from cogvit.config import SUMMARY, DataConfig, RunConfig, TeacherConfig, TeachersConfig
from cogvit.model.config import CogViTConfig
from cogvit.stages.distill_targets import open_source
from cogvit.teacher.actors import TeacherPool, connect, plan_cluster
from cogvit.teacher.encoding import StoreDtype
from cogvit.teacher.stream import FeatureRequest, LocalFeatures, request_of
from cogvit.teacher.zoo import load_teacher
from data_pipeline.augment import augmentation_of
from data_pipeline.index import open_index
from data_pipeline.loader import image_of, step_batches
from data_pipeline.topology import topology_of
from tests import teachers
from tests.e2e.corpus import write_shards
from tools.precompute_features import plan_job, run_job, shard_requests

Sizing = Literal["square", "naflex"]
SIZINGS: tuple[Sizing, ...] = ("square", "naflex")
BF16_ULP = 2.0**-8  # the spacing of bf16 is between this and twice this, relative to a value


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with every augmentation and both teachers, patches and summaries."""
    path = tmp_path_factory.mktemp("world")
    write_shards(path / "shards", "a", 24)
    write_shards(path / "shards", "b", 8)
    members = tuple(
        TeacherConfig(name, directory, summary_weight=1.0) for name, directory in teachers.write_teachers(path).items()
    )
    data = DataConfig(
        shards=str(path / "shards"), duplicates="keep", flip=True, crop=0.5, color=0.3, global_batch_images=16,
        canonical_shares=2,
    )  # fmt: skip
    return RunConfig(data=data, teachers=TeachersConfig(members=members, max_wait_s=150.0), out=str(path / "store"))


def sized(base: RunConfig, sizing: Sizing) -> RunConfig:
    size_px, patch_px = (224, 14) if sizing == "square" else (32, 4)
    vision = CogViTConfig(image_size=size_px, patch_size=patch_px, embed_dim=32, num_heads=2)
    data = replace(base.data, sizing=sizing, max_patches=30, tokens_per_pack=1024 if sizing == "square" else 120)
    return replace(base, vision=vision, data=data, out=f"{base.out}-{sizing}")


def requests(config: RunConfig, *, augmented: bool, mask_ratio: float = 0.35) -> list[FeatureRequest]:
    """What a run asks for in its first two steps."""
    index = open_index(config.data, config.data.shards)
    seat = topology_of(["alone"], config.data.canonical_shares).seat(0)
    with closing(step_batches(index, config, seat, None, reads="images")) as batches:
        packs = [batch for step in islice(batches, 2) for batch in step.micro]
    assert len(packs) > 4
    return [request_of(batch, mask_ratio, augmented=augmented) for batch in packs]


def in_process(config: RunConfig) -> LocalFeatures:
    members = {m.name: load_teacher(m.path, "fp32", parts=("", SUMMARY)) for m in config.teachers.members}
    return LocalFeatures(members, partial(image_of, augmentation=augmentation_of(config.data)))


@pytest.fixture(scope="module")
def online(base: RunConfig) -> Iterator[TeacherPool]:
    with connect(plan_cluster(""), num_cpus=2):
        yield TeacherPool(base.teachers, partial(image_of, augmentation=augmentation_of(base.data)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sizing", SIZINGS)
def test_actors_say_what_a_teacher_in_this_process_does_to_the_bit(
    base: RunConfig, online: TeacherPool, sizing: Sizing
) -> None:
    config = sized(base, sizing)
    local = in_process(config)
    seen = {}
    for augmented in (False, True):
        asked = requests(config, augmented=augmented)
        handles = [online.submit(request) for request in asked]
        for request, handle in zip(asked, handles, strict=True):
            answered, computed = online.result(handle), local.result(request)
            assert answered.keys() == {"siglip2", "dinov3", "siglip2_summary", "dinov3_summary"} == computed.keys()
            assert all(torch.equal(answered[name], computed[name]) for name in computed)
            seen[augmented] = answered["dinov3"]
    assert not torch.equal(seen[False], seen[True])


@pytest.mark.parametrize("sizing", SIZINGS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_store_says_it_within_two_steps_of_bf16_whatever_the_batch_was(
    base: RunConfig, sizing: Sizing, dtype: StoreDtype
) -> None:
    config = replace(sized(base, sizing), out=f"{base.out}-{sizing}-{dtype}")
    local = in_process(config)
    run_job(plan_job(config, dtype), replace(local, decode=image_of))
    plain = replace(config.data, flip=False, crop=1.0, color=0.0)
    run = replace(config, data=plain, teachers=replace(config.teachers, source="store", store=config.out))
    makers = plan_job(run, dtype).makers
    store = open_source(run, makers)
    for request in requests(run, augmented=False):
        stored, computed = store.result(store.submit(request)), local.result(request)
        for name in computed:
            assert stored[name].dtype == store.dtypes[name]  # as it is stored: the device makes it float32
            torch.testing.assert_close(stored[name].float(), computed[name], rtol=2 * BF16_ULP, atol=1e-5)


def test_a_store_of_squares_has_the_teachers_bits_where_the_batch_is_the_same(base: RunConfig) -> None:
    """What precomputing asks for at once: images of a shard, in the order of the index."""
    config = sized(base, "square")
    local = replace(in_process(config), decode=image_of)
    job = plan_job(config)
    run_job(job, local)
    run = replace(config, teachers=replace(config.teachers, source="store", store=config.out))
    index = open_index(run.data, run.data.shards)
    store = open_source(run, job.makers)
    for number in range(index.corpus.num_shards):
        rows = index.rows_of_shard(number)
        for request in shard_requests(index, rows, np.full((len(rows), 2), 16), config.data.tokens_per_pack):
            assert len(request.samples) == 4
            stored, computed = store.result(store.submit(request)), local.result(request)
            assert all(torch.equal(stored[name], computed[name]) for name in computed)

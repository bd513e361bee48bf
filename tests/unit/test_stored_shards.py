"""The shards of a run as a feature store has them: hashes made once a corpus, whatever a run holds out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cogvit.config import EvalConfig, RunConfig
from cogvit.errors import ConfigError
from cogvit.stages.distill import DistillStage
from cogvit.stages.distill_targets import open_source
from cogvit.stages.stored_shards import StoredShards, check_sets, stored_sets
from cogvit.teacher.store import StoreFeatures
from cogvit.teacher.stream import LocalFeatures
from cogvit.teacher.zoo import load_teacher
from cogvit.training.feed import open_corpus
from data_pipeline.loader import image_of
from tests.e2e.corpus import write_shards
from tests.runs_on_disk import store_run
from tools.precompute_features import plan_job, run_job


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return store_run(tmp_path)


def test_contents_are_made_once_and_the_next_ranks_map_them(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = stored_sets(config, evaluates=True)
    made = dict(first)
    assert len(made) == len(first) == 2 and dict(first.items()) == made
    directory = Path(config.data.shards)
    assert len(list(directory.glob("corpus-*.contents-*.arrow"))) == 1
    monkeypatch.setattr(StoredShards, "_make", lambda self: pytest.fail("they are there"))
    (second,) = stored_sets(config, evaluates=True)
    assert dict(second) == made and [made[path] for path in made] == [second[path] for path in made]
    assert str(directory / "none.tar") not in second and "/elsewhere/a.tar" not in second


def test_other_images_or_grids_are_other_contents(config: RunConfig) -> None:
    (first,) = stored_sets(config, evaluates=False)
    (smaller,) = stored_sets(replace(config, data=replace(config.data, max_patches=4)), evaluates=False)
    (fewer,) = stored_sets(replace(config, data=replace(config.data, where="width_px > 24")), evaluates=False)
    for other in (smaller, fewer):
        assert other.keys() == first.keys() and all(other[path] != first[path] for path in first)
    write_shards(Path(config.data.shards), "b", 4, first_seed=50)
    (changed,) = stored_sets(config, evaluates=False)
    assert [changed[path] == first[path] for path in first] == [True, False]


def test_a_run_that_holds_out_a_part_of_its_shards_reads_the_store_of_all_of_them(config: RunConfig) -> None:
    """One file a shard, of which training and evaluation read their own images."""
    split = replace(config, data=replace(config.data, held_out=0.2), eval=EvalConfig(every_steps=1))
    job = plan_job(split)
    assert sum(len(shard.rows) for shard in job.shards) == 75
    members = {member.name: load_teacher(member.path, "fp32") for member in config.teachers.members}
    run_job(job, LocalFeatures(members, image_of))
    corpus = open_corpus(split, DistillStage().reads)
    assert corpus.train is not None and corpus.held_out is not None
    assert len(corpus.train) + len(corpus.held_out) == 75 and len(corpus.held_out) > 5
    stored = replace(split, teachers=replace(config.teachers, source="store", store=str(job.out)))
    store = open_source(stored, job.makers, evaluates=True)
    assert isinstance(store, StoreFeatures)
    for index in (corpus.train, corpus.held_out):
        assert all(store.has(index.ref(int(row))) for row in index.rows_of())


def test_a_shard_of_both_sets_has_the_same_images_in_each(config: RunConfig) -> None:
    shards = Path(config.data.shards)
    data = replace(config.data, eval_shards=str(shards / "b.tar"))
    check_sets(stored_sets(replace(config, data=data), evaluates=True))
    write_shards(shards, "b", 75)  # of which a has 70, which are dropped where both are read
    dropped = replace(config, data=replace(data, duplicates="drop"))
    with pytest.raises(ConfigError, match=r"b\.tar is in --data\.shards and --data\.eval-shards with other images"):
        check_sets(stored_sets(dropped, evaluates=True))

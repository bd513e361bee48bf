"""A held-out part of a user's shards: by hash of each sample, the same everywhere, apart from what trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvit.config import DataConfig, EvalConfig, RunConfig
from cogvit.config.split import held_out_part, train_part
from cogvit.errors import ConfigError, DataError
from cogvit.evaluation.subject import load_subject
from cogvit.stages import stage_of
from cogvit.stages.opening import opening
from cogvit.training.feed import open_corpus
from data_pipeline.index import load_index
from tests.e2e.corpus import write_shards
from tests.runs_on_disk import contrast_run
from tools.export import Arguments, export


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    write_shards(directory, "numbers-00000", 120)
    return directory


def names(pattern: str, where: str = "") -> set[str]:
    index = load_index(pattern, where=where)
    return {index.name(row).rpartition("/")[2] for row in index.rows_of().tolist()}


def test_parts_are_disjoint_whole_and_survive_a_move(shards: Path, tmp_path: Path) -> None:
    data = DataConfig(shards=str(shards), held_out=0.2)
    held_out = held_out_part(data)
    assert held_out is not None and held_out.held_out == 0.0
    train, other = names(str(shards), train_part(data).where), names(held_out.shards, held_out.where)
    assert not train & other and train | other == names(str(shards))
    assert 8 < len(other) < 40
    write_shards(tmp_path / "moved", "renamed-00000", 60)  # the first half under another name
    of_half = {name.rpartition(":")[2] for name in other if int(name.rpartition(":")[2]) < 60}
    assert {name.rpartition(":")[2] for name in names(str(tmp_path / "moved"), held_out.where)} == of_half


def test_a_rule_of_the_users_holds_in_both_parts() -> None:
    data = DataConfig(shards="x", held_out=0.25, where="width_px > 3 or height_px > 3")
    assert train_part(data).where == "(width_px > 3 or height_px > 3) and draw >= 0.25"
    assert train_part(replace(data, eval_shards="y")) == replace(data, eval_shards="y")
    assert held_out_part(replace(data, held_out=0.0)) is None


def test_training_evaluation_and_exports_agree_on_the_parts(shards: Path, tmp_path: Path) -> None:
    data = DataConfig(shards=str(shards), held_out=0.2, max_patches=16)
    config = RunConfig(objective="contrast", data=data, eval=EvalConfig(every_steps=1))
    corpus = open_corpus(config, stage_of(config).reads)
    assert corpus.train is not None and corpus.held_out is not None
    subject = load_subject(contrast_run(tmp_path / "run", data))
    assert len(subject.heldout) == len(corpus.held_out) == 120 - len(corpus.train)
    assert export(Arguments(str(tmp_path / "run"), str(tmp_path / "export"))) == 0
    with pytest.raises(ConfigError, match="names no held-out shards; pass --data PATTERN"):
        load_subject(tmp_path / "export")
    with pytest.raises(ConfigError, match=r"--eval\.every-steps needs held-out samples: .*--data\.held-out 0\.01"):
        open_corpus(replace(config, data=replace(data, held_out=0.0)), stage_of(config).reads)
    with pytest.raises(DataError, match=r"--data\.held-out, which --eval\.every-steps 0 does without"):
        open_corpus(replace(config, data=replace(data, held_out=1e-9)), stage_of(config).reads)


def test_a_start_says_its_size_and_warns_of_small_budgets(shards: Path) -> None:
    data = DataConfig(shards=str(shards), global_batch_images=16, max_patches=4)
    config = RunConfig(data=data)
    config = replace(config, vision=replace(config.vision, patch_size=8, image_size=16, embed_dim=64, depth=1))
    corpus = open_corpus(config, stage_of(config).reads)
    told = list(opening(stage_of(config), config, corpus, torch.device("cpu"), 1))
    assert told[0].startswith("device: 1 x cpu, torch ")
    assert told[1].startswith("data: 120 images")
    assert told[2].startswith("run: 0.06") and "patches of 8 px an image, at most 4; 16 images" in told[2]
    assert "7.5 steps an epoch" in told[2]
    assert told[3].startswith("warning: 100% of the images have more than data.max_patches=4")
    roomy = replace(config, data=replace(data, max_patches=64))
    assert len(list(opening(stage_of(config), roomy, corpus, torch.device("cpu"), 1))) == 3

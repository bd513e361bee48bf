"""Lessons as packs: the plain model says of them what it said when it answered, wherever they lie and whoever packs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cogvit import VisionLanguageModel
from cogvit.batch import Batch
from cogvit.config import RunConfig
from cogvit.errors import DataError
from cogvit.rl.judge import OwnVerifier
from cogvit.rl.lesson import Lesson, Reader
from cogvit.rl.local import LocalEngine
from cogvit.rl.packs import Packer
from cogvit.rl.rollout import Answer, Request, Speech
from cogvit.rl.speaker import PlainSpeaker
from cogvit.rl.task import tasks_of
from cogvit.training.joint import initial_joint, limits_of
from tests.language import IMAGE_ID
from tests.policies import stage4

SOURCES = ("one", "two")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return stage4(tmp_path_factory.mktemp("lessons"))


@pytest.fixture(scope="module")
def model(config: RunConfig) -> VisionLanguageModel:
    return initial_joint(config)


@pytest.fixture(scope="module")
def answers(config: RunConfig, model: VisionLanguageModel) -> list[Answer]:
    """Four answers to each of three prompts."""
    tasks, found = tasks_of(config.rl.tasks), list[Answer]()
    engine = LocalEngine(PlainSpeaker(model), tasks, OwnVerifier(tasks))
    engine.set_weights(7, {})
    for seed, source in enumerate(("one", "two", "one")):
        engine.submit(Request(f"{source}-{seed}", source, seed, 4, Speech(max_new_tokens=5)), found.append)
    while engine.poll():
        continue
    assert [answer.outcome for answer in found] == ["answered"] * 3
    return found


def packer(config: RunConfig, *, embeds: bool = True) -> Packer:
    limits = limits_of(config)
    model = initial_joint(config)
    reader = Reader(tasks_of(config.rl.tasks), model.tokenizer, limits, config.vision.patch_size, config.video)
    by_place = model.language.cfg.mrope_section is not None
    return Packer(config, reader, SOURCES, IMAGE_ID, by_place, embeds)


def lessons(config: RunConfig, answers: list[Answer]) -> list[Lesson]:
    reader = packer(config).reader
    return [lesson for answer in answers for lesson in reader.lessons(answer)]


def largest_gap(model: VisionLanguageModel, batch: Batch) -> float:
    """Between what was said of the tokens and what the pack's inputs give."""
    assert batch.sequence is not None and batch.answers is not None
    there = batch.sequence.weight > 0
    with torch.no_grad():
        logits = model.language.logits(model.forward_packed(batch.images, batch.sequence))[there]
    found = -F.cross_entropy(logits, batch.sequence.labels[there], reduction="none")
    return float((found - batch.answers.logprob[there]).abs().max()) if len(found) else 0.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_packs_hold_what_was_answered(
    config: RunConfig, model: VisionLanguageModel, answers: list[Answer], ranks: int
) -> None:
    told, own = lessons(config, answers), packer(config)
    packs = [pack for rank in range(ranks) for pack in own.packs(told, 7, rank, ranks)]
    assert max(largest_gap(model, pack) for pack in packs) <= 1e-5
    assert sum(int((pack.sequence.weight > 0).sum()) for pack in packs) == sum(len(one.said.tokens) for one in told)
    for version, age in ((7, 0), (9, 2)):
        for pack in own.packs(told, version, 0, 1):
            assert pack.answers.version == version
            assert pack.answers.age[pack.sequence.weight > 0].unique().tolist() == [age]
    counts = [(pack.answers.source == number).sum() for pack in packs for number in range(2)]
    assert (sum(counts[::2]), sum(counts[1::2])) == (8, 8)  # of two turns each, the second source


def test_an_image_lies_once_in_a_pack(config: RunConfig, answers: list[Answer]) -> None:
    (pack,) = packer(config).packs(lessons(config, answers[:1]), 7, 0, 1)
    assert int(pack.images.weight.sum()) == 1 and int((pack.answers.source >= 0).sum()) == 4
    assert (pack.sequence.visual_row >= 0).sum() == 4 * int(pack.sequence.visual_row.max() + 1)


def test_a_rank_that_embeds_nothing_has_no_pixels(config: RunConfig, answers: list[Answer]) -> None:
    told = lessons(config, answers)
    seeing, blind = (packer(config, embeds=embeds).packs(told, 7, 0, 1)[0] for embeds in (True, False))
    assert blind.images.patches.shape == (config.data.tokens_per_pack, 0)
    assert torch.equal(seeing.sequence.ids, blind.sequence.ids)
    assert torch.equal(seeing.images.grid_hw, blind.images.grid_hw)


def test_advantages_are_of_the_group(config: RunConfig, answers: list[Answer]) -> None:
    reader = packer(config).reader
    for answer in answers:
        rewards = torch.tensor([sample.reward for sample in answer.samples], dtype=torch.float64)
        wanted = ((rewards - rewards.mean()) / rewards.std(correction=0).clamp(min=1e-6)).tolist()
        turns = [len(sample.turns) for sample in answer.samples]
        wanted = [value for value, count in zip(wanted, turns, strict=True) for _ in range(count)]
        assert [lesson.advantage for lesson in reader.lessons(answer)] == pytest.approx(wanted, abs=1e-6)


def test_an_answer_that_does_not_fit_is_refused(config: RunConfig, answers: list[Answer]) -> None:
    short = replace(config, language=replace(config.language, max_tokens=8))
    with pytest.raises(DataError, match=r"a question of task 'one' has \d+ tokens with its answer, above --language"):
        packer(short).packs(lessons(config, answers), 7, 0, 1)


def test_an_answer_that_training_could_not_take_is_not_given(config: RunConfig) -> None:
    short = replace(config, language=replace(config.language, max_tokens=12))
    engine, found = LocalEngine(PlainSpeaker(initial_joint(short)), tasks_of(config.rl.tasks)), list[Answer]()
    engine.set_weights(0, {})
    engine.submit(Request("one-0", "one", 0, 4, Speech(max_new_tokens=5)), found.append)
    engine.poll()
    assert [answer.outcome for answer in found] == ["failed"] and "and an answer of 5 tokens exceed 12" in found[
        0
    ].reason


def test_a_task_that_is_no_function_of_its_seed_is_said(
    config: RunConfig, answers: list[Answer], tmp_path: Path
) -> None:
    (tmp_path / "moody.py").write_text(
        "class Moody:\n    source = 'one'\n\n    def reset(self, seed):\n        raise OSError('no more')\n\n"
        "    def step(self, text):\n        return None\n\n    def verify(self, answer):\n        return 0.0\n"
    )
    reader = replace(packer(config).reader, tasks=tasks_of(f"{tmp_path}/moody.py:Moody"))
    with pytest.raises(DataError, match=r"task 'one', episode 0: played again it raised OSError: no more"):
        list(reader.lessons(answers[0]))


def test_a_group_whose_answers_are_worth_the_same_teaches_nothing(config: RunConfig, answers: list[Answer]) -> None:
    samples = tuple(replace(sample, reward=0.4) for sample in answers[0].samples)
    alike = replace(answers[0], samples=samples)
    assert [lesson.advantage for lesson in packer(config).reader.lessons(alike)] == [0.0] * 4
    (pack,) = packer(config).packs(lessons(config, [alike]), 7, 0, 1)
    assert int((pack.answers.source >= 0).sum()) == 4 and not pack.answers.advantage.any()

"""Rollouts in one process: what the policy says, with which log-probabilities, and what foreign code may do to it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvit import VisionLanguageModel
from cogvit.errors import CheckpointError, ConfigError, DataError
from cogvit.model.expert import is_expert
from cogvit.model.language_config import ExpertConfig
from cogvit.rl import examples
from cogvit.rl.episode import conversations, play
from cogvit.rl.families import FAMILIES
from cogvit.rl.judge import Episode, Weighted, check_judges, judge_of
from cogvit.rl.local import LocalEngine
from cogvit.rl.rollout import Answer, Request, Sample, Span, Speech
from cogvit.rl.speaker import Asked, PlainSpeaker, Said
from cogvit.rl.task import tasks_of
from tests.cog import cog_directory
from tests.language import IMAGE_ID, tiny_tokenizer
from tests.rl_tasks import TASKS, policy

SPEECH = Speech(seed=7, max_new_tokens=12)


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return policy()


def played(model: VisionLanguageModel, request: Request, stop: Callable[[], bool] = never) -> tuple[Sample, ...]:
    return play(request, TASKS[request.source], PlainSpeaker(model), 3, 5.0, stop)


def ask(source: str, samples: int = 4, **others: Any) -> Request:
    return Request(f"{source}-5", source, 5, samples, SPEECH, **others)


@torch.no_grad()
def trained_logprobs(model: VisionLanguageModel, request: Request, sample: Sample, turn: int) -> Tensor:
    """Of a turn's tokens, by a pass over prompt and answer without a cache."""
    texts = [said.text for said in sample.turns]
    ids, images = model.prompt(conversations(TASKS[request.source], request.seed, texts)[turn])
    tokens = torch.from_numpy(sample.turns[turn].tokens).long()
    hidden_SD = model.hidden_rows([torch.cat([ids, tokens[:-1]])], [images])
    logprob_SV = (model.language.logits(hidden_SD) / request.speech.temperature).log_softmax(1)
    return logprob_SV[len(ids) - 1 :].gather(1, tokens.unsqueeze(1)).squeeze(1)


def cog_agent(directory: Path) -> VisionLanguageModel:
    source = cog_directory("cogagent", directory, vocab_size=300, pad_token_id=IMAGE_ID)
    tiny_tokenizer().save_pretrained(source)
    return VisionLanguageModel.from_pretrained(source)


def with_experts() -> VisionLanguageModel:
    model = policy()
    model.language = model.language.with_experts(ExpertConfig(every=2))
    with torch.no_grad():
        for name, weight in model.language.named_parameters():
            if is_expert(name):
                weight.mul_(1.1)
    return model


@pytest.mark.parametrize("name", ["glm4", "llama", "expert", "cross"])
def test_logprobs_are_those_of_training(tmp_path: Path, name: str) -> None:
    match name:
        case "cross":
            model = cog_agent(tmp_path)
        case "expert":
            model = with_experts()
        case _:
            model = policy(family=name)
    for request in (ask("digits"), replace(ask("twice"), speech=replace(SPEECH, temperature=1.7))):
        samples = played(model, request)
        assert {len(sample.turns) for sample in samples} == {2 if request.source == "twice" else 1}
        for sample in samples:
            for number, turn in enumerate(sample.turns):
                assert sample.over and turn.ended and turn.logprobs.dtype == np.float32
                assert turn.spans == (Span(3, len(turn.tokens)),)
                expected = trained_logprobs(model, request, sample, number)
                assert np.abs(turn.logprobs - expected.numpy()).max() < 1e-5


def same(one: Sequence[Sample], other: Sequence[Sample]) -> bool:
    """Whether texts and tokens are equal, and log-probabilities but for rounding."""
    turns = [[turn for sample in samples for turn in sample.turns] for samples in (one, other)]
    return all(
        a.text == b.text and np.array_equal(a.tokens, b.tokens) and np.abs(a.logprobs - b.logprobs).max() < 1e-5
        for a, b in zip(*turns, strict=True)
    )


def test_what_a_sample_says_does_not_depend_on_its_neighbors(model: VisionLanguageModel) -> None:
    for source in ("digits", "twice"):
        whole = played(model, ask(source, 6))
        texts = {sample.turns[0].text for sample in whole}
        assert len(texts) > 3 and len({len(sample.turns[0].tokens) for sample in whole}) > 2
        assert same(whole[:2], played(model, ask(source, 2)))
        again = played(model, ask(source, 6))
        assert bits(whole) == bits(again)
        other = replace(ask(source, 6), id="another")
        assert not same(whole, played(model, other))
        speech = replace(SPEECH, seed=8)
        assert not same(whole, played(model, replace(ask(source, 6), speech=speech)))


def bits(samples: Sequence[Sample]) -> bytes:
    return pickle.dumps([(turn.text, turn.tokens, turn.logprobs) for sample in samples for turn in sample.turns])


@pytest.mark.parametrize("source", ["digits", "twice"])
def test_what_was_aborted_goes_on_where_it_was(model: VisionLanguageModel, source: str) -> None:
    request = ask(source, 3)
    whole, begun, rounds = played(model, request), (), 0
    while not begun or not all(sample.over for sample in begun):
        begun = played(model, replace(request, begun=begun), after(4))
        rounds += 1
    assert rounds > 2 and same(whole, begun)
    turn = begun[0].turns[0]
    assert sum(span.tokens for span in turn.spans) == len(turn.tokens) == len(turn.logprobs)


def after(calls: int) -> Callable[[], bool]:
    """Stop at the so-manieth time one is asked."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= calls


def test_spans_name_the_weights_that_spoke() -> None:
    speaker, request = PlainSpeaker(policy(eos_ids=())), ask("digits", 2)
    begun = play(request, TASKS["digits"], speaker, 4, 5.0, after(4))
    done = play(replace(request, begun=begun), TASKS["digits"], speaker, 6, 5.0, never)
    assert [span.version for span in done[0].turns[0].spans] == [4, 6]
    answer = Answer(request, "answered", done)
    assert answer.versions == (4, 6) and answer.entry(9, "trained").version == 4


def answered(engine: LocalEngine, request: Request) -> Answer:
    got: list[Answer] = []
    engine.submit(request, got.append)
    while not got:
        engine.poll()
    return got[0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raises", "reset of task 'raises' raised RuntimeError: no"),
        ("shows nothing", "is no message"),
        ("says nothing", "is no message; its role must be text, and its content text or parts"),
        ("asks nothing", "a conversation without messages asks nothing"),
        ("goes on with nothing", "step of task 'goes on with nothing' raised TypeError: 'bool' object is not iterable"),
        ("leaves", "step of task 'leaves' raised SystemExit: 3"),
        ("hangs", "step of task 'hangs' has not returned in 0.3 s"),
        ("endless", "task 'endless' has not ended after 3 answers"),
        ("judge hangs", "the verifier of 'judge hangs' has not returned in 0.3 s"),
        ("judge raises", "the verifier of 'judge raises' raised KeyError: 'truth'"),
        ("nan", "the verifier of 'nan' says nan"),
        ("words", "the verifier of 'words' says 'very good', which is no number"),
        ("unknown", "there is no task 'unknown'"),
    ],
)
def test_what_foreign_code_does_is_one_line(model: VisionLanguageModel, source: str, reason: str) -> None:
    engine = LocalEngine(PlainSpeaker(model), TASKS, task_s=0.3, verify_s=0.3)
    engine.set_weights(0, {})
    speech = Speech(max_new_tokens=3, max_turns=3)
    answer = answered(engine, Request("bad", source, 0, 2, speech))
    assert answer.outcome == "failed" and reason in answer.reason and "\n" not in answer.reason
    assert answer.entry(4, "failed").version == -1 and answer.samples == ()
    fine = answered(engine, Request("fine", "twice", 0, 2, speech))
    assert fine.outcome == "answered" and all(sample.reward is not None for sample in fine.samples)


class Mute:
    """A speaker that says nothing, or nonsense."""

    def __init__(self, *logprobs: float) -> None:
        self.logprobs = logprobs

    def take(self, weights: Any) -> None:
        raise AssertionError("nobody gives it weights")

    def speak(self, asked: Sequence[Asked], speech: Speech, stop: Callable[[], bool]) -> list[Said]:
        size = len(self.logprobs)
        return [Said(np.zeros(size, np.int32), np.array(self.logprobs, np.float32), True, "") for _ in asked]


def test_answers_without_tokens_or_odds_have_failed() -> None:
    for speaker, reason in ((Mute(), "an answer has no tokens"), (Mute(-1.0, math.nan), "the log-probability nan")):
        answer = answered(LocalEngine(speaker, TASKS), ask("digits"))
        assert answer.outcome == "failed" and reason in answer.reason


def test_weights_and_versions(model: VisionLanguageModel) -> None:
    own = policy()
    engine = LocalEngine(PlainSpeaker(own), TASKS)
    engine.set_weights(1, {})
    before = answered(engine, ask("digits"))
    engine.set_weights(2, {name: weight * 1.5 for name, weight in own.language.state_dict(prefix="language.").items()})
    after = answered(engine, ask("digits", version=2))
    assert before.versions == (1,) and after.versions == (2,) and not same(before.samples, after.samples)
    gone = answered(engine, ask("digits", version=1))
    assert gone.outcome == "stale" and gone.reason == "weights of version 1 are gone"
    for wrong, message in (
        ({"language.nose": torch.zeros(1)}, r"language.nose \(1,\) does not fit: the policy has no such weight"),
        ({"language.norm.weight": torch.zeros(3)}, r"has it as \(64,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            engine.set_weights(3, wrong)


def test_the_image_token_ends_an_answer() -> None:
    own, request = policy(eos_ids=()), replace(ask("digits", 8), speech=replace(SPEECH, temperature=0.5))
    likely = int(played(own, request)[0].turns[0].tokens[0])
    with torch.no_grad():
        own.language.head.weight[IMAGE_ID] = 2 * own.language.head.weight[likely]
    samples = played(own, request)
    tokens = [sample.turns[0].tokens.tolist() for sample in samples]
    assert any(said[-1] == IMAGE_ID for said in tokens) and all(IMAGE_ID not in said[:-1] for said in tokens)


def test_prompts_that_are_too_long_have_failed() -> None:
    answer = answered(LocalEngine(PlainSpeaker(policy(max_tokens=40)), TASKS), ask("digits"))
    assert answer.outcome == "failed" and "and an answer of 12 tokens exceed 40" in answer.reason


def test_what_waits_takes_no_pixels(model: VisionLanguageModel) -> None:
    request = Request("counting-123456", "counting", 123456, 8, replace(SPEECH, max_new_tokens=64))
    assert len(pickle.dumps(request)) <= 512
    (sample,) = played(policy(eos_ids=()), replace(request, samples=1))
    assert sample.num_tokens == 64
    assert len(pickle.dumps(sample)) <= 1024


def test_judges_are_apart_from_tasks(model: VisionLanguageModel) -> None:
    def length(episode: Episode) -> float:
        return float(len(episode.texts))

    judge = Weighted([(length, 3.0), (lambda episode: episode.seed / 5, 1.0)])
    answer = answered(LocalEngine(PlainSpeaker(model), TASKS, judge), ask("twice"))
    assert [sample.reward for sample in answer.samples] == [1.75] * 4
    texts = [turn.text for turn in answer.samples[0].turns]
    with pytest.raises(DataError, match="ends otherwise than it did before"):
        conversations(FAMILIES["digits"], 5, texts)
    assert len(conversations(TASKS["twice"], 5, texts)) == 2


JUDGES = """
def brief(episode):
    return float(len(episode.texts[-1]) < 900)

class Source:
    def __init__(self, name="digits"):
        self.name = name

    def __call__(self, episode):
        return float(episode.source == self.name)

class Unmade(Source):
    def __init__(self):
        raise OSError("no model")

class Nothing:
    def judge(self, episode):
        return 1.0

def pair(one, other):
    return 1.0
"""


def test_judges_are_named_with_weights(model: VisionLanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(JUDGES)
    alone = answered(LocalEngine(PlainSpeaker(model), TASKS, judge_of([], TASKS)), ask("twice"))
    weights = [("task", 1.0), (f"{path}:brief", 2.0), (f"{path}:Source", 1.0)]
    several = answered(LocalEngine(PlainSpeaker(model), TASKS, judge_of(weights, TASKS)), ask("twice"))
    for one, other in zip(alone.samples, several.samples, strict=True):
        assert other.reward == pytest.approx((one.reward + 2.0 + 0.0) / 4)
    for name, message in (
        ("taste", "taste is unknown; judges are task and FILE.py:NAME"),
        (f"{path}:Nothing", "is no function of an episode"),
        (f"{path}:pair", "is no function of an episode"),
        (f"{path}:none", "own.py has no none"),
        (f"{tmp_path}/none.py:one", "none.py is no Python file"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_judges([name])
    check_judges([f"{path}:Unmade"])
    with pytest.raises(ConfigError, match="Unmade cannot be made: OSError: no model"):
        judge_of([(f"{path}:Unmade", 1.0)], TASKS)


def test_the_guides_task_is_a_file_of_thirty_lines(model: VisionLanguageModel) -> None:
    path = Path(examples.__file__).parent / "clock.py"
    assert len(path.read_text().splitlines()) <= 30
    tasks = tasks_of(f"digits, {path}:Clock")
    task = tasks["clock"]()
    task.reset(5)
    assert sum(task.verify(f"{hour}.") for hour in range(1, 13)) == 1.0
    answer = answered(LocalEngine(PlainSpeaker(model), tasks), ask("clock"))
    assert answer.outcome == "answered" and len(answer.samples) == 4

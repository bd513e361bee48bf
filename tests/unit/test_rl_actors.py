"""Rollouts by Ray actors. All tests share one cluster and, as an actor costs seconds, its actors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cogvit.errors import ConfigError
from cogvit.rl import ledger
from cogvit.rl.actors import Patience, RayRollouts
from cogvit.rl.collect import Collector, Quota
from cogvit.rl.crew import Place
from cogvit.rl.local import LocalEngine
from cogvit.rl.rollout import Answer, Request, RolloutEngine, Speech
from cogvit.rl.speaker import PlainSpeaker
from cogvit.teacher.actors import connect, plan_cluster
from tests.rl_tasks import new_judge, new_player, policy, tasks_with

pytestmark = pytest.mark.timeout(180)

SHORT, LONG = Speech(seed=3, max_new_tokens=8), Speech(seed=3, max_new_tokens=200)
WEIGHTS = {n: w.clone() for n, w in policy().language.state_dict(prefix="language.").items()}


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def actors(marks: Path) -> Iterator[RayRollouts]:
    with connect(plan_cluster(""), num_cpus=3):
        engine = RayRollouts(
            partial(new_player, str(marks), 2.0),
            partial(new_judge, str(marks)),
            Place(2),
            Place(1),
            versions_kept=2,
            patience=Patience(answer_s=120.0, verify_s=2.0),
        )
        engine.set_weights(0, WEIGHTS)
        with pytest.raises(ConfigError, match="1 rollout actors of 1 and 99 judge actors of 1 CPUs do not fit the Ray"):
            RayRollouts(partial(new_player, "", 1.0), partial(new_judge, ""), Place(1), Place(99))
        yield engine
        engine.close()


def all_answers(engine: RolloutEngine, requests: Sequence[Request]) -> list[Answer]:
    """In the order of the requests."""
    got: dict[str, Answer] = {}

    def take(answer: Answer) -> None:
        assert answer.request.id not in got
        got[answer.request.id] = answer

    for request in requests:
        engine.submit(request, take)
    while len(got) < len(requests):
        engine.poll(1.0)
    return [got[request.id] for request in requests]


def bits(answers: Sequence[Answer]) -> str:
    told: list[Any] = []
    for answer in answers:
        for sample in answer.samples:
            turns = [(t.text, t.tokens.tobytes(), t.logprobs.tobytes(), t.spans) for t in sample.turns]
            told.append((answer.request.id, answer.outcome, sample.over, sample.reward, turns))
    return repr(told)


def asked(count: int, source: str, speech: Speech = SHORT, **others: Any) -> list[Request]:
    return [Request(f"{source}-{n}", source, n, 3, speech, **others) for n in range(count)]


def test_who_answers_and_who_dies_does_not_matter(
    actors: RayRollouts, marks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = LocalEngine(PlainSpeaker(policy(eos_ids=())), tasks_with(str(marks)))
    here.set_weights(0, WEIGHTS)
    requests = [*asked(4, "mortal"), *asked(2, "digits")]
    expected = bits(all_answers(here, requests))
    assert bits(all_answers(actors, requests)) == expected
    (marks / "step").touch(), (marks / "verify").touch()
    with caplog.at_level(logging.WARNING):
        assert bits(all_answers(actors, requests)) == expected
    assert not [*marks.iterdir()]
    for kind in ("rollout", "judge"):
        assert f"a {kind} actor died; another one takes its place" in caplog.text


def test_foreign_code_that_hangs_costs_an_actor_and_one_request(
    actors: RayRollouts, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [*asked(1, "hangs"), *asked(1, "judge hangs"), *asked(1, "nan"), *asked(3, "twice")]
    with caplog.at_level(logging.WARNING):
        answers = all_answers(actors, requests)
    assert [answer.outcome for answer in answers] == ["failed"] * 3 + ["answered"] * 3
    assert [answer.reason for answer in answers[:3]] == [
        "step of task 'hangs' has not returned in 2 s",
        "the verifier of 'judge hangs' has not returned in 2 s",
        "the verifier of 'nan' says nan",
    ]
    assert "a rollout actor is stuck" in caplog.text and "a judge actor is stuck" in caplog.text


def test_weights_go_by_version(actors: RayRollouts) -> None:
    for version in (1, 2):
        actors.set_weights(version, {name: weight * (1 + version) for name, weight in WEIGHTS.items()})
    wanted = {"a": None, "b": 1, "c": 0}
    requests = [Request(name, "digits", 1, 2, SHORT, version) for name, version in wanted.items()]
    newest, before, gone = all_answers(actors, requests)
    assert newest.versions == (2,) and before.versions == (1,)
    assert gone.outcome == "stale" and gone.reason == "weights of version 0 are gone" and gone.samples == ()


def test_a_request_is_aborted_and_goes_on(actors: RayRollouts) -> None:
    actors.set_weights(3, WEIGHTS)
    request = Request("long", "digits", 1, 2, LONG)
    got: list[Answer] = []
    rounds = 0
    while not got or got[-1].outcome != "answered":
        begun = got[-1].samples if got else ()
        actors.submit(replace(request, begun=begun), got.append)
        calls = len(got)
        actors.poll(0.05)
        actors.abort(["long", "nobody"])
        while len(got) == calls:
            actors.poll(1.0)
        rounds += 1
    assert rounds > 1 and all(sample.over for sample in got[-1].samples)
    (whole,) = all_answers(actors, [request])
    for one, other in zip(got[-1].samples, whole.samples, strict=True):
        assert one.turns[0].text == other.turns[0].text
        assert abs(one.turns[0].logprobs - other.turns[0].logprobs).max() < 1e-5


def test_no_prompt_is_lost_or_counted_twice(actors: RayRollouts, tmp_path: Path) -> None:
    requests = [
        Request(f"{n}", source, n, 2, LONG if n % 8 == 0 else SHORT)
        for n, source in enumerate(["digits", "mortal", "twice", "raises"] * 6)
    ]
    collector = Collector(
        actors, iter(requests), Quota(3, max_staleness=2, abort_after_fraction=0.5, abort_after_s=5.0)
    )
    path, ends, step = tmp_path / "ledger.jsonl", 0, 10
    while ends < len(requests):
        actors.set_weights(step, {name: weight * (1 + step / 1000) for name, weight in WEIGHTS.items()})
        taken = collector.take(step)
        assert len(taken.answers) <= 3
        assert all(step - 2 <= answer.versions[0] for answer in taken.answers)
        ledger.append(path, [*taken.entries, *(answer.entry(step, "trained") for answer in taken.answers)])
        ends = sum(entry.end != "aborted" for entry in ledger.read(path))
        step += 1
    entries = ledger.read(path)
    assert ledger.faults(entries, [request.id for request in requests]) == []
    assert sum(entry.end == "failed" for entry in entries) == 6
    assert {entry.end for entry in entries} >= {"trained", "failed", "aborted"}

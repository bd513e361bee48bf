"""What a step trains on: answers as they come, in time, none too old, no prompt lost."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from cogvit import VisionLanguageModel
from cogvit.errors import AskedToLeave, ConfigError, DataError
from cogvit.rl.collect import Collector, Quota, Taken
from cogvit.rl.ledger import Entry
from cogvit.rl.local import LocalEngine
from cogvit.rl.rollout import Answer, Callback, Request, Speech
from cogvit.rl.speaker import PlainSpeaker
from tests.rl_tasks import TASKS, policy


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return policy()


def prompts(*sources: str) -> Iterator[Request]:
    speech = Speech(seed=7, max_new_tokens=2)
    return iter([Request(f"{n}", source, n, 2, speech) for n, source in enumerate(sources)])


def ids(taken: Taken) -> list[str]:
    return [answer.request.id for answer in taken.answers]


def test_a_synchronous_step_takes_its_prompts_in_order(model: VisionLanguageModel) -> None:
    engine = LocalEngine(PlainSpeaker(model), TASKS)
    collector = Collector(engine, prompts("digits", "raises", "twice", "digits", "twice", "nan", "digits"), Quota(3))
    engine.set_weights(4, {})
    first = collector.take(4)
    assert ids(first) == ["0", "2"] and first.entries == (Entry("1", "raises", -1, 4, "failed"),)
    engine.set_weights(5, {})
    assert ids(collector.take(5)) == ["3", "4"]
    engine.set_weights(6, {})
    assert ids(collector.take(6)) == ["6"] and collector.take(6).answers == ()


def test_answers_that_are_too_old_are_stale(model: VisionLanguageModel) -> None:
    engine = LocalEngine(PlainSpeaker(model), TASKS)
    collector = Collector(engine, prompts(*["digits"] * 7), Quota(2, max_staleness=1))
    engine.set_weights(0, {})
    assert ids(collector.take(0)) == ["0", "1"]
    while engine.poll():  # the other two that are on their way
        continue
    engine.set_weights(2, {})
    taken = collector.take(2)
    assert ids(taken) == ["4", "5"] and {answer.versions for answer in taken.answers} == {(2,)}
    assert taken.entries == tuple(Entry(n, "digits", 0, 2, "stale") for n in "23")


class Delayed(LocalEngine):
    """Answers at once, and calls back one at a time, a while later."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__(PlainSpeaker(model), TASKS)
        self.told: list[tuple[Callback, Answer]] = []

    def submit(self, request: Request, callback: Callback) -> None:
        super().submit(request, lambda answer: self.told.append((callback, answer)))
        super().poll()

    def poll(self, timeout_s: float = 0.0) -> int:
        time.sleep(0.02)
        callback, answer = self.told.pop(0)
        callback(answer)
        return 1


def test_a_step_whose_time_is_up_waits_for_one_that_is_not_too_old(model: VisionLanguageModel) -> None:
    engine = Delayed(model)
    collector = Collector(engine, prompts(*["digits"] * 9), Quota(2, max_staleness=1, abort_after_s=0.01))
    engine.set_weights(0, {})
    assert ids(collector.take(0)) == ["0"]
    engine.set_weights(2, {})
    taken = collector.take(2)
    assert ids(taken) == ["4"] and {entry.id for entry in taken.entries} == {"1", "2", "3"}
    assert taken.waited_s <= taken.whole_s


class Overtaking(LocalEngine):
    """Answers the second request that waits, and notes what it should interrupt."""

    aborted: tuple[str, ...] = ()

    def poll(self, timeout_s: float = 0.0) -> int:
        self._waiting.rotate(-1)
        return super().poll(timeout_s)

    def abort(self, ids: Collection[str]) -> None:
        self.aborted = tuple(sorted(ids))


def test_what_was_overtaken_is_interrupted(model: VisionLanguageModel) -> None:
    engine = Overtaking(PlainSpeaker(model), TASKS)
    quota = Quota(2, max_staleness=2, abort_after_fraction=0.5)
    engine.set_weights(0, {})
    taken = Collector(engine, prompts(*["digits"] * 9), quota).take(0)
    assert ids(taken) == ["1", "3"] and engine.aborted == ("0", "2")  # and not 4 and 5, which came later


def test_who_is_asked_to_leave_answers_no_further_request(model: VisionLanguageModel) -> None:
    engine, asked = LocalEngine(PlainSpeaker(model), TASKS), iter([False, True])
    collector = Collector(engine, prompts(*["digits"] * 3), Quota(3), lambda: next(asked))
    engine.set_weights(0, {})
    with pytest.raises(AskedToLeave, match="step 1 waits"):
        collector.take(0)
    assert engine.poll() == 1 and engine.poll() == 1 and engine.poll() == 0  # one of three was answered before


def test_who_is_asked_to_leave_waits_for_no_more_than_a_token(model: VisionLanguageModel) -> None:
    stop, leaving = iter([False, False, True, True]), iter([False, True])  # one of two tokens is said
    engine = LocalEngine(PlainSpeaker(model), TASKS, stop=lambda: next(stop))
    engine.set_weights(0, {})
    with pytest.raises(AskedToLeave, match="step 1 waits"):
        Collector(engine, prompts("digits"), Quota(1), lambda: next(leaving)).take(0)


def test_a_run_in_which_all_fails_ends(model: VisionLanguageModel) -> None:
    collector = Collector(LocalEngine(PlainSpeaker(model), TASKS), prompts(*["raises"] * 20), Quota(3, max_staleness=1))
    with pytest.raises(DataError, match=r"12 requests have failed one after the other, the last one \(11\) because"):
        collector.take(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0,), "0 prompts a step must be at least 1"),
        ((1, 0, 0.5), "--rl.abort-after-fraction and --rl.abort-after-s let answers go on by newer weights"),
        ((1, 1, 0.0), "must be in"),
        ((1, 1, 1.0, -1.0), "must be in"),
    ],
)
def test_quotas_that_cannot_be(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quota(*values)

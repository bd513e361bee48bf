"""From answers, as they come, to what a step trains on: staleness kept within bounds, and no prompt lost.

At staleness 0 a step asks for its prompts, waits for all and takes them in order. Above 0 more of them are on their
way than a step takes, and a step takes what is there: nobody waits for the slowest.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from cogvit.errors import AskedToLeave, ConfigError, DataError
from cogvit.rl.ledger import Entry
from cogvit.rl.rollout import Answer, Request, RolloutEngine

_POLL_S = 1.0
_MOST_FAILURES = 4  # steps' worth in a row: what fails so often will go on to
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a step takes.

    Attributes:
        prompts: answered ones of a step.
        max_staleness: versions that the oldest token of an answer may be behind those that are trained.
        abort_after_fraction: below 1, at least prompts / fraction are on their way, and once a step has its own, those
            that were overtaken are aborted: asked for before one that it takes, and begun. They go on in the next step,
            by newer weights.
        abort_after_s: above 0, a step that has waited for so long aborts all that have begun, and takes what there is,
            one or more.

    Errors: ConfigError when a number is out of range, or something is to be aborted at staleness 0.
    """

    prompts: int
    max_staleness: int = 0
    abort_after_fraction: float = 1.0
    abort_after_s: float = 0.0

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.max_staleness < 0:
            raise ConfigError(f"{self.prompts} prompts a step must be at least 1, --rl.max-staleness at least 0")
        if not 0.0 < self.abort_after_fraction <= 1.0 or not 0.0 <= self.abort_after_s < math.inf:
            raise ConfigError(
                f"--rl.abort-after-fraction {self.abort_after_fraction:g} must be in (0, 1] and --rl.abort-after-s"
                f" {self.abort_after_s:g} at least 0"
            )
        if not self.max_staleness and (self.abort_after_fraction < 1.0 or self.abort_after_s):
            raise ConfigError(
                "--rl.abort-after-fraction and --rl.abort-after-s let answers go on by newer weights; pass"
                " --rl.max-staleness 1 or more with them"
            )

    @property
    def on_their_way(self) -> int:
        """Prompts that were asked for and not yet trained, when a step begins."""
        return max(self.prompts * (self.max_staleness + 1), math.ceil(self.prompts / self.abort_after_fraction))


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step trains on, and what else became known.

    Attributes:
        answers: in the order in which they were asked for; fewer than the quota where the time was up, some failed at
            staleness 0, or there are no more prompts.
        entries: of the ledger: what was aborted, failed or stale.
        waited_s: for these.
        whole_s: since the step before had its own, training included; the first one has only waited.
    """

    answers: tuple[Answer, ...]
    entries: tuple[Entry, ...]
    waited_s: float
    whole_s: float


class Collector:
    """Asks an engine for answers to prompts, and gives each step its own.

    Args:
        engine: who answers.
        prompts: what is asked, in order; ids are unique.
        quota: what a step takes.
        leaving: whether somebody asked the run to stop, which is asked between answers.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: Iterator[Request],
        quota: Quota,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine, self._prompts, self._quota, self._leaving = engine, prompts, quota, leaving
        self._numbers: dict[str, int] = {}  # of what was asked for and has no end, in order
        self._asked, self._failures = 0, 0
        self._ready: list[Answer] = []
        self._paused: list[Answer] = []
        self._entries: list[Entry] = []
        self._step = 0
        self._taken_s: float | None = None  # when the step before had its answers

    def take(self, step: int) -> Taken:
        """Return what a step trains on; the engine has its weights, whose version is the step.

        Errors: AskedToLeave, and whoever goes on asks the same again; DataError when requests fail one after the other;
        as the engine's `poll`.
        """
        began_s, quota, self._step = time.monotonic(), self._quota, step
        self._ask(quota.on_their_way - len(self._numbers))
        late = False
        while self._go_on():  # what is ready now may be trained
            late = 0.0 < quota.abort_after_s <= time.monotonic() - began_s and bool(self._ready)
            if late or (quota.max_staleness and len(self._ready) >= quota.prompts):
                break
            if self._leaving():
                raise AskedToLeave(f"asked to stop while step {step + 1} waits for answers")
            self._engine.poll(_POLL_S)
            if quota.max_staleness:
                self._ask(quota.on_their_way - len(self._numbers))
        now_s = time.monotonic()
        waited_s, whole_s, self._taken_s = now_s - began_s, now_s - (self._taken_s or began_s), now_s
        self._ready.sort(key=lambda answer: self._numbers[answer.request.id])
        answers, self._ready = self._ready[: quota.prompts], self._ready[quota.prompts :]
        last = max((self._numbers.pop(answer.request.id) for answer in answers), default=-1)
        if late or quota.abort_after_fraction < 1.0:
            self._engine.abort([one for one, number in self._numbers.items() if late or number < last])
        entries, self._entries = self._entries, []
        return Taken(tuple(answers), tuple(entries), waited_s, whole_s)

    def _ask(self, count: int) -> None:
        """Ask for new prompts, as long as there are some."""
        for request in islice(self._prompts, max(count, 0)):
            self._numbers[request.id] = self._asked
            self._asked += 1
            self._submit(request)

    def _submit(self, request: Request) -> None:
        version = None if self._quota.max_staleness else self._step
        self._engine.submit(replace(request, version=version), self._ended)

    def _go_on(self) -> bool:
        """End what is too old, take up what was aborted; returns whether anything is still on its way."""
        self._ready = [answer for answer in self._ready if not self._ended_stale(answer)]
        paused, self._paused = self._paused, []
        for answer in paused:
            if not self._ended_stale(answer):
                self._submit(replace(answer.request, begun=answer.samples))
        return len(self._numbers) > len(self._ready)

    def _ended_stale(self, answer: Answer) -> bool:
        stale = bool(answer.versions) and answer.versions[0] < self._step - self._quota.max_staleness
        if stale:
            self._end(answer.entry(self._step, "stale"))
        return stale

    def _end(self, entry: Entry) -> None:
        self._entries.append(entry)
        del self._numbers[entry.id]

    def _ended(self, answer: Answer) -> None:
        """Take what the engine calls back."""
        match answer.outcome:
            case "answered":
                self._ready.append(answer)
                self._failures = 0
            case "aborted":
                self._paused.append(answer)
                self._entries.append(answer.entry(self._step, "aborted"))
            case "stale":
                _LOG.warning("request %s is stale: %s", answer.request.id, answer.reason)
                self._end(answer.entry(self._step, "stale"))
            case "failed":
                _LOG.warning("request %s failed: %s", answer.request.id, answer.reason)
                self._end(answer.entry(self._step, "failed"))
                self._failures += 1
                if self._failures >= _MOST_FAILURES * self._quota.prompts:
                    raise DataError(
                        f"{self._failures} requests have failed one after the other, the last one"
                        f" ({answer.request.id}) because {answer.reason}"
                    )

"""What nobody waits for: rollouts with callbacks and abort beside synchronous ones, under a long tail of lengths.

usage: python -m tools.bench.rollouts [flags]
  --actors 4       that roll out; one more judges
  --prompts 8      answered ones of a step
  --group 4        answers to a prompt
  --steps 15       worth of prompts, all of which have to end in each run
  --median 30      tokens of an answer; the longest has 50 times as many
  --sigmas 0,0.8,1.2  of the logarithm of lengths; 0 has no tail
  --pace 2         ms of a token of a group
  --rounds 3       turns of every contender; the tables have medians over them, by the clock
  --out FILE       also write the record there

The policy waits instead of computing, as long for one answer as for a group, and reads 16 tokens of a prompt, or of an
answer that was aborted, in the time of one; a training step waits as long as its prompts take the actors when they
share them evenly, or not at all. So it is measured who waits for whom, on real actors, judges, callbacks and object
store. Lengths are a function of the prompt: every contender says the same answers.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import count

from cogvit.errors import ConfigError
from cogvit.rl import ledger
from cogvit.rl.actors import RayRollouts
from cogvit.rl.collect import Collector, Quota
from cogvit.rl.crew import Place
from cogvit.rl.rollout import Request, Speech
from cogvit.rl.speaker import noise_key
from cogvit.teacher.actors import connect, plan_cluster
from tools.bench._paced import PROMPT_TOKENS, READ_AT_ONCE, Chat, Paced, new_judge, new_player
from tools.bench._record import flags_of, run_benchmark

_LONGEST = 50  # times the median
_STALENESS = 4
_START_S = 0.1


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    actors: str = "4"
    prompts: str = "8"
    group: str = "4"
    steps: str = "15"
    median: str = "30"
    sigmas: str = "0,0.8,1.2"
    pace: str = "2"
    rounds: str = "3"
    out: str = ""


@dataclass(frozen=True)
class Work:
    """What every contender does: all prompts, and a wait of train_s for each step's worth."""

    requests: list[Request]
    train_s: float


@dataclass(frozen=True)
class Result:
    """Of one run: answered prompts a second, means over them, and how requests ended."""

    prompts_s: float
    staleness: float
    ends: Counter[str]
    faults: int


def contenders(prompts: int) -> dict[str, Quota]:
    """Return what is compared; the first is what the others are measured by."""
    return {
        "synchronous": Quota(prompts),
        f"asynchronous, staleness to {_STALENESS}": Quota(prompts, _STALENESS),
        "the same with abort": Quota(prompts, _STALENESS, abort_after_fraction=1 / (_STALENESS + 1)),
    }


def work_of(arguments: Arguments, policy: Paced, name: str) -> tuple[list[Request], float]:
    """Return the prompts, and the seconds that a step's worth of them takes actors that share it evenly."""
    prompts, steps = int(arguments.prompts), int(arguments.steps)
    speech = Speech(max_new_tokens=policy.median_tokens * _LONGEST)
    requests = [Request(f"{name}-{n}", Chat.source, n, int(arguments.group), speech) for n in range(prompts * steps)]
    tokens = 0.0
    for request in requests:
        keys = [noise_key(speech, request.id, sample, 0) for sample in range(request.samples)]
        tokens += PROMPT_TOKENS / READ_AT_ONCE + max(policy.length(key, speech.max_new_tokens) for key in keys)
    return requests, tokens * policy.token_s / steps / int(arguments.actors)


def run(engine: RayRollouts, work: Work, quota: Quota, versions: Iterator[int]) -> Result:
    """Train on all prompts."""
    collector, entries, staleness = Collector(engine, iter(work.requests), quota), list[ledger.Entry](), list[int]()
    began_s, ended = time.perf_counter(), 0
    while ended < len(work.requests):
        step = next(versions)
        engine.set_weights(step, {})
        taken = collector.take(step)
        time.sleep(work.train_s * len(taken.answers) / quota.prompts)
        new = [*taken.entries, *(answer.entry(step, "trained") for answer in taken.answers)]
        entries += new
        ended += sum(entry.end != "aborted" for entry in new)
        staleness += [step - answer.versions[0] for answer in taken.answers]
    elapsed_s = time.perf_counter() - began_s
    ends = Counter(entry.end for entry in entries)
    faults = ledger.faults(entries, [request.id for request in work.requests])
    return Result(ends["trained"] / elapsed_s, statistics.mean(staleness), Counter(ends), len(faults))


def table(arguments: Arguments, sigma: float, versions: Iterator[int]) -> Iterator[str]:
    """Yield the rows of one distribution of lengths, with training and without."""
    policy = Paced(int(arguments.median), sigma, float(arguments.pace) / 1000)
    players, judges = Place(int(arguments.actors)), Place(1)
    engine = RayRollouts(partial(new_player, policy), new_judge, players, judges, _STALENESS + 1)
    while engine.num_ready < players.actors + judges.actors:
        engine.poll(_START_S)
    requests, even_s = work_of(arguments, policy, f"s{sigma:g}")
    quotas = contenders(int(arguments.prompts))
    for train_s in (even_s, 0.0):
        found: dict[str, list[Result]] = {name: [] for name in quotas}
        for _ in range(int(arguments.rounds)):
            for name, quota in quotas.items():
                found[name].append(run(engine, Work(requests, train_s), quota, versions))
        base = statistics.median(result.prompts_s for result in found["synchronous"])
        for name, results in found.items():
            rate = statistics.median(result.prompts_s for result in results)
            ends = sum((result.ends for result in results), Counter[str]())
            told = ", ".join(f"{ends[end]} {end}" for end in ledger.ENDS if ends[end])
            yield (
                f"| {sigma:g} | {train_s * 1000:.0f} ms | {name} | {rate:.1f} | {rate / base:.2f}x |"
                f" {statistics.mean(result.staleness for result in results):.2f} | {told} |"
                f" {sum(result.faults for result in results)} |"
            )
    engine.close()


def check(arguments: Arguments) -> None:
    """Refuse flags that cannot be. Errors: ConfigError names the first."""
    for flag in ("actors", "prompts", "group", "steps", "median", "rounds"):
        value = getattr(arguments, flag)
        if not value.isdigit() or value == "0":
            raise ConfigError(f"--{flag} {value} must be a whole number, 1 or more")
    for flag, values in (("sigmas", arguments.sigmas.split(",")), ("pace", [arguments.pace])):
        for value in values:
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if not 0.0 <= number < 1000.0:
                raise ConfigError(f"--{flag} {value} must be a number from 0 to 1000")


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: as `check`."""
    check(arguments)
    yield "# Rollouts, on CPU"
    yield ""
    yield f"{date.today()}, `python -m tools.bench.rollouts {flags_of(arguments)}`; torch {version('torch')}, ray"
    yield f"{version('ray')}. The policy waits: what is measured is who waits for whom, not how fast a model is."
    yield ""
    yield "| sigma | training | rollouts | prompts a second | times | mean staleness | ends | faults |"
    yield "|---|---|---|---|---|---|---|---|"
    versions = count()
    with connect(plan_cluster(""), num_cpus=int(arguments.actors) + 1):
        for sigma in arguments.sigmas.split(","):
            yield from table(arguments, float(sigma), versions)


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))

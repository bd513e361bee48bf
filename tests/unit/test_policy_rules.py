"""Stage 4's prompts, its guard and what it refuses."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvit.config import DataConfig, ParallelConfig, ReinforcementConfig, RunConfig
from cogvit.config.recipe import prompts_hash
from cogvit.errors import ConfigError, DataError, PolicyFault
from cogvit.rl import ledger
from cogvit.rl.collect import Taken
from cogvit.rl.figures import figures
from cogvit.rl.guard import PolicyGuard
from cogvit.rl.ledger import Entry
from cogvit.rl.prompts import prompts, weights_of
from cogvit.rl.rollout import Answer, Request, Sample, Span, Turn
from cogvit.rl.rounds import ended_requests
from cogvit.stages import read_run
from cogvit.stages.policy import patience_of
from cogvit.stages.policy_rules import check_policy

WEIGHTS = {"digits": 2.0, "counting": 1.0}
GOOD = RunConfig(
    objective="policy",
    rl=ReinforcementConfig(tasks="digits,counting"),
    data=DataConfig(global_batch_images=32),
)


def asked(seed: int, count: int, ended: set[str] = frozenset()) -> list[Request]:  # type: ignore[assignment]
    return list(islice(prompts(replace(GOOD, seed=seed), WEIGHTS, ended), count))


def test_prompts_are_a_function_of_the_seed_and_mixed_by_weight() -> None:
    first = asked(0, 300)
    assert Counter(one.source for one in first) == {"digits": 200, "counting": 100}
    assert len({one.id for one in first}) == len({one.seed for one in first}) == 300
    assert [(one.id, one.seed) for one in asked(0, 300)] == [(one.id, one.seed) for one in first]
    for other in (1, 31, 62):
        assert not {one.seed for one in asked(other, 300)} & {one.seed for one in first}


def test_a_task_that_a_mixture_leaves_out_is_told() -> None:
    mixed = replace(GOOD, rl=replace(GOOD.rl, mixture=(("digits", 2.0),)))
    assert weights_of(mixed, ["digits"]) == {"digits": 2.0}
    with pytest.raises(ConfigError, match=r"--rl\.mixture gives 'counting' no weight; name it, or leave its task out"):
        weights_of(mixed, ["digits", "counting"])


def test_prompts_that_have_ended_are_not_asked_again() -> None:
    first = asked(0, 6)
    ended = {first[0].id, first[3].id}
    assert [one.id for one in asked(0, 4, ended)] == [one.id for one in first if one.id not in ended]


def test_a_ledger_is_rewound_to_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert ended_requests(path, 0) == frozenset()
    ends = [("digits-0", 1, "trained"), ("digits-1", 1, "aborted"), ("digits-1", 2, "failed"), ("digits-2", 3, "stale")]
    ledger.append(path, [Entry(name, "digits", 0, step, end) for name, step, end in ends])  # type: ignore[arg-type]
    assert ended_requests(path, 2) == {"digits-0", "digits-1"}
    assert [entry.step for entry in ledger.read(path)] == [1, 1, 2]
    with pytest.raises(DataError, match="does not reach to step 5"):
        ended_requests(path, 5)


def test_a_run_is_the_same_wherever_the_file_of_its_task_lies(tmp_path: Path) -> None:
    def told(tasks: str, *judge: tuple[str, float]) -> str:
        return prompts_hash(replace(GOOD, rl=replace(GOOD.rl, tasks=tasks, judge=judge)))

    for folder, code in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(f"class Own:\n    hours = {code}\n")
    a, b, c = (f"{tmp_path / folder / 'own.py'}:Own" for folder in "abc")
    assert told(f"digits,{a}") == told(f"digits, {tmp_path}/c/../b/own.py:Own") == told(f"digits,{b}")
    assert told("digits", (a, 1.0)) == told("digits", (b, 1.0))
    others = (
        told("digits", (a, 1.0)),
        told("digits", (a, 2.0)),
        told("digits", (c, 1.0)),
        told("digits", ("task", 1.0)),
    )
    assert len({told(a), told(c), told("digits"), told(a.replace(":Own", ":Other")), *others}) == 8


def test_an_actor_is_replaced_before_its_step_is_over() -> None:
    for limit_s, waits_s in ((600.0, 300.0), (0.0, 600.0)):
        config = replace(GOOD, parallel=ParallelConfig(step_timeout_s=limit_s))
        assert patience_of(config).answer_s == waits_s


def look(guard: PolicyGuard, *steps: dict[str, float]) -> None:
    for number, values in enumerate(steps, 1):
        guard.check(number, values)


def seen(effect: float, questions: float = 2.0) -> dict[str, float]:
    return {"image_effect_digits": effect, "other_images_digits": questions}


def test_the_guard_waits_for_three_blind_steps_of_a_source() -> None:
    guard = PolicyGuard(GOOD, ["digits", "counting"])
    blind, seeing = seen(0.0), seen(-0.2)
    unmeasured = {**seen(float("nan"), 0.0), "image_effect_counting": 1.0}
    look(guard, blind, blind, seeing, blind, unmeasured, blind)
    with pytest.raises(PolicyFault, match="step 7: the policy does not look"):
        guard.check(7, blind)
    look(PolicyGuard(replace(GOOD, rl=replace(GOOD.rl, min_image_effect=0.0)), ["digits"]), *[blind] * 5)
    look(PolicyGuard(replace(GOOD, rl=replace(GOOD.rl, without_images=("digits",))), ["digits"]), *[blind] * 5)


def test_the_guard_knows_a_policy_that_is_sure_of_itself() -> None:
    """Two pictures of which the same is true change hardly anything; 48 do not all come in such pairs."""
    guard = PolicyGuard(GOOD, ["digits"])
    look(guard, *[seen(1e-9)] * 23)
    with pytest.raises(PolicyFault, match="for 24 steps other images have changed answers to 48 questions of digits"):
        guard.check(24, seen(1e-9))
    solved = {**seen(0.0), "reward_digits": 1.0}
    look(guard := PolicyGuard(GOOD, ["digits"]), *[solved] * 23)
    with pytest.raises(PolicyFault, match="to 48 questions"):
        guard.check(24, solved)
    look(guard := PolicyGuard(GOOD, ["digits"]), seen(1e-9, 40.0), seen(1e-9, 40.0))
    with pytest.raises(PolicyFault, match="for 3 steps"):
        guard.check(3, seen(1e-9, 40.0))


@pytest.mark.parametrize(
    ("precision", "limit", "gap", "stops"),
    [
        ("fp32", None, 1e-5, False),
        ("fp32", None, 2e-3, True),
        ("bf16", None, 0.1, False),
        ("bf16", 0.05, 0.1, True),
        ("fp32", None, float("nan"), True),
        ("fp32", None, float("-inf"), False),
    ],
)
def test_the_guard_stops_where_rollout_and_training_differ(
    precision: Any, limit: float | None, gap: float, stops: bool
) -> None:
    config = replace(GOOD, precision=precision, rl=replace(GOOD.rl, max_logprob_gap=limit))
    with pytest.raises(PolicyFault, match="logprob_gap") if stops else nullcontext():
        PolicyGuard(config, ["digits"]).check(1, {"logprob_gap": gap})


def answer(source: str, rewards: list[float], version: int) -> Answer:
    spans = (Span(version, 3), Span(version + 1, 1))
    turn = Turn(True, "one", np.zeros(4, np.int32), np.zeros(4, np.float32), spans)
    samples = tuple(Sample((turn,), over=True, reward=reward) for reward in rewards)
    return Answer(Request(f"{source}-{version}", source, 0, len(rewards)), "answered", samples)


def test_figures_are_means_over_prompts() -> None:
    answers = (answer("a", [0.0, 1.0], 3), answer("a", [0.2, 0.2], 3), answer("b", [0.5, 1.0], 2))
    found = figures(Taken(answers, (Entry("a-9", "a", 3, 4, "aborted"),), 0.5, 2.0), 4)
    assert (found["aborted_prompts"], found["failed_prompts"], found["rollout_s"]) == (1.0, 0.0, 0.5)
    assert (found["answers_per_s"], found["rollout_tokens_per_s"]) == (3.0, 12.0)  # of the whole step
    assert found["reward"] == pytest.approx((0.5 + 0.2 + 0.75) / 3)
    assert (found["reward_a"], found["pass_a"]) == (pytest.approx(0.35), 0.5)
    assert (found["reward_b"], found["pass_b"]) == (0.75, 1.0)
    assert found["equal_groups"] == pytest.approx(1 / 3) and found["answer_length_tokens"] == 4.0
    assert found["staleness"] == pytest.approx((2 * (3 * 1 + 0) + (3 * 2 + 1)) / 12)


BAD = [
    ({"tasks": ""}, r"--rl\.tasks NAME,\.\.\. is needed"),
    ({"group": 1}, r"--rl\.group 1 must be at least 2"),
    ({"group": 5}, r"--rl\.group 5 does not divide data\.global_batch_images=32"),
    ({"max_staleness": -1, "actors": 1}, r"--rl\.max-staleness -1 must not be negative"),
    ({"max_staleness": 1}, r"--rl\.max-staleness 1 needs --rl\.actors"),
    ({"abort_after_s": 1.0}, r"--rl\.abort-after-s puts answers off"),
    ({"abort_after_fraction": 0.5}, r"--rl\.abort-after-fraction puts answers off"),
    ({"abort_after_fraction": 0.0}, r"--rl\.abort-after-fraction 0\.0 must be in \(0, 1\]"),
    ({"clip_low": 2.0}, r"rl\.clip_low=2\.0"),
    ({"dual_clip": 1.1}, r"--rl\.dual-clip 1\.1 must be above 1\.2 \(1 \+ rl\.clip_high\)"),
    ({"dual_clip": math.inf}, r"--rl\.dual-clip inf must be .* finite"),
    ({"kl_weight": float("nan")}, r"rl\.kl_weight=nan"),
    ({"max_new_tokens": 4096}, r"--rl\.max-new-tokens 4096 must be below"),
    ({"temperature": 0.0}, r"rl\.temperature=0\.0 must be positive"),
    ({"mixture": (("digits", 0.0),)}, r"rl\.mixture gives 'digits' the weight 0\.0"),
    ({"judge": (("task", -1.0),)}, r"rl\.judge gives 'task' the weight -1\.0"),
    ({"max_logprob_gap": 0.0}, r"rl\.max_logprob_gap=0\.0 must be positive"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    check_policy(GOOD)
    with pytest.raises(ConfigError, match=message):
        check_policy(replace(GOOD, rl=replace(GOOD.rl, **options)))


def test_fields_of_other_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--data\.shards x\.tar is of stages 1 to 3"):
        check_policy(replace(GOOD, data=replace(GOOD.data, shards="x.tar")))
    with pytest.raises(ConfigError, match=r"--rl\.group is of Stage 4: policy alone, and demo_stage3 is Stage 3"):
        read_run("demo_stage3", ["--rl.group", "4"])
    with pytest.raises(ConfigError, match=r"--mmtp\.depths is of Stage 3: language alone, and demo_rl is Stage 4"):
        read_run("demo_rl", ["--mmtp.depths", "1"])

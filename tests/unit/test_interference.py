"""The experiment on what tasks do to each other: what its command refuses, and its tables."""

from __future__ import annotations

import pytest

from cogvit.errors import ConfigError
from tools.experiments.interference import WAYS, Arguments, Seen, measure, record
from tools.experiments.policy_course import Worth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (Arguments(tasks="digits,nose"), "--tasks nose is unknown; tasks are digits, counting"),
        (Arguments(start_steps="0"), "--start-steps 0 must be a positive whole number"),
        (Arguments(seeds="0,one"), "--seeds 0,one must be whole numbers with commas between"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(arguments)


def test_tables_hold_changes_beside_the_start() -> None:
    def worths(digits: float, counting: float) -> dict[str, Worth]:
        return {"digits": Worth(digits, 0.9, 0.1, 0), "counting": Worth(counting, 1.0, 0.2, 0)}

    after = {
        (way, trained): worths(0.6 + 0.1 * (trained == "digits"), 0.5)
        for way in WAYS
        for trained in ("digits", "counting", "all")
    }
    found = [Seen(worths(start, 0.7), after) for start in (0.5, 0.7)]
    lines = list(record(["digits", "counting"], found))
    assert "| reward | 0.600 ± 0.141 | 0.700 ± 0.000 |" in lines
    row = "| digits | +0.100 ± 0.141 | -0.200 ± 0.000 | -0.200 ± 0.000 |"
    assert [line for line in lines if line.startswith("| digits")] == [row] * len(WAYS)
    (everything, _) = [line for line in lines if line.startswith("| all")]
    assert everything == "| all | +0.000 ± 0.141 | -0.200 ± 0.000 | -0.100 ± 0.071 |"
    alone = list(record(["digits", "counting"], found[:1]))
    assert alone[0] == "One seed. The starts:" and "| all | +0.100 | -0.200 | -0.050 |" in alone

"""Losses of 20 steps are those of the record: to the bit on machines that have recorded them, closely on others.

A change that is meant to change them records them anew, with `python -m tests.golden.curves`, and says why.
"""

from __future__ import annotations

import pytest

from tests.golden.curves import CASES, assert_close, machine, read, run
from tests.pool import Pool


@pytest.mark.parametrize("name", CASES)
def test_curves_are_those_of_the_record(pool: Pool, name: str) -> None:
    actual, records = run(pool, CASES[name]), [record for record in read() if name in record.curves]
    own = next((record for record in records if record.machine == machine()), None)
    if own is not None:
        assert actual == own.curves[name]
    else:
        assert_close(actual, records[0].curves[name])

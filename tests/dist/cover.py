"""Every legal layout of two and four processes, and a small set of them in which every pair of choices meets."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations, product

from tests.dist.runs import FAMILIES, Case

Choice = tuple[str, object]


def legal_cases() -> list[Case]:
    """Every combination of the choices that the configuration accepts on two and on four processes."""
    cases = []
    for tp, pp, dp in product((1, 2, 4), repeat=3):
        if not 2 <= tp * pp * dp <= 4:
            continue
        for sequence, zero, optimizer, recompute, stage, family in product(
            (False, True) if tp > 1 else (False,),
            (1, 2),
            ("sgd", "muon", "adamw"),
            ("none", "selective", "full"),
            ("distill", "contrast"),
            FAMILIES,
        ):
            cases.append(Case(tp * pp * dp, tp, pp, sequence, zero, optimizer, recompute, stage, family))
    return cases


def choices(case: Case) -> list[Choice]:
    """A case as its choices; the world size follows from them."""
    named = [(field.name, getattr(case, field.name)) for field in fields(case) if field.name != "world"]
    return [*named, ("dp", case.dp)]


def pairs(case: Case) -> set[tuple[Choice, Choice]]:
    """Every two choices that a case brings together."""
    return set(combinations(choices(case), 2))


def pairwise_cover(cases: list[Case]) -> list[Case]:
    """A subset in which every pair that any case has is met; greedy, fewest processes first among equals."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: (len(pairs(case) & missing), -case.world))
        chosen.append(best)
        missing -= pairs(best)
    return chosen

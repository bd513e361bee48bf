"""The tables and the picture of `tools.experiments.policy`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from cogvit.report.chart import Series, svg_picture
from tools.experiments.policy_course import Learned, Worth
from tools.experiments.tables import spread, table

HEAD = ("reward", "pass@k", "chance")
_NEIGHBORS = 5  # steps that a curve's point is the mean of
_LAST = 10  # steps that are called the end


def learned_table(rows: Sequence[Learned]) -> Iterator[str]:
    """Yield what each policy has learned, and of several seeds their mean and standard deviation."""
    heads = ["tasks", "seed", "staleness", "task", *(f"{name} before" for name in HEAD), *HEAD, "gain"]
    lines = []
    for group in _groups(rows):
        first = group[0]
        for row in group:
            told = [row.tasks, str(row.seed), str(row.staleness), row.source]
            lines.append([*told, *figures(row.before), *figures(row.after), f"{_gain(row):+.3f}"])
        if len(group) > 1:
            before, after = ([spread(of) for of in _columns(worths)] for worths in _worths(group))
            told = [first.tasks, "mean", str(first.staleness), first.source]
            lines.append([*told, *before, *after, spread([_gain(row) for row in group])])
    yield from table(heads, lines)


def stability_table(rows: Sequence[Learned]) -> Iterator[str]:
    """Yield how each policy's training went.

    "staleness" is what was seen, a mean over steps; "reward" of the last steps; "fall" the most by which the mean
    reward of neighboring steps has fallen from where it was; "clipped" and "ratio" the means of all steps, the latter
    with the step's furthest from 1; "gap" the largest of all steps.
    """
    lines = []
    for row in rows:
        steps = row.steps
        fall, ratios = falls_by(curve(row)), [step["ratio"] for step in steps]
        furthest = max(ratios, key=lambda ratio: abs(ratio - 1.0))
        seen, clipped = (fmean(step[name] for step in steps) for name in ("staleness", "clipped"))
        lost = [str(int(sum(step[f"{end}_prompts"] for step in steps))) for end in ("stale", "failed")]
        reward, gap = fmean(curve(row, 1)[-_LAST:]), max(step["logprob_gap"] for step in steps)
        told = [row.tasks, str(row.seed), str(row.staleness), row.source, f"{seen:.2f}", f"{reward:.3f}", f"{fall:.3f}"]
        lines.append([*told, f"{clipped:.4f}", f"{fmean(ratios):.3f}, {furthest:.3f}", f"{gap:.1e}", *lost])
    heads = ["tasks", "seed", "at most", "task", "staleness", "reward", "fall", "clipped", "ratio", "gap"]
    yield from table([*heads, "stale", "failed"], lines)


def picture(rows: Sequence[Learned]) -> str:
    """Return the rewards of the steps as SVG, means of the seeds: a line a task, or charts with a line a staleness."""
    lines: dict[str, dict[int, Series]] = {}
    for group in _groups(rows):
        means = [fmean(values) for values in zip(*(curve(row) for row in group), strict=True)]
        own = lines.setdefault(group[0].source, {})
        own[group[0].staleness] = Series(group[0].source, range(1, len(means) + 1), means, noisy=False)
    if len({row.staleness for row in rows}) == 1:
        return svg_picture([("reward", [line for own in lines.values() for line in own.values()])])
    return svg_picture(
        [
            (f"reward_{source}", [Series(f"staleness {age}", line.x, line.y, False) for age, line in own.items()])
            for source, own in lines.items()
        ]
    )


def figures(found: Worth) -> list[str]:
    """Return reward, pass@k and chance."""
    return [f"{value:.3f}" for value in (found.reward, found.passed, found.chance)]


def curve(row: Learned, neighbors: int = _NEIGHBORS) -> list[float]:
    """Return a task's reward in the steps that have asked it, each the mean of so many in a row."""
    name = f"reward_{row.source}"
    rewards = [step[name] for step in row.steps if name in step]
    return [fmean(rewards[max(0, end - neighbors) : end]) for end in range(1, len(rewards) + 1)]


def falls_by(values: Sequence[float]) -> float:
    """Return the most by which a later value lies below an earlier one."""
    return max((value - min(values[place:]) for place, value in enumerate(values)), default=0.0)


def _groups(rows: Sequence[Learned]) -> list[list[Learned]]:
    """Rows that differ in their seed alone, together."""
    groups: dict[tuple[str, int, str], list[Learned]] = {}
    for row in rows:
        groups.setdefault((row.tasks, row.staleness, row.source), []).append(row)
    return [*groups.values()]


def _worths(rows: Sequence[Learned]) -> tuple[list[Worth], list[Worth]]:
    return [row.before for row in rows], [row.after for row in rows]


def _columns(worths: Sequence[Worth]) -> list[list[float]]:
    return [[worth.reward for worth in worths], [worth.passed for worth in worths], [worth.chance for worth in worths]]


def _gain(row: Learned) -> float:
    return row.after.reward - row.before.reward

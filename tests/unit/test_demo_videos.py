"""The videos of demo_video: what their questions can be answered by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from tools.make_demo_videos import SHOWN_FRAMES, Story, story


def guessed(stories: list[Story], seen: Callable[[Story], object]) -> float:
    """The share of answers that are right when one always gives the most frequent one where this alone is seen."""
    found: dict[object, Counter[str]] = {}
    for one in stories:
        found.setdefault(seen(one), Counter())[one.answer] += 1
    return sum(max(own.values()) for own in found.values()) / len(stories)


def test_a_time_needs_both_the_frame_and_its_time() -> None:
    draw = np.random.default_rng(0)
    stories = [one for one in (story(draw) for _ in range(8000)) if one.source == "time"]
    place = {f"When did the {shape} appear?": number for number, shape in enumerate(("circle", "square"))}
    assert guessed(stories, lambda one: one.period_s) < 1 / (SHOWN_FRAMES - 1) + 0.05
    assert guessed(stories, lambda one: one.places[place[one.question]]) < 1 / 8 + 0.05
    assert guessed(stories, lambda one: (one.period_s, one.places[place[one.question]])) == 1.0


def test_order_is_a_coin_without_frames() -> None:
    draw = np.random.default_rng(0)
    stories = [one for one in (story(draw) for _ in range(8000)) if one.source == "order"]
    assert guessed(stories, lambda one: (one.period_s, one.question)) < 0.55

"""Episodes of a policy to look at: what it was asked, what it said each time, and what that was worth."""

from __future__ import annotations

from collections.abc import Mapping

from cogvit.evaluation.answers import strip
from cogvit.evaluation.examples import Example, Item
from cogvit.model.chat import message_parts
from cogvit.model.image_input import rgb_image
from cogvit.rl.figures import PASSED
from cogvit.rl.prompts import FIRST_UNASKED_EPISODE
from cogvit.rl.rollout import Answer, Request, RolloutEngine, Sample, Speech
from cogvit.rl.task import NewTask

_PROMPTS = 3  # of each task
_ANSWERS = 4  # to each


def episode_examples(engine: RolloutEngine, tasks: Mapping[str, NewTask], speech: Speech) -> list[Example]:
    """Return episodes of each task that no run has asked; one that fails shows why.

    Args:
        engine: who answers, with the policy's weights.
        tasks: by source.
        speech: how answers are drawn.
    """
    heard: list[Answer] = []
    for source in tasks:
        for number in range(_PROMPTS):
            seed = FIRST_UNASKED_EPISODE + number
            engine.submit(Request(f"{source}-{seed}", source, seed, _ANSWERS, speech), heard.append)
    while engine.poll():
        continue
    return [_example(answer, tasks[answer.request.source]) for answer in heard]


def _example(answer: Answer, new_task: NewTask) -> Example:
    """The first question of an episode with its images, and each sample's answers."""
    if answer.outcome != "answered":
        return Example(Item(answer.request.source), (Item(f"{answer.outcome}: {answer.reason}"),))
    parts = [part for message in new_task().reset(answer.request.seed) for part in message_parts(message)]
    images = [rgb_image(part["image"]) for part in parts if part["type"] == "image"]
    question = " ".join(part["text"] for part in parts if part["type"] == "text")
    return Example(Item(question, strip(images) if images else None), tuple(map(_item, answer.samples)))


def _item(sample: Sample) -> Item:
    assert sample.reward is not None, "an answered sample is judged"
    said = " \N{RIGHTWARDS ARROW} ".join(turn.text for turn in sample.turns)
    return Item(f"{said} ({sample.reward:.2f})", right=sample.reward >= PASSED)

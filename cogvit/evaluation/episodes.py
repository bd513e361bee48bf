"""Episodes of a policy to look at: what it was asked, what it said each time, and what that was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cogvit.errors import DataError
from cogvit.evaluation.answers import strip
from cogvit.evaluation.examples import Example, Item
from cogvit.model.chat import Message, message_parts
from cogvit.model.image_input import rgb_image
from cogvit.rl.episode import conversations
from cogvit.rl.figures import PASSED
from cogvit.rl.patience import patient
from cogvit.rl.prompts import FIRST_UNASKED_EPISODE
from cogvit.rl.rollout import Answer, Request, RolloutEngine, Sample, Speech
from cogvit.rl.task import NewTask

_PROMPTS = 3  # of each task
_ANSWERS = 4  # to each
_NOTHING = "(nothing)"  # where an answer has no letters


def episode_examples(
    engine: RolloutEngine, tasks: Mapping[str, NewTask], speech: Speech, task_s: float
) -> list[Example]:
    """Return episodes of each task that no run has asked; one that fails shows why.

    Args:
        engine: who answers, with the policy's weights.
        tasks: by source.
        speech: how answers are drawn.
        task_s: how long the calls of a task for a prompt may take when it is played again.
    """
    heard: list[Answer] = []
    for source in tasks:
        for number in range(_PROMPTS):
            seed = FIRST_UNASKED_EPISODE + number
            engine.submit(Request(f"{source}-{seed}", source, seed, _ANSWERS, speech), heard.append)
    while engine.poll():
        continue
    return [_example(answer, tasks[answer.request.source], task_s) for answer in heard]


def _example(answer: Answer, new_task: NewTask, task_s: float) -> Example:
    """The first question of an episode with its images, and each sample's answers with what was asked between them."""
    request, texts = answer.request, [[turn.text for turn in sample.turns] for sample in answer.samples]
    if answer.outcome != "answered":
        return Example(Item(request.source), (Item(f"{answer.outcome}: {answer.reason}"),))
    try:
        talks = patient(
            f"task {request.source!r}, played again,",
            task_s,
            lambda: [conversations(new_task, request.seed, said) for said in texts],
        )
    except DataError as error:
        return Example(Item(request.source), (Item(f"failed: {error}"),))
    first: list[Message] = talks[0][0]
    parts = [part for message in first for part in message_parts(message)]
    images = [rgb_image(part["image"]) for part in parts if part["type"] == "image"]
    question = " ".join(part["text"] for part in parts if part["type"] == "text")
    heard = ([*map(_told, talk[-1][len(first) :]), said[-1]] for talk, said in zip(talks, texts, strict=True))
    return Example(
        Item(f"{request.source}: {question}", strip(images) if images else None),
        tuple(map(_item, heard, answer.samples)),
    )


def _told(message: Message) -> str:
    """A message in a line."""
    return " ".join(part["text"] if part["type"] == "text" else f"({part['type']})" for part in message_parts(message))


def _item(heard: Sequence[str], sample: Sample) -> Item:
    assert sample.reward is not None, "an answered sample is judged"
    said = " \N{RIGHTWARDS ARROW} ".join(text if text.strip() else _NOTHING for text in heard)
    return Item(f"{said} ({sample.reward:.2f})", right=sample.reward >= PASSED)

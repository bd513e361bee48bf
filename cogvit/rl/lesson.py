"""What a policy learns from: each turn of each answer, with the tokens that it answered and how good it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.errors import DataError
from cogvit.model.chat import Prompt, read_prompt
from cogvit.model.config import VideoConfig
from cogvit.model.image_input import ImageSize
from cogvit.model.packing import Grid
from cogvit.objective.policy import advantages
from cogvit.rl.episode import conversations
from cogvit.rl.rollout import Answer, Turn
from cogvit.rl.task import NewTask


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a turn answers, without pixels: an episode's beginning, or what followed some answers.

    Attributes:
        source: of the task.
        seed: of the episode.
        texts: answers before this one.
        ids: [n] int64, one image token where an image stands.
        grids: rows and columns of patches of each image.
    """

    source: str
    seed: int
    texts: tuple[str, ...]
    ids: NDArray[np.int64]
    grids: tuple[Grid, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A turn to learn from.

    Attributes:
        question: the object itself is shared by those that answer it.
        said: the answer.
        advantage: of its episode, over the others of its group.
    """

    question: Question
    said: Turn
    advantage: float


@dataclass(frozen=True)
class Reader:
    """Reads questions as the policy does.

    Attributes:
        tasks: what makes a task, by its source.
        tokenizer: of the language model.
        limits: how large images are shown.
        patch_px: sides of a patch.
        video: which frames of videos are shown.
    """

    tasks: Mapping[str, NewTask]
    tokenizer: Any
    limits: ImageSize
    patch_px: int
    video: VideoConfig

    def prompt(self, source: str, seed: int, texts: Sequence[str]) -> Prompt:
        """Return tokens and images of what follows some answers of an episode.

        Errors: DataError when the task raises, or does not do what it did before.
        """
        try:
            talk = conversations(self.tasks[source], seed, (*texts, ""))[-1]
        except DataError:
            raise
        except Exception as error:  # a user's task
            raise DataError(
                f"task {source!r}, episode {seed}: played again it raised {type(error).__name__}: {error}; an episode"
                " must be a function of its seed and the answers"
            ) from None
        return read_prompt(self.tokenizer, talk, self.video)

    def question(self, source: str, seed: int, texts: tuple[str, ...]) -> Question:
        """Return a question. Errors: as `prompt`."""
        prompt = self.prompt(source, seed, texts)
        sizes_px = (self.limits.size_px(image.height, image.width) for image in prompt.images)
        grids = tuple((high // self.patch_px, wide // self.patch_px) for high, wide in sizes_px)
        return Question(source, seed, texts, np.array(prompt.ids, np.int64), grids)

    def lessons(self, answer: Answer) -> Iterator[Lesson]:
        """Yield what an answered request teaches, turn by turn. Errors: as `prompt`."""
        request, questions = answer.request, dict[tuple[str, ...], Question]()
        for sample, advantage in zip(answer.samples, group_advantages(answer), strict=True):
            texts: tuple[str, ...] = ()
            for turn in sample.turns:
                if texts not in questions:
                    questions[texts] = self.question(request.source, request.seed, texts)
                yield Lesson(questions[texts], turn, advantage)
                texts = (*texts, turn.text)


def group_advantages(answer: Answer) -> list[float]:
    """Return by how much each sample of a request is better than the others, in standard deviations."""
    reward_A = torch.tensor([sample.reward or 0.0 for sample in answer.samples], dtype=torch.float64)
    return advantages(reward_A, torch.zeros(len(reward_A), dtype=torch.int64)).tolist()

"""Episodes to look at: each answer with its worth, and what failed with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cogvit import VisionLanguageModel
from cogvit.evaluation.episodes import episode_examples
from cogvit.evaluation.examples import Example
from cogvit.model.chat import Message
from cogvit.rl.local import LocalEngine
from cogvit.rl.rollout import Speech
from cogvit.rl.speaker import PlainSpeaker
from cogvit.rl.task import NewTask
from tests.rl_tasks import TASKS, Twice, policy


class Once(Twice):
    """Cannot be played again."""

    source, begun = "once", Counter[int]()

    def reset(self, seed: int) -> Sequence[Message]:
        self.begun[seed] += 1
        if self.begun[seed] > 4 + 4:  # rolled out and judged
            raise RuntimeError("no more")
        return super().reset(seed)


def shown_of(tasks: Mapping[str, NewTask], model: VisionLanguageModel) -> list[Example]:
    engine = LocalEngine(PlainSpeaker(model), tasks)
    engine.set_weights(0, {})
    return episode_examples(engine, tasks, Speech(seed=7, max_new_tokens=2), task_s=30.0)


def test_an_answer_without_letters_is_seen() -> None:
    shown = shown_of({"digits": TASKS["digits"]}, policy(eos_ids=tuple(range(300))))
    captions = [item.caption for example in shown for item in example.answers]
    assert "(nothing) (0.00)" in captions and all(caption.rpartition(" ")[0].strip() for caption in captions)


def test_a_task_that_cannot_be_played_again_is_told() -> None:
    told = {example.answers[0].caption for example in shown_of({"once": Once}, policy())}
    assert told == {"failed: task 'once', played again, raised RuntimeError: no more"}


def test_episodes_show_questions_answers_and_worth_or_why_there_is_none() -> None:
    tasks = {source: TASKS[source] for source in ("twice", "raises", "judge raises")}
    shown = shown_of(tasks, policy())
    played, raising, unjudged = shown[:3], shown[3:6], shown[6:]
    for example in played:
        assert example.query.caption == "twice: And?" and example.query.png is not None and len(example.answers) == 4
        for item in example.answers:  # two turns, worth a hundredth a letter
            text, _, worth = item.caption.rpartition(" ")
            first, second = text.split(" \N{RIGHTWARDS ARROW} (image) Then? \N{RIGHTWARDS ARROW} ")
            first, second = (said.replace("(nothing)", "") for said in (first, second))
            assert worth == f"({len(first + second) / 100:.2f})" and not item.right
    assert {example.answers[0].caption for example in raising} == {
        "failed: reset of task 'raises' raised RuntimeError: no"
    }
    assert len(unjudged) == 3 and all("KeyError" in example.answers[0].caption for example in unjudged)

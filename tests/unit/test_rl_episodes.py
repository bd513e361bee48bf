"""Episodes to look at: each answer with its worth, and what failed with its reason."""

from __future__ import annotations

from cogvit.evaluation.episodes import episode_examples
from cogvit.rl.local import LocalEngine
from cogvit.rl.rollout import Speech
from cogvit.rl.speaker import PlainSpeaker
from tests.rl_tasks import TASKS, policy


def test_episodes_show_questions_answers_and_worth_or_why_there_is_none() -> None:
    tasks = {source: TASKS[source] for source in ("twice", "raises", "judge raises")}
    engine = LocalEngine(PlainSpeaker(policy()), tasks)
    engine.set_weights(0, {})
    shown = episode_examples(engine, tasks, Speech(seed=7, max_new_tokens=2))
    played, raising, unjudged = shown[:3], shown[3:6], shown[6:]
    for example in played:
        assert example.query.caption == "And?" and example.query.png is not None and len(example.answers) == 4
        for item in example.answers:  # two turns, worth a hundredth a letter
            text, _, worth = item.caption.rpartition(" ")
            first, arrow, second = text.partition(" \N{RIGHTWARDS ARROW} ")
            assert arrow and worth == f"({len(first + second) / 100:.2f})" and not item.right
    assert {example.answers[0].caption for example in raising} == {
        "failed: reset of task 'raises' raised RuntimeError: no"
    }
    assert len(unjudged) == 3 and all("KeyError" in example.answers[0].caption for example in unjudged)

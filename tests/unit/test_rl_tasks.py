"""Tasks of reinforcement learning: each family's truth, its verifier on right and wrong answers, tasks of one's own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvit.errors import ConfigError, DataError
from cogvit.model.boxes import Box, boxes_text
from cogvit.rl import ledger, verify
from cogvit.rl.families import COLORS, FAMILIES, SIDE_PX
from cogvit.rl.ledger import Entry
from cogvit.rl.task import Task, tasks_of


def pixels(messages: Any) -> np.ndarray:
    (message,) = messages
    return np.asarray(message["content"][0]["image"])


def right_answer(task: Any) -> str:
    """What the task's truth says in the words of its family."""
    truth = getattr(task, "truth", None)
    match task.source:
        case "grounding":
            return boxes_text([truth], SIDE_PX, SIDE_PX)
        case "drawing":
            return "; ".join(f"{color} {row} {column}" for (row, column), color in truth.items())
        case "clicking":
            x, y = (task.target.x0 + task.target.x1) / 2, (task.target.y0 + task.target.y1) / 2
            return f"[[{int(x / SIDE_PX * 1000):03},{int(y / SIDE_PX * 1000):03}]]"
    return f"{truth}."


def played(task: Task, seed: int, *answers: str | None) -> float:
    """The reward of an episode; None answers rightly."""
    task.reset(seed)
    for answer in answers:
        said = right_answer(task) if answer is None else answer
        if task.step(said) is None:
            return task.verify(said)
    raise AssertionError("the episode has not ended")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_truth_is_worth_one_and_nonsense_nothing(name: str) -> None:
    task = tasks_of(name)[name]()
    assert isinstance(task, Task) and task.source == name
    rewards = [played(task, seed, None, None) for seed in range(200)]
    assert min(rewards) > (0.93 if name == "grounding" else 0.999)  # thousandths of 48 px are not every pixel
    assert max(played(task, seed, "?", "?") for seed in range(20)) == 0.0
    assert all(played(task, seed, "", "") == 0.0 for seed in range(20))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_episode_is_a_function_of_its_seed_and_travels(name: str) -> None:
    first, second = tasks_of(name)[name](), tasks_of(name)[name]()
    shown = [pixels(first.reset(seed)) for seed in range(30)]
    assert all(image.shape == (SIDE_PX, SIDE_PX, 3) and len(np.unique(image)) > 1 for image in shown)
    assert all(np.array_equal(image, pixels(second.reset(seed))) for seed, image in enumerate(shown))
    assert len({image.tobytes() for image in shown}) > 20
    first.reset(3), second.reset(3)
    judge = pickle.loads(pickle.dumps(first))
    assert judge.verify(right_answer(second)) == first.verify(right_answer(second))
    assert len(pickle.dumps(first)) <= 1024


def test_a_screen_is_worth_half_after_one_button() -> None:
    task = tasks_of("clicking")["clicking"]()
    assert [played(task, 5, None, None), played(task, 5, None, "[[000,000]]"), played(task, 5, "nowhere")] == [
        1,
        0.5,
        0,
    ]


def test_what_is_drawn_can_be_read_off_the_picture() -> None:
    """Ink lies whole inside the canvas, in the color that the truth names."""
    for seed in range(50):
        task = FAMILIES["grounding"]()
        image, box = pixels(task.reset(seed)), task.truth
        inside = image[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)].reshape(-1, 3)
        assert (inside == inside[0]).all() and tuple(inside[0].tolist()) in COLORS.values()
        border = pixels(FAMILIES["reading"]().reset(seed))
        edges = np.concatenate([border[0], border[-1], border[:, 0], border[:, -1]])
        assert (edges == edges[0]).all()


def test_what_is_asked_for_stands_on_either_side() -> None:
    lefts = []
    for seed in range(40):
        task = FAMILIES["grounding"]()
        task.reset(seed)
        lefts.append(task.truth.x0 < SIDE_PX / 2)
    assert 10 < sum(lefts) < 30


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (verify.exact("  The Red\nCat. ", "the red cat"), 1.0),
        (verify.exact("the red cat sat", "the red cat"), 0.0),
        (verify.number("There are three.", 3), 1.0),
        (verify.number("3", 3), 1.0),
        (verify.number("3 or 4", 3), 0.0),
        (verify.number("none", 0), 0.0),
        (verify.spelling("KITTEN", "SITTING"), 1 - 3 / 7),
        (verify.spelling("", ""), 1.0),
        (verify.spelling("AB", ""), 0.0),
        (verify.overlap("[[000,000,500,500]]", Box(0, 0, 10, 10), 10, 10), 0.25),
        (verify.overlap("no box", Box(0, 0, 10, 10), 10, 10), 0.0),
        (verify.hit("at [[500,250]]", Box(4, 2, 6, 3), 10, 10), 1.0),
        (verify.hit("[[500,350]]", Box(4, 2, 6, 3), 10, 10), 0.0),
        (verify.painted("RED 0 1; blue 2 3;", {(0, 1): "red", (2, 3): "blue"}, ["red", "blue"], 4), 1.0),
        (verify.painted("red 0 1; red 1 1", {(0, 1): "red"}, ["red"], 4), 0.5),
        (verify.painted("red 0 1; paint it", {(0, 1): "red"}, ["red"], 4), 0.0),
        (verify.painted("red 0 4", {(0, 1): "red"}, ["red"], 4), 0.0),
    ],
)
def test_verifiers(found: float, expected: float) -> None:
    assert found == pytest.approx(expected)


OWN = """
class Parity:
    source = "parity"

    def reset(self, seed):
        self.seed = seed
        return [{"role": "user", "content": f"Is {seed} even?"}]

    def step(self, text):
        return None

    def verify(self, answer):
        return float(answer == ("yes" if self.seed % 2 == 0 else "no"))

class Spaced(Parity):
    source = "par ity"

class Silent:
    source = "silent"

    def reset(self):
        return []
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    found = tasks_of(f"digits, {tmp_path / 'own.py'}:Parity")
    assert list(found) == ["digits", "parity"]
    assert [played(found["parity"](), seed, "yes") for seed in (2, 3)] == [1.0, 0.0]


DATED = """
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Dated:
    day: int = 3
    source = "dated"

    def reset(self, seed): return [{"role": "user", "content": "?"}]

    def step(self, text): return None

    def verify(self, answer): return 0.0


with open("starts", "a") as file:
    file.write("x")
"""


def test_a_tasks_file_is_a_module_that_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dated.py").write_text(DATED.replace('"dated"', f'"{folder}"'))
    names = "one/dated.py:Dated,~/two/dated.py:Dated"
    for _ in range(3):
        found = tasks_of(names)
    assert list(found) == ["one", "two"] and (tmp_path / "starts").read_text() == "xx"
    for new_task in found.values():
        assert pickle.loads(pickle.dumps(new_task())) == new_task()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("chess", "--rl.tasks chess is unknown; tasks are digits, counting"),
        ("", "names no task"),
        ("digits,digits", "two tasks of the source 'digits'"),
        ("none.py:Task", "none.py is no Python file"),
        ("own.py:Missing", "has no class Missing"),
        ("own.py", "own.py names no class; pass own.py:NAME"),
        ("own.py:Silent", r"the class lacks reset\(seed\), step\(text\), verify\(answer\)"),
        ("broken.py:Task", "does not load: ZeroDivisionError: division by zero"),
        ("reads.py:Task", "reads.py does not load: FileNotFoundError"),
        ("leaves.py:Task", "does not load: SystemExit: 0"),
        ("own.txt:Parity", "does not load: ImportError: its name does not end in .py"),
        ("own.py:Spaced", "the class lacks source = 'NAME' of letters, digits and"),
    ],
)
def test_tasks_that_cannot_be_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, message: str
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.txt").write_text(OWN)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "reads.py").write_text("open('none')")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        tasks_of(names)
    assert "\n" not in str(raised.value)


def test_a_ledger_is_read_audited_and_rewound(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [Entry("a", "digits", 0, 1, "trained"), Entry("b", "digits", 0, 1, "aborted")])
    ledger.append(path, [Entry("b", "digits", 1, 2, "trained"), Entry("c", "reading", 1, 2, "stale")])
    with path.open("a") as file:
        file.write('{"id": "d", "sou')  # a writer was killed here
    assert [entry.id for entry in ledger.read(path)] == ["a", "b", "b", "c"]
    assert not ledger.faults(ledger.read(path), "abc")
    assert ledger.faults(ledger.read(path), "abcd") == ["d has no end"]
    assert ledger.faults([*ledger.read(path), Entry("a", "digits", 1, 3, "trained")], "abc") == ["a ended 2 times"]
    assert ledger.faults(ledger.read(path), "ab") == ["c was never issued"]
    ledger.rewind(path, 1)
    assert [entry.id for entry in ledger.read(path)] == ["a", "b"]
    path.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match=r"ledger\.jsonl:1 is no entry"):
        ledger.read(path)


def test_what_a_crash_leaves_in_a_ledger_behind_the_checkpoint_goes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [Entry("a", "digits", 0, 1, "trained"), Entry("b", "digits", 0, 2, "trained")])
    good = path.read_bytes()
    for damage in (b"\0" * 40 + b"\n", b"\n", b"\xff\xfe\n", b"[1]\n", good.replace(b'"step": 2', b'"step": "2"')[50:]):
        path.write_bytes(good + damage + b'{"id":')
        with pytest.raises(DataError, match=r"ledger\.jsonl:3 is no entry"):
            ledger.read(path)
        ledger.rewind(path, 2)
        assert path.read_bytes() == good
        path.write_bytes(damage + good)
        with pytest.raises(DataError, match=r"ledger\.jsonl:1 is no entry"):
            ledger.rewind(path, 2)


def test_a_ledger_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(DataError, match=r"ledger\.jsonl cannot be written: Is a directory"):
        ledger.append(tmp_path / "ledger.jsonl", [])

"""Runs of stage 3 that differ in what they train, and what each then says of digits, of boxes and of texts alone."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cogvit import VisionLanguageModel, train
from cogvit.config import load_config
from cogvit.errors import ConfigError
from cogvit.evaluation.answers import Asked, answers, exact, exams, nats_a_token
from cogvit.model.boxes import Box, box_accuracy, read_boxes
from cogvit.model.dialog import Turn
from cogvit.rl.families import SIDE_PX
from cogvit.training.checkpoint import weights
from cogvit.training.joint import initial_joint, load_joint
from cogvit.training.meter import read_metrics
from cogvit.training.restore import latest_of_run
from data_pipeline.index import load_index
from data_pipeline.token_counts import wording_of
from tools.make_demo_language_model import QUESTIONS

Kind = Literal["adapter", "expert", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EVALUATIONS = 6  # of a run
_TRAINS: dict[Kind, tuple[str, ...]] = {
    "adapter": ("--expert.every", "0", "--expert.qkv-bias", "false"),
    "expert": (),
    "full": ("--expert.every", "0", "--expert.qkv-bias", "false", "--optim.language.lr-mult", "1"),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: what learns beside the adapter: nothing, experts, or the language model.
        seed: of new weights and of the order of samples.
    """

    kind: Kind
    seed: int

    @property
    def name(self) -> str:
        """Its name among all runs."""
        return f"{self.kind}_{self.seed}"


@dataclass(frozen=True)
class Place:
    """Where everything lies.

    Attributes:
        corpus: of the demo.
        init: the run that has the encoder.
        work: what the experiment makes.
    """

    corpus: Path
    init: Path
    work: Path

    @property
    def boxes(self) -> Path:
        """Drawn pictures with questions."""
        return self.work / "boxes"

    @property
    def language(self) -> Path:
        """The language model that all runs begin with."""
        return self.work / "language"

    @property
    def index(self) -> Path:
        """Indexes of all shards, which lie in two places."""
        return self.work / "index"

    @property
    def texts(self) -> Path:
        """Captions by language that nothing has learned."""
        return self.work / "texts.json"

    @property
    def shown(self) -> str:
        """The shards that runs learn from."""
        return f"{{{self.corpus}/train/digits-0000{{0..1}}.tar,{self.boxes}/train/tasks-00000.tar}}"

    @property
    def asked(self) -> str:
        """The shards that they are asked about."""
        return f"{{{self.corpus}/heldout/digits-00000.tar,{self.boxes}/heldout/tasks-00000.tar}}"

    def found(self, run: Run) -> Path:
        """The figures of a run."""
        return self.work / f"{run.name}.json"


@dataclass(frozen=True)
class Found:
    """What a run reached on held-out samples.

    Attributes:
        captions: share of digits' captions to the letter, and of those that a model shown another picture says.
        boxes: share of boxes that overlap the true one by half or more, and the same blind.
        nats: a token of texts without an image, after the run and before it, by language.
        trained: weights that it trained.
        cpu_s: of its training.
        curve: step and training loss, in nats a label.
        seeing: step and by how much other images raise the held-out loss, in nats a label.
    """

    captions: tuple[float, float]
    boxes: tuple[float, float]
    nats: dict[str, tuple[float, float]]
    trained: int
    cpu_s: float
    curve: list[tuple[int, float]]
    seeing: list[tuple[int, float]]


def make_run(place: Place, run: Run, steps: int) -> Found:
    """Train and examine. Errors: ConfigError when training fails, which has said why."""
    out, start_s = place.work / run.name, time.process_time()
    status = train.main(
        [
            *("demo_expert", "--init", str(place.init), "--out", str(out), "--seed", str(run.seed)),
            *("--language.path", str(place.language), "--optim.vision.lr-mult", "0"),
            *("--data.shards", place.shown, "--data.eval-shards", place.asked, "--data.zh-fraction", "0"),
            *("--data.index-dir", str(place.index)),
            *("--data.mixture", '[["digits", 0.3], ["boxes", 0.7]]', "--data.global-batch-images", "32"),
            *("--schedule.steps", str(steps)),
            *("--eval.every-steps", str(max(steps // EVALUATIONS, 1)), "--checkpoint.every-steps", str(steps)),
            *_TRAINS[run.kind],
        ]
    )
    if status:
        raise ConfigError("a run failed; its reason stands above")
    cpu_s = time.process_time() - start_s
    config, model, metrics = load_config(out / "config.json"), load_joint(out), read_metrics(out / "metrics.jsonl")
    found = {exam.name: exam for exam in exams(load_index(place.asked, config.data.index_dir), wording_of(config))}
    digits, boxes, began = found["digits_en"], found["boxes"], initial_joint(config)
    return Found(
        captions=(captioned(model, digits.asked), captioned(model, digits.blind())),
        boxes=(located(model, boxes.asked), located(model, boxes.blind())),
        nats={
            language: (nats_a_token(model, said), nats_a_token(began, said))
            for language, said in texts_of(place.texts).items()
        },
        trained=sum(weight.numel() for weight in weights(latest_of_run(out), "").values()),
        cpu_s=cpu_s,
        curve=[(int(line["step"]), line["loss"]) for line in metrics if "loss" in line],
        seeing=[(int(line["step"]), line["image_effect"]) for line in metrics if "image_effect" in line],
    )


def captioned(model: VisionLanguageModel, asked: Sequence[Asked]) -> float:
    """Return the share of captions that are said to the letter."""
    return exact(answers(model, asked), [one.right for one in asked])


def located(model: VisionLanguageModel, asked: Sequence[Asked]) -> float:
    """Return the share of boxes that overlap the true one by half or more."""
    said, right = ([boxes_of(text) for text in texts] for texts in (answers(model, asked), [x.right[0] for x in asked]))
    return box_accuracy(said, [boxes[0] for boxes in right])


def boxes_of(text: str) -> list[Box]:
    """Return the boxes of an answer about a drawn picture."""
    return read_boxes(text, SIDE_PX, SIDE_PX)


def texts_of(path: Path) -> dict[str, list[Asked]]:
    """Return captions as answers to what is asked for them, without a picture, by language."""
    found: dict[str, list[str]] = json.loads(path.read_text())
    return {
        language: [Asked((Turn("user", (QUESTIONS[language],)),), (), (text,)) for text in own]
        for language, own in found.items()
    }

"""A run's rounds: the weights go to whoever answers, answers come back, are judged and recorded, and every rank packs.

One rank asks. What it hears is small, without pixels, and goes to all; each plays its share of the episodes again to
read the questions, and those that it packs once more for the pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, zip_longest
from pathlib import Path

from torch import Tensor, nn

from cogvit.batch import DataPosition, StepBatch
from cogvit.errors import CogViTError, DataError
from cogvit.parallel.gathered import trained_weights
from cogvit.parallel.mesh import Mesh
from cogvit.rl import ledger
from cogvit.rl.collect import Collector
from cogvit.rl.figures import figures
from cogvit.rl.lesson import Lesson
from cogvit.rl.packs import Packer
from cogvit.rl.rollout import Answer, RolloutEngine

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Asking:
    """What the rank that asks has.

    Attributes:
        engine: who answers.
        collector: asks it for a step's answers.
        ledger: the file that says what became of each request.
    """

    engine: RolloutEngine
    collector: Collector
    ledger: Path

    def round(self, step: int, weights: Mapping[str, Tensor]) -> tuple[list[Answer], dict[str, float]]:
        """Return the answers that a step trains on, with its figures, and record the ends of all requests.

        step: steps before it, which is also the version of the weights. Errors: DataError when nothing was answered.
        """
        self.engine.set_weights(step, weights)
        taken = self.collector.take(step)
        ends = [replace(entry, step=step + 1) for entry in taken.entries]
        ledger.append(self.ledger, [*ends, *(answer.entry(step + 1, "trained") for answer in taken.answers)])
        if not taken.answers:
            lost = Counter(entry.end for entry in taken.entries)
            told = ", ".join(f"{number} {end}" for end, number in lost.items()) or "there are no more"
            raise DataError(f"step {step + 1}: no prompt was answered ({told}); warnings above say why")
        return [*taken.answers], figures(taken, step)


def ended_requests(path: Path, step: int) -> frozenset[str]:
    """Rewind a run's ledger to a step and return the ids of the requests that had ended by then.

    Errors: DataError when the ledger does not reach to the step: a request would be counted twice.
    """
    ledger.rewind(path, step)
    entries = ledger.read(path) if path.exists() else []
    if max((entry.step for entry in entries), default=0) < step:
        raise DataError(
            f"{path} does not reach to step {step}, after which the run goes on; it says which prompts were answered:"
            " put it back, or pass --begin-anew"
        )
    return frozenset(entry.id for entry in entries if entry.end != "aborted")


def rounds(
    model: nn.Module, mesh: Mesh, asking: Asking | None, packer: Packer, start: DataPosition
) -> Generator[StepBatch]:
    """Yield what a dp rank trains on, step by step without end; collective over all ranks.

    model: which is trained between steps. asking: on the writer.
    Errors: DataError and TeacherUnavailable, on every rank or on one of them, as `cogvit.training.loop.take` wants.
    """

    def asked(step: int, weights: Mapping[str, Tensor]) -> tuple[list[Answer], dict[str, float]]:
        assert asking is not None, "the writer asks"
        return asking.round(step, weights)

    for step in count(start.step):
        weights = trained_weights(model, mesh)
        answers, said = mesh.from_writer(lambda: asked(step, weights))  # noqa: B023  called at once
        packs = packer.packs(_lessons(answers, packer, mesh), step, mesh.dp_rank, mesh.dp_size)
        yield StepBatch(packs, DataPosition(start.plan_hash, step + 1), figures=said)


def _lessons(answers: Sequence[Answer], packer: Packer, mesh: Mesh) -> list[Lesson]:
    """The lessons of all answers, in their order, of which each rank reads a share."""
    own: list[list[Lesson]] = []
    failure = None
    try:
        own = [list(packer.reader.lessons(answer)) for answer in answers[mesh.rank :: mesh.world_size]]
    except CogViTError as error:
        failure = error
    mesh.raise_together(failure)
    shares = mesh.gather(own)
    dealt: Iterator[tuple[list[Lesson] | None, ...]] = zip_longest(*shares)
    return [*chain.from_iterable(one for round_of in dealt for one in round_of if one is not None)]

"""What every stage answers. The commands, the loop and the data plane ask these and never which stage it is."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cogvit.batch import DataPosition, Reads, StepBatch
from cogvit.config import RunConfig
from cogvit.config.rules import Tower

if TYPE_CHECKING:  # a configuration is checked before any of these is imported
    from torch import nn

    from cogvit.evaluation.examples import Example
    from cogvit.evaluation.subject import Subject
    from cogvit.parallel.mesh import Mesh
    from cogvit.stages.cost import Load
    from cogvit.teacher.targets import Targets
    from cogvit.training.engine import Engine
    from cogvit.training.feed import Corpus
    from cogvit.training.loop import Guard
    from cogvit.training.objective import Objective


class Stage(Protocol):
    """A stage: everything in which it differs from the others."""

    @property
    def title(self) -> str:
        """Its name in reports and errors."""
        ...

    @property
    def shows(self) -> str:
        """What its examples in a report are called."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """Paths of the fields that stages without them have no use for; one that ends with a dot is a whole part."""
        ...

    @property
    def execution(self) -> tuple[str, ...]:
        """Of these fields, the ones that may differ between a run and its resumption."""
        ...

    @property
    def reads(self) -> Reads:
        """What it reads of a sample."""
        ...

    def towers(self, config: RunConfig) -> tuple[Tower, ...]:
        """Return the towers that Megatron splits."""
        ...

    def check(self, config: RunConfig) -> None:
        """Check the rules of its fields. Errors: ConfigError."""
        ...

    def completed(self, config: RunConfig) -> RunConfig:
        """Return the configuration with what only the files that it names can say, all of which are looked for.

        No weights are read. Errors: ConfigError, DataError or CheckpointError.
        """
        ...

    def asks_actors(self, config: RunConfig) -> bool:
        """Whether ranks need a Ray cluster for the targets of their batches."""
        ...

    def targets(self, config: RunConfig, corpus: Corpus, mesh: Mesh) -> Targets | None:
        """Return who makes the targets of a batch; None where the batch is its own target.

        Errors: ConfigError or DataError, on all ranks.
        """
        ...

    def build(self, config: RunConfig, mesh: Mesh, target_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
        """Return this rank's part of the model with its initial weights, and what trains it.

        target_dims: channels of each target. Errors: ConfigError, DataError or CheckpointError.
        """
        ...

    def loads(self, config: RunConfig) -> list[Load]:
        """Return what each tower costs in a step, for the planner."""
        ...

    def concern(self, config: RunConfig, step: int, values: dict[str, float]) -> str:
        """Return what somebody should be told after an evaluation, in one line; nothing where all is well."""
        ...

    def guard(self, config: RunConfig) -> Guard:
        """Return what looks at the figures of every step of a start."""
        ...

    def rounds(
        self, config: RunConfig, engine: Engine, start: DataPosition, leaving: Callable[[], bool]
    ) -> AbstractContextManager[Generator[StepBatch]] | None:
        """Return the batches of a stage that makes its own samples, from a position on; None where shards have them.

        leaving: whether somebody asked this rank to stop; batches that take long to make then raise AskedToLeave.
        Collective over all ranks. Errors on entry: ConfigError, DataError or TeacherUnavailable, on all ranks.
        """
        ...

    def examples(self, subject: Subject) -> list[Example]:
        """Return answers on held-out images for the report."""
        ...

    def episodes(self, run: Path, config: RunConfig) -> list[Example]:
        """Return what a run's newest checkpoint answers in a stage that makes its own samples; else nothing.

        Errors: as loading it.
        """
        ...

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """What the colors mean that `shade` tints with: (words, (red, green, blue))."""
        ...

    def shade(self, pixels: NDArray[np.uint8], key: int, config: RunConfig) -> NDArray[np.uint8]:
        """Return an image [height, width, 3] as `tools.view_batch` draws it."""
        ...


class ReadsShards:
    """What stages have in common whose samples lie in shards."""

    def guard(self, config: RunConfig) -> Guard:
        """Nothing stops them but what the engine finds."""
        return lambda step, values: None

    def episodes(self, run: Path, config: RunConfig) -> list[Example]:
        """They make no samples."""
        return []

    def rounds(self, config: RunConfig, engine: Engine, start: DataPosition, leaving: Callable[[], bool]) -> None:
        """They make no samples."""
        return

"""The processes that share an evaluation: each encodes its part, then all have the whole and compute the same figures.

Batches are dealt whole and are those of a single process, so that no figure depends on how many share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from cogvit.config.environment import this_process
from cogvit.errors import CogViTError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LONGEST_WAIT = timedelta(hours=12)  # for a rank whose shards are slow; one that dies is seen at once


@dataclass(frozen=True)
class Ranks:
    """This process among those that share an evaluation; alone by default."""

    rank: int = 0
    size: int = 1

    def mine(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield this process's batches."""
        return islice(batches, self.rank, None, self.size)

    def whole(self, part: Callable[[], Tensor]) -> Tensor:
        """Return the sum of the ranks' parts, which are zero where they are others'. Errors: as `together`."""
        made = self.together(part)
        if self.size > 1:
            dist.all_reduce(made)
        return made

    def gather(self, part: Callable[[], Result]) -> list[Result]:
        """Return what every rank makes, by rank. Errors: as `together`."""
        made = self.together(part)
        if self.size == 1:
            return [made]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, made)
        return everyone

    def together(self, work: Callable[[], Result]) -> Result:
        """Return what this rank makes. Errors: on all ranks, the error of the first one that fails."""
        made, failure = _outcome(work)
        failures: list[Any] = [failure]
        if self.size > 1:
            failures = [None] * self.size
            dist.all_gather_object(failures, failure)
        for one in filter(None, failures):
            raise one
        return cast(Result, made)


ALONE = Ranks()


def _outcome(work: Callable[[], Result]) -> tuple[Result | None, CogViTError | None]:
    try:
        return work(), None
    except CogViTError as error:
        return None, error


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the processes that a launcher has started (`this_process`), if there are any."""
    process = this_process()
    size = process.world_size
    if size == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), size) if size > 1 else ALONE
        return
    process.check_meeting()
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()

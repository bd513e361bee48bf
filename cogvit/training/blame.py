"""Finds which rank and which microbatch made a step non-finite, by training each one again alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvit.batch import Batch
from cogvit.parallel.schedule import Schedule
from cogvit.training.objective import Objective
from cogvit.training.zero import ZeroEngine

_SHOWN = 8  # sample ids in a message


@dataclass(frozen=True)
class Suspect:
    """A microbatch of one rank that is not finite by itself."""

    rank: int
    micro: int
    where: Literal["features", "gradients"]  # the first place where it shows
    sample_ids: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.sample_ids[:_SHOWN]))
        more = f" and {len(self.sample_ids) - _SHOWN} more" if len(self.sample_ids) > _SHOWN else ""
        return f"rank {self.rank}, microbatch {self.micro}: {self.where} (samples {shown}{more})"


def find_suspects(
    model: nn.Module, objective: Objective, micro: Sequence[Batch], schedule: Schedule, zero: ZeroEngine
) -> list[Suspect]:
    """Return the suspects of all ranks, the same list on every rank; leaves no gradients. Collective.

    Every draw is a function of the sample, so the second pass does what the first did. Features tell more than
    gradients, because stage 2's loss carries one rank's NaN to all: gradients count where no features are to blame.
    """
    own: list[Suspect] = []
    for index, batch in enumerate(micro):
        watch = [_OutputWatch(tower) for tower in (getattr(model, name, None) for name in ("vision", "text")) if tower]
        with zero.local_gradients():
            objective.train(model, (batch,), schedule)
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        sample_ids = tuple(sample.sample_id for sample in batch.samples if sample is not None)
        if not all(one.close() for one in watch):
            own.append(Suspect(schedule.mesh.rank, index, "features", sample_ids))
        elif not finite:
            own.append(Suspect(schedule.mesh.rank, index, "gradients", sample_ids))
    parts: list[list[Suspect]] = [[] for _ in range(schedule.mesh.world_size)]
    dist.all_gather_object(parts, own)
    found = [suspect for part in parts for suspect in part]
    return [suspect for suspect in found if suspect.where == "features"] or found


class _OutputWatch:
    """Looks at everything a module returns."""

    def __init__(self, module: nn.Module) -> None:
        self._finite = True
        self._handle = module.register_forward_hook(self._look)

    def close(self) -> bool:
        """Stop looking; returns whether all was finite."""
        self._handle.remove()
        return self._finite

    def _look(self, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else [output.patch_TD, output.cls_ND]
        self._finite &= all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)

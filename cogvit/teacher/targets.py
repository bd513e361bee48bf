"""How targets reach the ranks that train on them: one rank of a replica asks, and its peers get a step's at once.

What is asked for is known of a pack without asking, so every rank knows what it will receive. Features travel in the
dtype in which they were made or stored and are standardized on the device that trains on them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.batch import Batch, StepBatch, TeacherTargets
from cogvit.teacher.standardize import Stats
from cogvit.teacher.stream import Features, FeatureSource, attach_targets, count_rows, grids_of


@dataclass(frozen=True)
class Targets:
    """A run's targets, as one rank sees them."""

    source: FeatureSource | None  # on the rank of a replica that asks
    dims: Mapping[str, int]  # C of what is regressed, by name
    dtypes: Mapping[str, torch.dtype]  # of features on their way
    stats: Mapping[str, Stats]
    mask_ratio: float  # of the features that are asked for: 1 asks for all
    group: dist.ProcessGroup | None  # the rank that asks, first, and those that train on the answers; None elsewhere

    def attached(self, batches: Generator[StepBatch], *, in_flight_steps: int, augmented: bool) -> Generator[StepBatch]:
        """Yield the same batches, on the rank that asks with what was answered; closes them with itself."""
        with closing(batches):
            if self.source is None:
                yield from batches
            else:
                yield from attach_targets(
                    batches,
                    self.source,
                    mask_ratio=self.mask_ratio,
                    in_flight_steps=in_flight_steps,
                    augmented=augmented,
                )

    def delivered(self, micro: Sequence[Batch]) -> tuple[Batch, ...]:
        """Return a step's packs, which are on their device, with standardized targets in fp32.

        Collective over the ranks of a replica that have targets: one broadcast, none where that is one rank alone.
        """
        if self.group is None:
            return tuple(replace(batch, targets=None) for batch in micro)
        alone = self.group.size() == 1
        features = [_features_of(batch) for batch in micro] if alone else self._broadcast(micro, self.group)
        return tuple(
            replace(batch, targets=TeacherTargets({name: self.stats[name].apply(x) for name, x in found.items()}))
            for batch, found in zip(micro, features, strict=True)
        )

    def _broadcast(self, micro: Sequence[Batch], group: dist.ProcessGroup) -> list[Features]:
        device = micro[0].images.cu_seqlens.device
        # Wide values first: a view of bytes as such has to begin at a multiple of their size.
        names = sorted(self.dims, key=lambda name: -self.dtypes[name].itemsize)
        places = [(name, pack, self._rows(name, batch)) for name in names for pack, batch in enumerate(micro)]
        sizes = [rows * self.dims[name] * self.dtypes[name].itemsize for name, _, rows in places]
        if self.source is None:
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        else:
            held = [_features_of(micro[pack])[name] for name, pack, _ in places]
            flat = torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in held])
        dist.broadcast(flat, group=group, group_src=0)
        found: list[Features] = [{} for _ in micro]
        for (name, pack, rows), (start, stop) in zip(places, pairwise(accumulate(sizes, initial=0)), strict=True):
            found[pack][name] = flat[start:stop].view(self.dtypes[name]).view(rows, self.dims[name])
        return found

    def _rows(self, name: str, batch: Batch) -> int:
        pairs = zip(batch.samples, grids_of(batch), strict=True)
        return sum(count_rows(name, grid, self.mask_ratio) for sample, grid in pairs if sample is not None)


def _features_of(batch: Batch) -> Mapping[str, Tensor]:
    assert batch.targets is not None, "the rank that asks has answers"
    return batch.targets.features

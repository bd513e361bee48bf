"""The mesh numbers its ranks as the launch scripts and the logs say."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from cogvit.config import ParallelConfig
from cogvit.parallel.mesh import start_mesh
from tests.pool import Pool


def place_of(rank: int, world: int, layout: ParallelConfig) -> tuple[int, int, int]:
    mesh = start_mesh(layout)
    return mesh.tp_rank, mesh.pp_rank, mesh.dp_rank


@pytest.mark.parametrize(("tp", "pp", "world"), [(2, 2, 8), (2, 1, 4), (1, 2, 4), (1, 1, 2)])
def test_places_are_those_of_the_configuration(pool: Pool, tp: int, pp: int, world: int) -> None:
    layout = ParallelConfig(tp=tp, pp=pp)
    places = pool.run(place_of, world, (layout,))
    assert places == [layout.place(rank) for rank in range(world)]
    assert len(set(places)) == world


def warned_by_old_names(rank: int, world: int) -> list[str]:
    start_mesh(ParallelConfig())
    with warnings.catch_warnings(record=True) as told:
        whole = torch.zeros(2 * world)
        dist.all_gather_into_tensor(whole, torch.ones(2))
        dist.reduce_scatter_tensor(torch.zeros(2), whole)
    return [str(one.message) for one in told]


def test_collectives_by_their_old_names_say_nothing(pool: Pool) -> None:
    """DeepSpeed calls them in each step; a warning would stand in the progress bar."""
    assert pool.run(warned_by_old_names, 2) == [[], []]

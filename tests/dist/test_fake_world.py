"""What a rank of 4,096 does that one of a few does not: counted in a world whose other ranks are not there."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from cogvit.config import ContrastConfig, ParallelConfig
from cogvit.objective.pairwise import Pairs, group_ranks, sigmoid_gradients, start_groups
from cogvit.parallel.mesh import start_mesh
from tests.fake_world import Log, fake_world, logged
from tests.pool import Pool

WORLD, PAIRS, WIDTH = 4096, 16, 32


def loss_among_many(rank: int, world: int) -> tuple[float, Log]:
    """CPU seconds of joining, and the loss of the middle rank; everybody brings what it brings, so all blocks agree."""
    dist.destroy_process_group()
    os.environ["LOCAL_RANK"] = "0"
    with fake_world(WORLD, rank=WORLD // 2 + 3):
        start_s = time.process_time()
        mesh = start_mesh(ParallelConfig())
        joined_s = time.process_time() - start_s
        embed, number = torch.eye(PAIRS, WIDTH), torch.arange(PAIRS)
        config = ContrastConfig()
        groups = start_groups(config, WORLD * PAIRS, mesh)
        pairs = Pairs(number, number, torch.ones(PAIRS))
        with logged() as log:
            sigmoid_gradients(embed, embed, pairs, torch.ones(1), torch.ones(1), mesh, groups, config)
    return joined_s, log


def test_few_pairs_on_many_ranks_cost_blocks_of_a_thousand_texts(pool: Pool) -> None:
    joined_s, log = pool.run(loss_among_many, 1, timeout_s=100.0)[0]
    assert joined_s < 20.0
    blocks = [number for number, event in enumerate(log.events) if event == ("operation", "addmm")]
    assert len(blocks) == WORLD * PAIRS // 1024
    assert log.count("operation") <= 1500 and log.count("collective") <= 10
    # Texts and their gradients to and from each of the other groups, but no gradient of the first hop's texts.
    assert log.count("message") == 4 * (len(blocks) - 1)
    # How many pairs each rank brings, and which blocks have equal captions: nothing waits once they are compared.
    waits = [number for number, (kind, _) in enumerate(log.events) if kind == "wait"]
    assert len(waits) == 2 and waits[-1] < blocks[0]


@pytest.mark.parametrize(
    ("dp_size", "pairs", "ranks"),
    [(4096, 65_536, 64), (64, 65_536, 1), (4096, 32_768, 128), (4, 1024, 4), (4, 4096, 1), (6, 3000, 3), (13, 208, 13)],
)
def test_a_group_is_as_few_ranks_as_make_a_block(dp_size: int, pairs: int, ranks: int) -> None:
    assert group_ranks(ContrastConfig(), pairs, dp_size) == ranks
    assert group_ranks(ContrastConfig(loss="gather"), pairs, dp_size) == dp_size
    assert group_ranks(ContrastConfig(group_ranks=2), pairs, dp_size) == 2

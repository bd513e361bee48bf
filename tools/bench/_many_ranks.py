"""What one of many ranks sends, waits for and opens: `python -m tools.bench._many_ranks RANKS` prints it as JSON.

The other ranks are not there: torch's fake process group answers at once, so counts and sizes are real, times are not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvit.config import ContrastConfig, ParallelConfig
from cogvit.objective.pairwise import Pairs, sigmoid_gradients, start_groups
from cogvit.parallel.descriptors import descriptors
from cogvit.parallel.mesh import start_mesh
from cogvit.training.together import turn_of
from tools.bench.scale import PAIRS, RANKS_A_NODE, WIDTH


class Sent(TorchDispatchMode):
    """Counts the messages and collectives of a rank, the bytes of what they are given, and blocks of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = self.collectives = self.bytes = self.blocks = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d" and name != "recv_":
            self.messages += name == "send"
            self.collectives += name != "send"
            self.bytes += max(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))
        self.blocks += name == "addmm"
        return func(*args, **(kwargs or {}))


def one_of(ranks: int) -> dict[str, Any]:
    """Be the middle one of so many ranks; returns what it costs."""
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    start_s = time.process_time()
    mesh = start_mesh(ParallelConfig())
    join_s = time.process_time() - start_s
    embed, number, config = torch.randn(PAIRS, WIDTH), torch.arange(PAIRS), ContrastConfig()
    groups = start_groups(config, ranks * PAIRS, mesh)
    with Sent() as sent:
        sigmoid_gradients(
            embed, embed, Pairs(number, number, torch.ones(PAIRS)), torch.ones(1), torch.ones(1), mesh, groups, config
        )
    hosts = [f"node{rank // RANKS_A_NODE}" for rank in range(ranks)]
    turns = [turn_of(rank, hosts) for rank in range(0, ranks, RANKS_A_NODE)]
    need = descriptors(ParallelConfig(), ranks, gloo=False)
    return {
        "join_s": join_s,
        "group": groups.ranks,
        "blocks": sent.blocks,
        "messages": sent.messages,
        "collectives": sent.collectives,
        "mb": sent.bytes / 1e6,
        "files": len({turn.file for turn in turns}),
        "writers": sum(turn.after is None for turn in turns),
        "open_files": need.rank,
        "open_files_first": need.first,
        "open_files_store": need.keeper,
    }


if __name__ == "__main__":
    os.environ |= {"LOCAL_RANK": "0"}
    print(json.dumps(one_of(int(sys.argv[1]))))

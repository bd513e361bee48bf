"""Sockets, pipes and files of a rank: counted where ranks are, and by the groups it is in where thousands are not."""

from __future__ import annotations

import os
import resource
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from cogvit.config import ParallelConfig
from cogvit.errors import ConfigError
from cogvit.parallel.descriptors import descriptors, take_descriptors
from cogvit.parallel.mesh import start_mesh
from cogvit.training.together import Together
from tests.fake_world import fake_world
from tests.pool import Pool


def kinds() -> dict[str, int]:
    """How many descriptors of this process are of a kind, by what stands before the number of each."""
    found: dict[str, int] = {}
    for link in Path("/proc/self/fd").iterdir():
        kind = os.readlink(link).partition(":")[0] if link.is_symlink() else ""
        found[kind] = found.get(kind, 0) + 1
    return found


def group_sizes() -> list[int]:
    """The sizes of the groups that this rank is in."""
    return [len(ranks) for ranks in _world.pg_group_ranks.values() if dist.get_rank() in ranks]


def opened(rank: int, world: int, port_file: Path, tp: int, pp: int) -> tuple[int, int, int]:
    """Meet at a store that the first rank keeps, as a run does: what was opened, sockets, and what the law says."""
    dist.destroy_process_group()
    before = kinds()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)  # type: ignore[attr-defined]
        port_file.with_suffix(".part").write_text(str(store.port))
        port_file.with_suffix(".part").rename(port_file)
    else:
        while not port_file.exists():
            os.sched_yield()
        port = int(port_file.read_text())
        store = dist.TCPStore("127.0.0.1", port, world, False, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    start_mesh(ParallelConfig(tp=tp, pp=pp))
    together = Together(rank, world)
    dist.barrier()
    after, sizes = kinds(), group_sizes()
    dist.barrier()
    together.close()
    sockets = after["socket"] - before.get("socket", 0)
    # One to each other rank of a group and one that listens; the store's two; the neighbors' two.
    expected = sum(size - 1 for size in sizes) + len(sizes) + 2 + 2
    if rank == 0:  # and it keeps the store: one that listens, and the two of every rank
        expected += 1 + 2 * world
    return sum(after.values()) - sum(before.values()), sockets, expected


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 1, 1), (4, 1, 1), (4, 2, 2)])
def test_a_rank_has_the_sockets_that_the_law_says(pool: Pool, tmp_path: Path, world: int, tp: int, pp: int) -> None:
    law = descriptors(ParallelConfig(tp=tp, pp=pp), world, gloo=True)
    for rank, (total, sockets, expected) in enumerate(pool.run(opened, world, (tmp_path / "port", tp, pp))):
        assert abs(sockets - expected) <= 1
        assert total <= (law.rank if rank else law.first) < total + 160


def sizes_among_many(rank: int, world: int, size: int, tp: int, pp: int) -> list[int]:
    dist.destroy_process_group()
    os.environ["LOCAL_RANK"] = "0"
    with fake_world(size, rank=size - 1):
        start_mesh(ParallelConfig(tp=tp, pp=pp))
        return group_sizes()


@pytest.mark.parametrize(("size", "tp", "pp"), [(64, 1, 1), (64, 2, 4), (4096, 1, 1), (4096, 8, 4)])
def test_thousands_of_ranks_need_few_descriptors_on_gpus(pool: Pool, size: int, tp: int, pp: int) -> None:
    layout = ParallelConfig(tp=tp, pp=pp)
    sizes = pool.run(sizes_among_many, 1, (size, tp, pp))[0]
    by_groups = sum(one - 1 for one in sizes)
    on_cpus = descriptors(layout, size, gloo=True)
    assert by_groups <= on_cpus.rank <= 1.5 * by_groups + 300
    assert descriptors(layout, size, gloo=False).rank <= 300


def test_a_limit_that_is_too_low_is_one_line_and_a_soft_one_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    layout = ParallelConfig(tp=2)
    take_descriptors(layout, 1, 8, gloo=True)
    with pytest.raises(
        ConfigError, match=r"ulimit -n allows 1024 open files, and rank 7 of 256 ranks needs \d+ .*\(ulimit -Hn \d+"
    ):
        take_descriptors(layout, 7, 256, gloo=True)
    limits.append((1024, 65536))
    take_descriptors(layout, 7, 256, gloo=True)
    assert limits[-1] == (descriptors(layout, 256, gloo=True).rank + 512, 65536)
    limits.append((1024, 4096))
    with pytest.raises(ConfigError, match=r"what keeps the store of 4096 ranks needs 8224 \(each rank 258\)"):
        take_descriptors(layout, 0, 4096, gloo=False)

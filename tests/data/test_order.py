"""The order of samples: permutations without a table, counts without overflow, blocks of a share, parts of shares."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.cells import Cells
from data_pipeline.order import Stream, blocks_of
from data_pipeline.permutation import permute
from data_pipeline.plan import Planner
from data_pipeline.spec import plan_spec
from data_pipeline.topology import topology_of
from tests.data.corpus import bare_index, run_config
from tests.data.test_plan import spec_of


@given(size=st.integers(1, 3000), counters=st.tuples(st.integers(0, 2**40), st.integers(0, 9)))
def test_permute_is_a_permutation(size, counters):
    assert np.array_equal(np.sort(permute(np.arange(size), size, *counters)), np.arange(size))


@pytest.mark.parametrize("size", [8, 64, 250])
def test_permute_sends_every_position_everywhere(size):
    """Over many names, a position's images are uniform (a chi-square far beyond chance would show a pattern)."""
    images = np.array([permute(np.array([0, size // 3]), size, name) for name in range(40 * size)])
    for image in images.T:
        counts = np.bincount(image, minlength=size)
        chi_square = ((counts - 40) ** 2 / 40).sum()
        assert abs(chi_square - size) < 6 * np.sqrt(2 * size)


def test_permute_differs_by_its_names():
    one, two = (permute(np.arange(1000), 1000, 5, number) for number in (0, 1))
    assert (one == two).sum() < 10
    assert (one == np.arange(1000)).sum() < 10


@pytest.mark.parametrize("size", [3_000_000_000, 3_100_000_000, 8_000_000_000])
def test_draws_of_billions_are_counted_exactly(size):
    """64-bit products overflow above 3.04e9 samples of a source."""
    shares = 64
    bounds = (np.arange(shares + 1) * size // shares).astype(np.int64)
    cells = Cells(np.zeros(1, np.uint32), np.array([size]), np.array([float(size)]))
    stream = Stream(0, None, bare_index([1]), cells, bounds, Fraction(0), Fraction(1))
    before = [0] * shares
    for step in range(0, 2 * size // 65536, 4099):
        drawn = [stream.drawn_by(step * 65536, share) for share in range(shares)]
        assert sum(drawn) == step * 65536
        assert max(drawn) - min(drawn) <= 2
        assert all(one >= other for one, other in zip(drawn, before, strict=True))
        before = drawn


@pytest.mark.parametrize("images_a_shard", [50, 400])
def test_an_epoch_goes_through_a_share_block_by_block(monkeypatch, images_a_shard):
    """A few shards at a time; every sample once; windows and shares cost the same as far as shards allow."""
    monkeypatch.setattr("data_pipeline.order.BLOCK_IMAGES", (256, 4096))
    monkeypatch.setattr("data_pipeline.plan.FEWEST_BLOCK_IMAGES", 256)
    index = bare_index([40_000], images_a_shard=images_a_shard)
    spec = spec_of(global_batch_images=128, canonical_shares=4, max_patches=60, lookahead_steps=4)
    planner = Planner(index, spec, 0)
    seen, at_a_time, loads = np.zeros((2, len(index)), int), [], []
    for window in range(2 * 40_000 // 512):
        shards = set()
        for step in range(4 * window, 4 * window + 4):
            batch = planner.batch(step)
            np.add.at(seen, (batch.epoch, batch.rows), 1)
            shards |= set((batch.rows[batch.share == 1] // images_a_shard).tolist())
            loads.append(np.bincount(batch.share, weights=batch.cost, minlength=4))
        at_a_time.append(len(shards))
    assert (seen[0] == 1).all() and seen[1].max() == 1
    assert max(at_a_time) <= 48 and np.median(at_a_time) <= 17  # two blocks meet in some windows
    loads = np.array(loads)
    assert np.median(loads.max(axis=1) / loads.mean(axis=1)) < 1.03
    again = Planner(index, spec, 0)
    for step in (600, 3, 617):  # from any step, in any order
        assert np.array_equal(again.batch(step, [2]).rows, planner.batch(step, [2]).rows)
    orders = [blocks_of(planner._streams[0], 1, epoch, 0, 256).start.tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize(("num_ranks", "per_node"), [(24, 8), (40, 8), (56, 8), (10, 1)])
def test_any_number_of_nodes_divides_the_shares_evenly(num_ranks, per_node):
    """Where nodes do not divide the shares, two divide a share; nodes of any number of ranks have their part."""
    index, shares = bare_index([40_000]), 4
    config = run_config(
        global_batch_images=128 * num_ranks // per_node, canonical_shares=shares, max_patches=60, lookahead_steps=4
    )
    planner = Planner(index, plan_spec(config), 0)
    topology = topology_of([f"node{rank // per_node:02d}" for rank in range(num_ranks)], shares)
    for step in range(3):
        whole, parts = planner.batch(step), []
        for group in topology.groups:
            seat = topology.seat(group[0])
            batch = planner.batch(step, seat.shares)
            parts.append(batch if seat.span is None else batch.within(seat.span))
        assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == sorted(whole.rows.tolist())
        loads = np.array([part.cost.sum() for part in parts])
        assert loads.max() <= 1.02 * loads.mean()

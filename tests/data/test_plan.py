"""The plan: a pure function of the step, exact in its epochs and its mixture, balanced in its shares."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvit.errors import DataError
from cogvit.model.naflex import naflex_grid
from data_pipeline.loader import lay_out
from data_pipeline.plan import Planner, plan_hash
from data_pipeline.sizing import Sizing
from data_pipeline.spec import plan_spec
from data_pipeline.topology import topology_of
from tests.data.corpus import PATCH_PX, bare_index, run_config, source_of


def spec_of(**data):
    return plan_spec(run_config(**data))


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    batch=st.integers(6, 48),
    lookahead=st.integers(1, 5),
    shares=st.sampled_from([1, 2, 4, 6]),
    mixed=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_every_sample_once_in_each_epoch_of_its_source(sizes, batch, lookahead, shares, mixed, seed):
    index = bare_index(sizes)
    mixture = tuple((name, 1.0) for name in index.sources)
    if not mixed or batch * lookahead < len(sizes):
        mixture = ()
    spec = spec_of(global_batch_images=batch, lookahead_steps=lookahead, canonical_shares=shares, mixture=mixture)
    steps = lookahead * -(-2 * sum(sizes) // (batch * lookahead))  # whole windows
    planner = Planner(index, spec, seed)
    batches = [planner.batch(step) for step in range(steps)]
    assert {len(one.rows) for one in batches} == {batch}
    rows, epoch = (np.concatenate([getattr(one, name) for one in batches]) for name in ("rows", "epoch"))
    source = source_of(index) if mixture else np.zeros(len(index), int)
    for number in np.unique(source):
        mine = source[rows] == number
        size = (source == number).sum()
        whole = mine.sum() // size
        assert len(set(zip(rows[mine], epoch[mine], strict=True))) == mine.sum()  # never twice
        assert np.array_equal(np.bincount(epoch[mine], minlength=whole)[:whole], np.full(whole, size))  # never left out
        assert epoch[mine].max() <= whole


RANKS = st.sampled_from([1, 2, 4, 6, 64])


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(3, 120), min_size=1, max_size=3),
    shares=st.sampled_from([1, 4, 8]),
    per_node=st.sampled_from([1, 2, 8]),
    before=RANKS,
    after=RANKS,
    stop=st.integers(0, 12),
    seed=st.integers(0, 2**40),
)
def test_ranks_meet_the_same_batches_and_a_resumption_goes_on_with_what_was_not_seen(
    sizes, shares, per_node, before, after, stop, seed
):
    """The batches of 1, 2, 4, 6 and 64 ranks are one sequence, stopped at any step and resumed on another count."""
    index = bare_index(sizes)
    config = run_config(
        global_batch_images=24, lookahead_steps=2, canonical_shares=shares, max_patches=12,
        mixture=tuple((name, 1.0) for name in index.sources),
    )  # fmt: skip
    steps = 2 * -(-len(sizes) * max(sizes) // 48) + 2  # an epoch of the largest source and more
    alone = Planner(index, plan_spec(config), seed)
    counts, epochs = np.zeros(len(index), int), [set() for _ in range(len(index))]
    for first, last, num_ranks in ((0, min(stop, steps), before), (min(stop, steps), steps, after)):
        planner = Planner(index, plan_spec(config), seed)  # a process that starts knows nothing of the others
        topology = topology_of([f"node{rank // per_node:02d}" for rank in range(num_ranks)], shares)
        for step in range(first, last):
            drawn = []
            for group in topology.groups:
                seats = [topology.seat(rank) for rank in group]
                batch = planner.batch(step, seats[0].shares)
                batch = batch if seats[0].span is None else batch.within(seats[0].span)
                placement = lay_out(batch, index, config, len(group), reads="captions").placement
                mine = [np.concatenate(placement.packs_of(seat.rank)) for seat in seats]
                assert {seat.shares for seat in seats} == {seats[0].shares}
                drawn += [(batch.key[one], batch.rows[one], batch.epoch[one]) for one in mine]
            key, rows, epoch = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
            whole = alone.batch(step)
            assert np.array_equal(np.sort(key), np.sort(whole.key)) and len(set(key.tolist())) == 24
            np.add.at(counts, rows, 1)
            for row, number in zip(rows.tolist(), epoch.tolist(), strict=True):
                epochs[row].add(number)
    for number in range(len(sizes)):
        mine = source_of(index) == number
        assert counts[mine].sum() == 24 * steps * (number + 1) // len(sizes) - 24 * steps * number // len(sizes)
        assert counts[mine].max() - counts[mine].min() <= 1  # every sample once before any comes again
        assert all(epochs[row] == set(range(counts[row])) for row in np.flatnonzero(mine))


@settings(max_examples=15)
@given(
    size=st.integers(20, 900),
    schedule=st.dictionaries(st.integers(0, 40), st.integers(4, 60), min_size=1, max_size=4),
    lookahead=st.integers(1, 6),
    shares=st.sampled_from([1, 2, 4]),
    mixed=st.booleans(),
)
def test_every_sample_once_in_each_epoch_when_the_batch_changes(size, schedule, lookahead, shares, mixed):
    index = bare_index([size, 30])
    mixture = (("source0", 3.0), ("source1", 1.0)) if mixed else ()
    schedule = tuple(sorted(schedule.items()))
    data = {"global_batch_images": 8, "lookahead_steps": lookahead, "canonical_shares": shares, "mixture": mixture}
    planner = Planner(index, spec_of(**data, batch_schedule=schedule), 5)
    batches = [planner.batch(step) for step in range(lookahead * -(-60 // lookahead))]
    for batch in batches:
        begun = [images for start, images in schedule if start <= batch.step]
        assert len(batch.rows) == (begun[-1] if begun else 8)
    rows, epoch = (np.concatenate([getattr(one, name) for one in batches]) for name in ("rows", "epoch"))
    source = source_of(index) if mixture else np.zeros(len(index), int)
    for number in np.unique(source):
        mine = source[rows] == number
        whole = mine.sum() // (source == number).sum()
        assert len(set(zip(rows[mine], epoch[mine], strict=True))) == mine.sum()
        counts = np.bincount(epoch[mine], minlength=whole)[:whole]
        assert np.array_equal(counts, np.full(whole, (source == number).sum()))
        assert epoch[mine].max() <= whole
        if mixture:
            assert abs(mine.sum() - len(rows) * (0.75, 0.25)[number]) < 1 + 1e-6


def test_a_schedule_that_changes_nothing_plans_the_same():
    index, data = bare_index([700]), {"global_batch_images": 24, "lookahead_steps": 3, "max_patches": 20}
    plain = spec_of(**data, budgets_patches=(6, 20))
    same = spec_of(**data, batch_schedule=((0, 24), (4, 24)), budget_schedule=((0, (6, 20)),))
    for step in range(0, 9, 2):
        one, other = (Planner(index, spec, 0).batch(step) for spec in (plain, same))
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("rows", "share", "grid_hw"))
    assert len({plan_hash(index, spec, 0) for spec in (plain, same, replace(same, budget_schedule=()))}) == 3


def test_a_schedule_raises_the_resolution_and_the_batch():
    """In the middle of a window too."""
    index = bare_index([40_000])
    data = {"global_batch_images": 256, "lookahead_steps": 4, "canonical_shares": 4, "max_patches": 60, "enlarge": True}
    spec = spec_of(
        **data, batch_schedule=((6, 512),), budget_schedule=((6, (20, 60)), (10, (60,))), budgets_patches=(20,)
    )
    planner, alone = Planner(index, spec, 0), Sizing("naflex", PATCH_PX, (1, 1), 60, True)
    batches = [planner.batch(step) for step in range(12)]
    for batch in batches:
        budgets = (20,) if batch.step < 6 else (20, 60) if batch.step < 10 else (60,)
        sizes = index.take(batch.rows)
        legal = [replace(alone, max_patches=n).grids(sizes["height_px"], sizes["width_px"]) for n in budgets]
        assert np.any([(batch.grid_hw == grids).all(axis=1) for grids in legal], axis=0).all()
        assert all((batch.grid_hw == grids).all(axis=1).any() for grids in legal)
        loads = np.bincount(batch.share, weights=batch.cost, minlength=4)
        assert loads.max() <= 1.1 * loads.mean()
    assert [len(batch.rows) for batch in batches] == [256] * 6 + [512] * 6
    cost = [batch.cost.sum() / len(batch.rows) for batch in batches]
    assert max(cost[:6]) / min(cost[:6]) < 1.01 and max(cost[8:10]) / min(cost[8:10]) < 1.01
    again = Planner(index, spec, 0)
    for step in (11, 6, 7):  # a resumed run, on other nodes
        parts = [again.batch(step, [share]).rows for share in range(4)]
        assert np.array_equal(np.concatenate(parts), batches[step].rows)


@settings(max_examples=20)
@given(weights=st.lists(st.floats(1, 10), min_size=2, max_size=4), batch=st.integers(12, 64))
def test_every_window_holds_the_exact_mixture(weights, batch):
    index = bare_index([50, 30, 20, 10][: len(weights)])
    mixture = tuple(zip(index.sources, weights, strict=True))
    spec = spec_of(global_batch_images=batch, lookahead_steps=4, mixture=mixture)
    wanted = np.array(weights) / sum(weights)
    planner, so_far = Planner(index, spec, 3), np.zeros(len(weights))
    for window in range(12):
        for step in range(4 * window, 4 * window + 4):
            so_far += np.bincount(source_of(index)[planner.batch(step).rows], minlength=len(weights))
        assert np.abs(so_far - wanted * so_far.sum()).max() < 1 + 1e-6


def test_plan_is_pure_and_its_draws_follow_the_seed():
    index, spec = bare_index([500]), spec_of(global_batch_images=64)
    again, other = Planner(index, spec, 1).batch(5), Planner(index, spec, 2).batch(5)
    planner = Planner(index, spec, 1)
    for step in (9, 0, 200):  # what was planned before leaves no trace
        planner.batch(step)
    first = planner.batch(5)
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in ("rows", "key", "share"))
    assert set(first.rows) != set(other.rows)
    assert len(set(first.key)) == 64


def test_key_changes_with_the_epoch():
    index, spec = bare_index([10]), spec_of(global_batch_images=10, lookahead_steps=1)
    first, second = (Planner(index, spec, 0).batch(step) for step in (0, 1))
    keys = [dict(zip(one.rows.tolist(), one.key.tolist(), strict=True)) for one in (first, second)]
    assert keys[0].keys() == keys[1].keys()
    assert not set(keys[0].values()) & set(keys[1].values())


def test_window_mixes_the_whole_of_a_small_corpus():
    """Samples of one shard are neighbors in the index; a batch must not be made of few of them."""
    index = bare_index([4096])
    rows = Planner(index, spec_of(global_batch_images=256, lookahead_steps=16), 0).batch(0).rows
    assert np.bincount(rows // 512, minlength=8).min() >= 12  # 32 expected of each eighth


@pytest.mark.parametrize(("samples", "owned"), [(400, False), (40_000, True)])
def test_shares_cost_the_same(samples, owned):
    """At the bounds of an epoch too, where a window draws from two."""
    index = bare_index([samples])
    spec = spec_of(global_batch_images=1024, canonical_shares=8, max_patches=60, lookahead_steps=4)
    planner = Planner(index, spec, 0)
    stretches = [set() for _ in range(8)]
    for step in range(0, 60, 3):
        batch = planner.batch(step)
        loads = np.bincount(batch.share, weights=batch.cost, minlength=8)
        assert loads.max() <= 1.01 * loads.mean()
        for share in range(8):
            stretches[share] |= set(batch.rows[batch.share == share].tolist())
    neighbors = all(max(one) < min(other) for one, other in pairwise(stretches))
    assert neighbors == owned  # each share reads a stretch of its own


@pytest.mark.parametrize(("samples", "owned"), [(400, False), (160_000, True)])
def test_shares_cost_the_same_whatever_budgets_are_drawn(samples, owned):
    """In shards of large images as in those of small ones, which the same budgets bring closer together.

    A share of 11,683 images draws budgets whose costs add up to within one part in their root of what is expected.
    """
    index = bare_index([samples], sort=True)
    data = {"global_batch_images": 1024, "canonical_shares": 8, "max_patches": 100, "lookahead_steps": 4}
    planner = Planner(index, spec_of(**data, budgets_patches=(8, 30, 100)), 0)
    sizes = set()
    for step in range(0, 60, 7):
        batch = planner.batch(step)
        loads = np.bincount(batch.share, weights=batch.cost, minlength=8)
        assert loads.max() <= (1.02 if owned else 1.01) * loads.mean()
        sizes.add(np.ptp(np.bincount(batch.share, minlength=8)) > 100)
    assert sizes == {owned}  # shares of small images have more of them


def test_each_share_is_planned_alone():
    index, spec = bare_index([3000, 40]), spec_of(global_batch_images=128, mixture=(("source0", 3.0), ("source1", 1.0)))
    for step in (0, 1, 7, 50):
        whole = Planner(index, spec, 5).batch(step)
        for share in range(4):
            alone = Planner(index, spec, 5).batch(step, [share])
            assert np.array_equal(alone.rows, whole.rows[whole.share == share])
            assert np.array_equal(alone.key, whole.key[whole.share == share])


def test_downsized_images_are_counted():
    index = bare_index([300])
    batch = Planner(index, spec_of(global_batch_images=64, max_patches=20), 0).batch(0)
    found = index.take(batch.rows)
    height_px, width_px = (found[name].astype(int) for name in ("height_px", "width_px"))
    wanted = -(-height_px // PATCH_PX) * -(-width_px // PATCH_PX) > 20
    assert wanted.any() and np.array_equal(batch.downsized, wanted)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)), min_size=1, max_size=20),
    budget=st.integers(4, 5000),
    enlarge=st.booleans(),
    multiple=st.sampled_from([1, 2]),
)
def test_grids_are_those_of_the_model(sizes, budget, enlarge, multiple):
    sizing = Sizing("naflex", 14, (1, 1), budget, enlarge, multiple)
    height_px, width_px = np.array(sizes).T
    wanted = [naflex_grid(*size, 14, budget, enlarge=enlarge, multiple=multiple) for size in sizes]
    assert sizing.grids(height_px, width_px).tolist() == [list(grid) for grid in wanted]


def test_naflex_keeps_small_images_unless_told_to_enlarge():
    index = bare_index([300])
    for enlarge in (False, True):
        batch = Planner(index, spec_of(global_batch_images=64, max_patches=20, enlarge=enlarge), 0).batch(0)
        found = index.take(batch.rows)
        expected = [naflex_grid(int(row["height_px"]), int(row["width_px"]), 4, 20, enlarge=enlarge) for row in found]
        assert [tuple(grid) for grid in batch.grid_hw.tolist()] == expected
        assert batch.grid_hw.prod(axis=1).max() <= 20


def test_square_sizing_gives_one_grid():
    batch = Planner(bare_index([50]), spec_of(sizing="square"), 0).batch(0)
    assert {tuple(grid) for grid in batch.grid_hw.tolist()} == {(4, 4)}


def test_plan_hash_names_what_defines_the_sequence():
    index, spec = bare_index([60, 40]), spec_of()
    same = plan_hash(bare_index([60, 40]), spec_of(), 1)
    others = [
        plan_hash(bare_index([61, 40]), spec, 1),
        plan_hash(index, spec, 2),
        plan_hash(index, replace(spec, global_batch_images=13), 1),
        plan_hash(index, replace(spec, mixture=(("source0", 1.0),)), 1),
        plan_hash(index, replace(spec, sizing=replace(spec.sizing, max_patches=10)), 1),
    ]
    assert plan_hash(index, spec, 1) == same
    assert len({same, *others}) == 6


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ((("source0", 1.0), ("nowhere", 1.0)), "'nowhere'; the shards' sources are source0, source1"),
        ((("source0", 1.0), ("source1", 0.001)), "'source1' less than one of the 24 images"),
        ((("source0", 1.0), ("source1", -1.0)), "'source1' the weight -1.0"),
    ],
)
def test_mixture_that_cannot_be_kept_is_refused(mixture, message):
    with pytest.raises(DataError, match=message):
        Planner(bare_index([60, 40]), spec_of(mixture=mixture), 0)


def test_budgets_are_drawn_for_each_image_and_epoch_and_steps_cost_the_same():
    index, budgets = bare_index([600]), (6, 12, 20)
    data = {"global_batch_images": 100, "lookahead_steps": 6, "max_patches": 20, "enlarge": True, "canonical_shares": 1}
    batches = [Planner(index, spec_of(**data, budgets_patches=budgets), 0).batch(step) for step in range(12)]
    rows, key, grid_hw = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("rows", "key", "grid_hw")
    )
    sizes = index.take(rows)
    at = {n: Sizing("naflex", PATCH_PX, (1, 1), n, True).grids(sizes["height_px"], sizes["width_px"]) for n in budgets}
    fits = np.stack([(grid_hw == at[budget]).all(axis=1) for budget in budgets], axis=1)
    assert fits.any(axis=1).all()
    # Each budget about a third of the time; extreme shapes have one grid in all of them.
    assert (fits.mean(axis=0) > 0.28).all() and (fits.sum(axis=1) == 1).mean() > 0.8
    # An epoch has every image once; the next one draws anew, and the same key always draws the same.
    first, second = (
        dict(zip(rows[half].tolist(), map(tuple, grid_hw[half].tolist()), strict=True))
        for half in (slice(600), slice(600, None))
    )
    assert 0.4 < np.mean([first[row] != second[row] for row in first]) < 0.8
    again = spec_of(**data, budgets_patches=budgets).sizing.grids(sizes["height_px"], sizes["width_px"], key)
    assert (again == grid_hw).all()
    for window in (batches[:6], batches[6:]):
        cost = [batch.cost.sum() for batch in window]
        assert max(cost) / min(cost) < 1.01


def test_without_budgets_a_key_changes_nothing():
    sizing = spec_of(max_patches=20).sizing
    sides_px = np.arange(1, 40)
    assert (sizing.grids(sides_px, sides_px[::-1], sides_px) == sizing.grids(sides_px, sides_px[::-1])).all()

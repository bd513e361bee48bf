"""Parts and packs: every item in one part, every image placed once, no cap ever exceeded, ranks balanced."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvit.errors import DataError
from data_pipeline.balance import PackLimits, attention_cost, place, spread


@given(
    costs=st.lists(st.integers(1, 10**9), max_size=200),
    weights=st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any),
)
def test_spread_fills_every_part_to_its_size(costs, weights):
    bounds = np.cumsum([0, *weights]) * len(costs) // sum(weights)
    sizes = np.diff(bounds)
    part = spread(np.array(costs, np.int64), sizes, np.arange(len(costs)))
    assert np.array_equal(np.bincount(part, minlength=len(sizes)), sizes)


@pytest.mark.parametrize("longest", [1024, 16384])
def test_spread_gives_parts_of_equal_cost_that_differ_by_key(longest):
    rng = np.random.default_rng(longest)
    cost = attention_cost(np.clip(rng.lognormal(6.2, 0.9, 4096), 16, longest).astype(np.int64), 8192)
    parts = [spread(cost, np.full(16, 256), rng.integers(0, 2**60, 4096)) for _ in range(2)]
    for part in parts:
        loads = np.bincount(part, weights=cost)
        assert loads.max() <= 1.0015 * loads.mean()
    assert (parts[0] == parts[1]).mean() < 0.15  # 1 / 16 by chance


def test_spread_of_unequal_parts_costs_in_proportion():
    rng = np.random.default_rng(3)
    cost = attention_cost(rng.integers(1, 1000, 5000), 8192)
    sizes = np.array([300, 1500, 1500, 1500, 200])
    loads = np.bincount(spread(cost, sizes, rng.integers(0, 2**60, 5000)), weights=cost)
    assert np.abs(loads / (sizes * cost.mean()) - 1).max() < 0.01


@given(
    tokens=st.lists(st.integers(1, 60), min_size=1, max_size=150),
    num_ranks=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    max_images=st.integers(1, 12),
    min_packs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_caps_hold_and_every_image_is_placed_once(tokens, num_ranks, max_images, min_packs, seed):
    tokens = np.array(tokens, np.int64)
    text = np.random.default_rng(seed).integers(0, 30, len(tokens))
    limits = PackLimits(tokens=60, images=max_images, text_tokens=40, min_packs=min_packs)
    placement = place(attention_cost(tokens, 50), tokens, text, num_ranks=num_ranks, limits=limits)
    packs = [placement.packs_of(rank) for rank in range(num_ranks)]
    assert {len(mine) for mine in packs} == {placement.packs_per_rank}
    assert placement.packs_per_rank >= min_packs
    placed = np.concatenate([pack for mine in packs for pack in mine])
    assert np.array_equal(np.sort(placed), np.arange(len(tokens)))
    for pack in (pack for mine in packs for pack in mine):
        assert tokens[pack].sum() <= 60
        assert text[pack].sum() <= 40
        assert len(pack) <= max_images


@pytest.mark.parametrize("num_ranks", [8, 64])
@pytest.mark.parametrize("longest", [1024, 4096, 16384])
def test_balance_at_32_images_a_rank(longest, num_ranks):
    rng = np.random.default_rng(longest)
    tokens = np.clip(rng.lognormal(6.2, 0.9, num_ranks * 32), 16, longest).astype(np.int64)
    cost = attention_cost(tokens, 8192)
    placement = place(cost, tokens, 0 * tokens, num_ranks=num_ranks, limits=PackLimits(65536, 64, 0))
    loads = np.bincount(placement.rank, weights=cost, minlength=num_ranks)
    assert loads.max() <= 1.01 * max(loads.mean(), cost.max())


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 6])
def test_exchanges_balance_packs_that_are_full(seed):
    """At 0.5 % of spare room the caps stand in the way of the greedy placement: alone it is 1.0 to 2.5 % off here."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(6.0, 0.8, 256), 16, 4096).astype(np.int64)
    cost = attention_cost(tokens, 8192)
    limits = PackLimits(int(1.005 * tokens.sum() / 8), 64, 0)
    placement = place(cost, tokens, 0 * tokens, num_ranks=8, limits=limits)
    loads = np.bincount(placement.rank, weights=cost, minlength=8)
    assert placement.packs_per_rank == 1
    assert np.bincount(placement.rank, weights=tokens).max() <= limits.tokens
    assert loads.max() <= 1.01 * max(loads.mean(), cost.max())


def test_microbatches_are_as_few_as_the_tokens_allow():
    tokens = np.full(64, 25, np.int64)
    limits = PackLimits(tokens=25 * 8, images=100, text_tokens=0)
    placement = place(attention_cost(tokens, 100), tokens, 0 * tokens, num_ranks=2, limits=limits)
    assert placement.packs_per_rank == 4


def test_one_giant_has_a_rank_of_its_own():
    cost = np.array([1000] + [10] * 90, np.int64)
    placement = place(cost, 0 * cost + 1, 0 * cost, num_ranks=4, limits=PackLimits(100, 100, 0))
    giant = placement.rank[0]
    assert (placement.rank == giant).sum() == 1
    assert np.ptp(np.bincount(placement.rank, minlength=4)[np.arange(4) != giant]) == 0


def test_an_image_larger_than_a_pack_is_refused_by_name():
    cost = np.array([5], np.int64)
    with pytest.raises(DataError, match=r"needs 90 tokens of data.tokens_per_pack=64"):
        place(cost, np.array([90]), cost, num_ranks=1, limits=PackLimits(64, 4, 64))

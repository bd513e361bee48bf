"""Shares and packs: every image placed once, no cap ever exceeded, ranks balanced, all ranks alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvit.errors import DataError
from data_pipeline.balance import PackLimits, attention_cost, deal, place
from data_pipeline.topology import topology_of


@given(
    tokens=st.lists(st.integers(1, 60), min_size=1, max_size=150),
    dp_size=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    shares=st.sampled_from([1, 4, 6, 8]),
    max_images=st.integers(1, 12),
    min_packs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_caps_hold_and_every_image_is_placed_once(tokens, dp_size, shares, max_images, min_packs, seed):
    tokens = np.array(tokens, np.int64)
    text = np.random.default_rng(seed).integers(0, 30, len(tokens))
    cost = attention_cost(tokens, 50)
    share = deal(cost, shares)
    limits = PackLimits(tokens=60, images=max_images, text_tokens=40, min_packs=min_packs)
    placement = place(share, cost, tokens, text, topology=topology_of(dp_size, shares), limits=limits)
    packs = [placement.packs_of(rank) for rank in range(dp_size)]
    assert {len(mine) for mine in packs} == {placement.packs_per_rank}
    assert placement.packs_per_rank >= min_packs
    placed = np.concatenate([pack for mine in packs for pack in mine])
    assert np.array_equal(np.sort(placed), np.arange(len(tokens)))
    for pack in (pack for mine in packs for pack in mine):
        assert tokens[pack].sum() <= 60
        assert text[pack].sum() <= 40
        assert len(pack) <= max_images


def test_ranks_of_a_group_take_only_its_shares():
    cost = attention_cost(np.random.default_rng(0).integers(1, 100, 256), 50)
    share = deal(cost, 8)
    tokens = np.ones_like(cost)
    placement = place(share, cost, tokens, 0 * tokens, topology=topology_of(16, 8), limits=PackLimits(100, 100, 0))
    assert np.array_equal(placement.rank // 2, share)


@pytest.mark.parametrize("longest", [1024, 4096, 16384])
def test_balance_at_64_ranks_of_32_images(longest):
    rng = np.random.default_rng(longest)
    tokens = np.clip(rng.lognormal(6.2, 0.9, 64 * 32), 16, longest).astype(np.int64)
    cost = attention_cost(tokens, 8192)
    share = deal(cost, 8)
    limits = PackLimits(32768, 64, 0)
    placement = place(share, cost, tokens, 0 * tokens, topology=topology_of(64, 8), limits=limits)
    loads = np.bincount(placement.rank, weights=cost, minlength=64)
    assert loads.max() <= 1.01 * max(loads.mean(), cost.max())


def test_microbatches_are_as_few_as_the_tokens_allow():
    tokens = np.full(64, 25, np.int64)
    cost = attention_cost(tokens, 100)
    limits = PackLimits(tokens=25 * 8, images=100, text_tokens=0)
    placement = place(deal(cost, 8), cost, tokens, 0 * tokens, topology=topology_of(2, 8), limits=limits)
    assert placement.packs_per_rank == 4


def test_deal_gives_one_giant_a_share_of_its_own():
    cost = np.array([1000] + [10] * 90, np.int64)
    share = deal(cost, 4)
    assert (share == share[0]).sum() == 1
    assert np.ptp(np.bincount(share, minlength=4)[np.arange(4) != share[0]]) == 0


def test_an_image_larger_than_a_pack_is_refused_by_name():
    cost = np.array([5], np.int64)
    with pytest.raises(DataError, match=r"needs 90 tokens of data.tokens_per_pack=64"):
        place(deal(cost, 1), cost, np.array([90]), cost, topology=topology_of(1, 1), limits=PackLimits(64, 4, 64))

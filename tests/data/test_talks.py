"""Packs of text and images: the same on any number of ranks, images where their tokens stand, nothing lost unseen."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cogvit import ImageLimits
from cogvit.batch import Batch, DataPosition, StepBatch, pad_step
from cogvit.config import RunConfig
from cogvit.errors import DataError
from cogvit.model.config import ExpertConfig, MmtpConfig
from cogvit.model.dialog import Dialog
from data_pipeline.balance import PackLimits, place
from data_pipeline.index import Index
from data_pipeline.loader import step_batches, step_loader
from data_pipeline.phases import place_phases
from data_pipeline.sizing import Sizing
from data_pipeline.spec import plan_spec
from data_pipeline.talks import lay
from data_pipeline.topology import Seat, topology_of
from tests.conversations import PATCH_PX, indexed, said, stage3, talk, write_language_model, write_talks
from tests.data.corpus import picture, write_tar
from tests.language import PLAIN

IMAGE = 3  # the image token


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return indexed(write_talks(tmp_path_factory.mktemp("shards")))


def seat_of(config: RunConfig, dp_rank: int = 0, dp_size: int = 1) -> Seat:
    return topology_of(["node0"] * dp_size, config.data.canonical_shares).seat(dp_rank)


def take(
    index: Index, config: RunConfig, steps: int, seat: Seat | None = None, position: DataPosition | None = None
) -> list[StepBatch]:
    with closing(step_batches(index, config, seat or seat_of(config), position, reads="conversations")) as batches:
        return list(islice(batches, steps))


def contents(micro: tuple[Batch, ...]) -> dict[int, Any]:
    """What each sample trains on, by its key: its tokens and the patches that stand at them."""
    found = {}
    for batch in micro:
        sequence, images = batch.sequence, batch.images
        assert sequence is not None
        grids = images.grid_hw.tolist()
        first_row = np.cumsum([0] + [rows * columns // 4 for rows, columns in grids])
        for slot, key in enumerate(sequence.key.tolist()):
            start, stop = sequence.cu_seqlens[slot : slot + 2].tolist()
            if start == stop:
                continue
            rows = sequence.visual_row[start:stop]
            shown = []
            for image in range(images.num_slots):
                begin, end = images.cu_seqlens[image : image + 2].tolist()
                mine = (rows >= int(first_row[image])) & (rows < int(first_row[image + 1]))
                if mine.any():
                    assert rows[mine].tolist() == list(range(first_row[image], first_row[image + 1]))
                    where = int(mine.nonzero()[0])
                    shown.append((where, tuple(grids[image]), images.patches[begin:end].numpy().tobytes()))
            own = (sequence.ids, sequence.labels, sequence.weight)
            position = sequence.position[:, start:stop].flatten()
            texts = [tuple(x[start:stop].tolist()) for x in own]
            found[key] = (*texts, tuple(position.tolist()), tuple(sorted(shown)))
            assert [place for place, token in enumerate(found[key][0]) if token == IMAGE] == (
                (rows >= 0).nonzero().flatten().tolist()
            )
    return found


@pytest.mark.parametrize("dp_size", [2, 3])
def test_samples_are_the_same_on_any_number_of_ranks(corpus: Index, language: Path, dp_size: int) -> None:
    config = stage3("", language)
    alone = take(corpus, config, 4)
    ranks = [take(corpus, config, 4, seat_of(config, rank, dp_size)) for rank in range(dp_size)]
    for step, expected in enumerate(alone):
        together = [contents(rank[step].micro) for rank in ranks]
        assert {key: value for mine in together for key, value in mine.items()} == contents(expected.micro)
        assert sum(map(len, together)) == config.data.global_batch_images
        padded = pad_step(ranks[0][step], 1 + len(ranks[0][step].micro))
        assert contents(padded.micro) == together[0]
        assert {rank[step].position for rank in ranks} == {expected.position}
    later = take(corpus, config, 1, position=alone[2].position)
    assert contents(later[0].micro) == contents(alone[3].micro)


def test_what_is_learned_is_what_follows_in_answers(corpus: Index, language: Path) -> None:
    (step,) = take(corpus, stage3("", language), 1)
    assert step.cut_captions == step.dropped == 0
    texts = []
    for ids, labels, weight, _, _ in contents(step.micro).values():
        assert labels[:-1] == ids[1:] and weight[-1] == 0.0
        texts.append(bytes(_byte(label) for label, one in zip(labels, weight, strict=True) if one and label > 8))
    assert any(text.startswith(b"thing ") or text == b"one thing" for text in texts)
    assert any(text.startswith(b"two thingsyes") for text in texts) and any(b"there" in text for text in texts)


def _byte(token: int) -> int:
    from tokenizers import pre_tokenizers

    return ord(sorted(pre_tokenizers.ByteLevel.alphabet())[token - 9]) % 256 if token != 41 else 32


def test_counts_are_exact_and_the_plan_knows_them(corpus: Index, language: Path) -> None:
    config = stage3("", language)
    loader = step_loader(corpus, config, reads="conversations")
    for step in range(3):
        batch = loader.planner.batch(step)
        found = contents(loader.step(seat_of(config), step).micro)
        lengths = {key: len(value[0]) for key, value in found.items()}
        assert [lengths[key] for key in batch.key.tolist()] == batch.tokens.tolist()
        patches = {key: sum(len(shown[2]) for shown in value[4]) // (3 * PATCH_PX**2) for key, value in found.items()}
        assert [patches[key] for key in batch.key.tolist()] == batch.patches.tolist()
    spec = plan_spec(config)
    frozen = replace(config, optim=replace(config.optim, vision=replace(config.optim.vision, lr_mult=0.0)))
    assert spec.language is not None and plan_spec(frozen).language.vision_passes == 1


def test_with_experts_learned_tokens_stand_around_every_image(corpus: Index, language: Path) -> None:
    config = stage3("", language)
    framed = replace(config, expert=ExpertConfig(1))
    plain, loader = (step_loader(corpus, one, reads="conversations") for one in (config, framed))
    assert loader.plan_hash != plain.plan_hash
    for number, step in enumerate(take(corpus, framed, 2)):
        lengths: dict[int, int] = {}
        for batch in step.micro:
            sequence = batch.sequence
            assert sequence is not None and sequence.expert is not None and sequence.host is not None
            sizes = [rows * columns // 4 + 2 for rows, columns in batch.images.grid_hw.tolist() if rows]
            rows_S = sequence.visual_row
            assert sorted(rows_S[rows_S >= 0].tolist()) == list(range(sum(sizes)))
            ends = torch.isin(rows_S, torch.tensor(sizes).cumsum(0) - 1)
            # All tokens of an image but the last go through the experts.
            assert torch.equal(sequence.expert, (rows_S >= 0) & ~ends)
            assert sequence.host.experts == int(sequence.expert.sum()) == sum(sizes) - len(sizes)
            bounds = sequence.cu_seqlens.tolist()
            lengths |= {key: bounds[n + 1] - bounds[n] for n, key in enumerate(sequence.key.tolist())}
        planned = loader.planner.batch(number)
        assert [lengths[key] for key in planned.key.tolist()] == planned.tokens.tolist()


def test_a_longer_sample_loses_its_end_and_images_there_are_counted(tmp_path: Path, language: Path) -> None:
    turns = [*said("<image>a", "first " * 3), *said("<image>b", "second")]
    write_tar(tmp_path / "a.tar", [part for n in range(4) for part in talk(f"k{n}", turns, images=2)])
    index = indexed(tmp_path)
    config = stage3("", language, canonical_shares=1, global_batch_images=4, lookahead_steps=1, max_patches=16)
    config = replace(config, language=replace(config.language, max_tokens=28))
    (step,) = take(index, config, 1)
    assert (step.cut_captions, step.dropped, step.decoded) == (4, 4, 4)
    assert all(len(value[0]) <= 28 and len(value[4]) == 1 for value in contents(step.micro).values())


def test_a_sample_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    """As many templates do a system message; a message of jinja2's says no sample."""
    write_tar(tmp_path / "a.tar", [*talk("fine", said("a", "one")), *talk("told", said("refuse me", "one"))])
    language, index = write_language_model(tmp_path / "language"), indexed(tmp_path)
    template = "{% if messages[0].content == 'refuse me' %}{{ raise_exception('not that') }}{% endif %}" + PLAIN
    (language / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=r"a\.tar.*told.*: the chat template refuses the conversation: not that$"):
        take(index, stage3("", language, global_batch_images=1), 1)


def test_an_image_behind_the_last_answer_is_dropped_and_counted(tmp_path: Path, language: Path) -> None:
    turns = said("<image>a", "one")
    more = [*turns, {"role": "user", "content": "and<image>"}]
    write_tar(tmp_path / "a.tar", [*talk("k", turns, images=1), *talk("m", more, images=2)])
    config = stage3("", language, canonical_shares=1, global_batch_images=2, lookahead_steps=1)
    (step,) = take(indexed(tmp_path), replace(config, mmtp=MmtpConfig(2, images="embeddings")), 1)
    assert (step.dropped, step.decoded, step.cut_captions) == (1, 2, 0)
    texts = {value[0] for value in contents(step.micro).values()}
    assert len({tuple(token for token in text if token != IMAGE) for text in texts}) == 1


def test_an_image_that_does_not_decode_silences_its_sample_alone(tmp_path: Path, language: Path) -> None:
    entries = [part for n in range(3) for part in talk(f"k{n}", said("<image><image>?", "yes"), images=2)]
    broken = [(name, data[:-40] if name == "k1.1.png" else data) for name, data in entries]
    write_tar(tmp_path / "a.tar", broken)
    index = indexed(tmp_path)
    config = stage3("", language, canonical_shares=1, global_batch_images=3, lookahead_steps=1)
    (step,) = take(index, config, 1)
    assert len(step.failures) == 1 and "k1" in step.failures[0]
    weights = sorted(sum(weight) for _, _, weight, _, _ in contents(step.micro).values())
    assert weights[0] == 0.0 and weights[1] == weights[2] > 0.0
    images = torch.cat([batch.images.weight for batch in step.micro])
    assert images.sum() == 5.0


def test_more_images_than_a_pack_has_slots_are_told(tmp_path: Path, language: Path) -> None:
    write_tar(tmp_path / "a.tar", talk("k", said("<image>" * 9, "nine"), images=9))
    config = stage3("", language, canonical_shares=1, global_batch_images=1, lookahead_steps=1)
    with pytest.raises(DataError, match=r"one sample has 9 images, and data\.images_per_pack=8; raise that"):
        take(indexed(tmp_path), config, 1)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 40), st.data())
def test_laid_samples_hold_whole_images(is_image: list[bool], most: int, data: st.DataObject) -> None:
    ids = np.where(is_image, IMAGE, 9)
    grids = [data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4))) for _ in range(sum(is_image))]
    laid = lay(Dialog(ids, np.ones(len(ids), np.bool_)), IMAGE, grids, most)
    sizes = [part if isinstance(part, int) else part[0] * part[1] for part in laid.parts]
    assert sum(sizes) == len(laid.ids) <= most and laid.cut == (len(laid.ids) < _whole(ids, grids))
    assert [part for part in laid.parts if not isinstance(part, int)] == grids[: laid.images]
    assert (laid.ids == IMAGE).sum() == sum(rows * columns for rows, columns in grids[: laid.images])


def _whole(ids: Any, grids: list[tuple[int, int]]) -> int:
    return int((ids != IMAGE).sum()) + sum(rows * columns for rows, columns in grids)


@given(
    height=st.integers(1, 900),
    ratio=st.floats(0.2, 5.0),
    patch=st.sampled_from([8, 14]),
    pool=st.integers(1, 3),
    most=st.integers(16, 400),
)
@example(79, 1.0, 14, 1, 16)  # 79 / sqrt(79 * 79 / 56**2) is below 56
def test_images_have_the_size_that_users_give_them(height: int, ratio: float, patch: int, pool: int, most: int) -> None:
    width, least = max(1, round(height * ratio)), most // 4
    sizing = Sizing("glm", patch, (1, 1), most, False, pool, (), least)
    limits = ImageLimits(patch * pool, least * patch**2, most * patch**2)
    (grid,) = sizing.grids(np.array([height]), np.array([width]))
    assert grid.prod() <= most
    rows, columns = (side // patch for side in limits.size_px(height, width))
    if rows * columns <= most:  # the published rule lets a thin image grow beyond it
        assert (rows, columns) == tuple(grid.tolist())


UNITS = [9.0, 0.9]  # of what a token costs a language model of 9B and of 0.9B parameters
LIMITS = PackLimits(tokens=16384, images=64, text_tokens=8192)
A_NODE = 64  # ranks, which place for themselves


def mixture(ranks: int, unit: float) -> tuple[Any, Any, Any]:
    """Costs of both phases, patches and tokens of text alone, one image and many, in the shapes of real mixtures."""
    rng = np.random.default_rng(0)
    count = ranks * 24
    kind = rng.choice(3, count, p=[0.35, 0.5, 0.15])
    one, many = rng.lognormal(7.0, 0.9, count).clip(64, 9216), rng.lognormal(8.6, 0.5, count).clip(1024, 12288)
    patches = np.choose(kind, [np.zeros(count), one, many]).astype(np.int64) // 4 * 4
    text = rng.lognormal(5.6, 0.9, count).clip(16, 3000).astype(np.int64) + patches // 4
    vision, language = patches * (6144 + patches) * 2, (text * (24576 + text) * unit).astype(np.int64)
    return np.stack([vision, language], axis=1), patches, text


@pytest.mark.parametrize("ranks", [64, 4096])
@pytest.mark.parametrize("unit", UNITS)
def test_loads_by_the_sum_of_both_costs_are_even(ranks: int, unit: float) -> None:
    phases, patches, text = mixture(ranks, unit)
    cost = phases.sum(axis=1)
    loads = []
    for start in range(0, len(cost), A_NODE * 24):
        mine = slice(start, start + A_NODE * 24)
        placement = place(cost[mine], patches[mine], text[mine], num_ranks=A_NODE, limits=LIMITS)
        load = np.bincount(placement.rank, cost[mine], A_NODE)
        loads.append(load.max() / max(load.mean(), cost[mine].max()))
    assert max(loads) < 1.01


@pytest.mark.parametrize("unit", UNITS)
def test_with_a_pipeline_both_phases_are_even(unit: float) -> None:
    phases, patches, text = mixture(A_NODE, unit)
    slots = np.maximum(patches > 0, 1)
    limits = replace(LIMITS, min_packs=4)
    placement = place_phases(phases, patches, text, slots, num_ranks=A_NODE, limits=limits)
    load = np.stack([np.bincount(placement.rank, phases[:, one], A_NODE) for one in (0, 1)])
    assert (load.max(axis=1) / load.mean(axis=1) < 1.05).all()
    spot = placement.rank * placement.packs_per_rank + placement.pack
    for demand, cap in ((patches, limits.tokens), (text, limits.text_tokens), (slots, limits.images)):
        assert np.bincount(spot, demand).max() <= cap


def test_a_picture_alone_fills_its_pack(tmp_path: Path, language: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.png", picture(64, 64, 1)), *talk("k", said("<image>", "yes"))])
    config = stage3("", language, canonical_shares=1, global_batch_images=1, lookahead_steps=1, max_patches=60)
    (step,) = take(indexed(tmp_path), config, 1)
    assert step.downsized == 1 and int(step.micro[0].images.cu_seqlens[-2]) <= 60

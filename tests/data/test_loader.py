"""Loading: the same global batches on any number of ranks, packed content equal to a direct decode, bounded damage."""

import logging
import threading
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from cogvit.batch import DataPosition, pad_step
from cogvit.errors import DataError
from cogvit.model.tokenizer import ByteTokenizer
from data_pipeline.assembly import Spoken, assemble_text
from data_pipeline.augment import augmentation_of, views_of
from data_pipeline.balance import PackLimits
from data_pipeline.caption import captions_of, parse_metadata
from data_pipeline.decode import decode_patches, read_image_at
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import image_of, start_position, step_batches
from data_pipeline.plan import Planner
from data_pipeline.shards import ShardReader, _LocalFile, read_members
from data_pipeline.spec import plan_spec
from data_pipeline.topology import Slice, topology_of
from tests.data.corpus import PATCH_PX, indexed, members, picture, run_config, table_of, write_tar


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return indexed(tmp_path_factory.mktemp("corpus"))


def seat_of(config, dp_rank=0, dp_size=1, per_node=1):
    addresses = [f"node{rank // per_node}" for rank in range(dp_size)]
    return topology_of(addresses, config.data.canonical_shares).seat(dp_rank)


def take(index, config, steps, seat=None, position=None, reads="captions"):
    seat = seat or seat_of(config)
    with closing(step_batches(index, config, seat, position, reads=reads)) as batches:
        return list(islice(batches, steps))


def contents(step_batch):
    """What each image of a step trains on, by its key."""
    found = {}
    for micro in step_batch.micro:
        images, text = micro.images, micro.text
        for slot, sample in enumerate(micro.samples):
            if sample is None:
                continue
            start, stop = images.cu_seqlens[slot : slot + 2].tolist()
            begin, end = text.cu_seqlens[slot : slot + 2].tolist()
            assert int(images.key[slot]) not in found
            found[int(images.key[slot])] = (
                sample,
                tuple(images.grid_hw[slot].tolist()),
                images.patches[start:stop].numpy().tobytes(),
                images.row_col[start:stop].numpy().tobytes(),
                tuple(text.ids[begin:end].tolist()),
                int(text.caption_id[slot]),
                float(images.weight[slot]),
            )
    return found


@pytest.mark.parametrize(("dp_size", "per_node"), [(2, 1), (4, 2), (4, 4), (6, 1), (64, 8)])
def test_global_batches_are_the_same_on_any_number_of_ranks(corpus, dp_size, per_node):
    config = run_config()
    alone = [contents(step_batch) for step_batch in take(corpus, config, 6)]
    ranks = [take(corpus, config, 6, seat_of(config, rank, dp_size, per_node)) for rank in range(dp_size)]
    for step, expected in enumerate(alone):
        together = [contents(rank[step]) for rank in ranks]
        assert sum(map(len, together)) == len(expected) == config.data.global_batch_images
        assert {key: value for mine in together for key, value in mine.items()} == expected
        most = max(len(rank[step].micro) for rank in ranks)
        padded = [pad_step(rank[step], most) for rank in ranks]
        assert [contents(one) for one in padded] == together
        assert {len(one.micro) for one in padded} == {most}
        assert {rank[step].position for rank in ranks} == {DataPosition(ranks[0][0].position.plan_hash, step + 1)}


@pytest.mark.parametrize(("first", "before", "after"), [(5, 6, 64), (1, 2, 1), (7, 4, 3)])
def test_resume_on_another_layout_continues_each_epoch_exactly_once(corpus, first, before, after):
    """Whole batches, decoded; test_plan.py has the property for all counts and steps."""
    config = run_config(global_batch_images=10)  # 6 steps are an epoch of the 60 samples
    position, seen = None, []
    for dp_size, steps in ((before, first), (after, 12 - first)):
        ranks = [take(corpus, config, steps, seat_of(config, rank, dp_size), position) for rank in range(dp_size)]
        position = ranks[0][-1].position
        seen += [[ref.sample_id for rank in ranks for ref in refs(rank[step])] for step in range(steps)]
    assert position.step == 12
    everything = sorted(table_of(corpus)["sample_id"].tolist())
    assert sorted(sample for ids in seen for sample in ids) == sorted(everything * 2)
    straight = [sorted(ref.sample_id for ref in refs(step_batch)) for step_batch in take(corpus, config, 12)]
    assert [sorted(ids) for ids in seen] == straight


def refs(step_batch):
    return [sample for micro in step_batch.micro for sample in micro.samples if sample is not None]


def test_packs_keep_every_cap_and_the_pipelines_minimum(corpus):
    config = run_config()
    config = replace(config, parallel=replace(config.parallel, pp=8))
    for step_batch in take(corpus, config, 8):
        assert len(step_batch.micro) >= 8
        for micro in step_batch.micro:
            assert micro.images.patches.shape == (64, 3 * PATCH_PX**2)
            assert micro.images.grid_hw.shape == (6, 2)
            assert micro.text.ids.shape == (80,)
            for packed, total in ((micro.images, 64), (micro.text, 80)):
                assert packed.cu_seqlens[0] == 0 and packed.cu_seqlens[-1] == total
                assert (packed.cu_seqlens.diff() >= 0).all()
            lengths = micro.images.cu_seqlens.diff()[:-1].tolist()
            assert lengths == sorted(lengths, reverse=True)  # equal lengths side by side
            assert lengths == micro.images.grid_hw.prod(1).tolist()


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_packs_that_are_not_full_are_as_long_as_what_they_hold_and_hold_the_same(corpus, tensor_ranks):
    config = run_config(tokens_per_pack=1034, text_tokens_per_pack=906)
    config = replace(config, parallel=replace(config.parallel, tp=tensor_ranks))
    trimmed = replace(config, data=replace(config.data, full_packs=False))
    step = 64 * tensor_ranks
    for full, short in zip(take(corpus, config, 4), take(corpus, trimmed, 4), strict=True):
        assert contents(full) == contents(short)
        for micro in short.micro:
            for packed, rows, most in (
                (micro.images, len(micro.images.patches), 1034), (micro.text, len(micro.text.ids), 906)
            ):  # fmt: skip
                used, end = packed.cu_seqlens[-2:].tolist()
                assert used <= rows == end < min(used + step, most) and (most - rows) % step == 0
    piped = replace(trimmed, parallel=replace(config.parallel, pp=2))  # whose messages have one size
    assert {len(micro.text.ids) for micro in take(corpus, piped, 1)[0].micro} == {906}


def test_packed_content_equals_a_direct_decode(corpus):
    config, byt5 = run_config(), ByT5Tokenizer()
    captions = {}
    for shard in map(corpus.corpus.shard_path, range(corpus.corpus.num_shards)):
        for member in read_members(shard):
            if member.extension == "json":
                captions[shard, member.key] = captions_of(parse_metadata(member.data, "json"))
    key_of = {corpus.ref(row).sample_id: tuple(corpus.name(row).split(":")) for row in corpus.rows_of()}
    spoken, tokens_of = set(), {}
    for step_batch in take(corpus, config, 10):
        for sample, grid, patches, row_col, ids, number, weight in contents(step_batch).values():
            data = ShardReader().read(sample.shard, sample.offset_bytes, sample.size_bytes)
            assert patches == decode_patches(data, grid, PATCH_PX).numpy().tobytes()
            expected = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(torch.int32)
            assert row_col == expected.numpy().tobytes()
            by_language = captions[key_of[sample.sample_id]]
            languages = {
                tuple(byt5(text, truncation=True, max_length=config.text.max_tokens)["input_ids"]): language
                for language in by_language
                for text in by_language[language]
            }
            spoken.add(languages[ids])
            assert tokens_of.setdefault(number, ids) == ids
            assert weight == 1.0
    assert spoken == {"en", "zh"} and len(set(tokens_of.values())) == len(tokens_of) > 4


def test_captions_that_the_text_tower_cannot_tell_apart_are_one():
    texts = ["the same beginning, then this", "the same beginning, then that", "another one"]
    spoken, tokenizer = [Spoken(text, 0) for text in texts], ByteTokenizer()
    cut, whole = (
        assemble_text(
            spoken, [tokenizer.encode(text, most) for text in texts], torch.ones(3), PackLimits(64, 3, 3 * most, 1)
        ).caption_id
        for most in (16, 40)
    )
    assert cut[0] == cut[1] != cut[2] and len(whole.unique()) == 3


def test_cut_captions_are_counted(corpus):
    counted = [step_batch.cut_captions for step_batch in take(corpus, run_config(zh_fraction=0.0), 10)]
    assert sum(counted) > 0
    assert (
        sum(
            one.cut_captions
            for one in take(
                corpus,
                replace(run_config(text_tokens_per_pack=400), text=replace(run_config().text, max_tokens=60)),
                10,
            )
        )
        == 0
    )


@pytest.mark.parametrize("tensor_ranks", [2, 3])
def test_ranks_of_a_replica_decode_a_slice_each_and_together_all(corpus, tensor_ranks):
    config = run_config()
    whole = take(corpus, config, 4)
    parts = [
        take(corpus, config, 4, replace(seat_of(config), decodes=Slice(number, tensor_ranks)))
        for number in range(tensor_ranks)
    ]
    for step, expected in enumerate(whole):
        mine = [part[step] for part in parts]
        assert sum(one.decoded for one in mine) == expected.decoded == config.data.global_batch_images
        for number, micro in enumerate(expected.micro):
            images = [one.micro[number].images for one in mine]
            assert all(torch.equal(one.weight, micro.images.weight) for one in images)
            assert torch.equal(torch.stack([one.patches for one in images]).amax(0), micro.images.patches)
            filled = [(one.patches > 0).any(1) for one in images]
            assert torch.stack(filled).sum(0).max() == 1  # no row twice
    decoded = [sum(one.decoded for one in part) for part in parts]
    assert min(decoded) > 0.5 * max(decoded)


def test_a_rank_that_embeds_nothing_decodes_nothing(corpus):
    config = run_config()
    for bare, whole in zip(
        take(corpus, config, 3, replace(seat_of(config), decodes=None)), take(corpus, config, 3), strict=True
    ):
        assert bare.decoded == 0 and bare.position == whole.position
        for micro, expected in zip(bare.micro, whole.micro, strict=True):
            assert micro.images.patches.shape == (64, 0) and micro.images.num_tokens == 64
            for name in ("row_col", "cu_seqlens", "grid_hw", "key", "weight"):
                assert torch.equal(getattr(micro.images, name), getattr(expected.images, name))
            assert micro.samples == expected.samples and torch.equal(micro.text.ids, expected.text.ids)


def test_threads_and_prefetch_do_not_change_the_batches(corpus):
    one = take(corpus, run_config(), 5)
    many = take(corpus, run_config(decode_threads=3, prefetch_steps=5), 5)
    assert [contents(step_batch) for step_batch in one] == [contents(step_batch) for step_batch in many]


def test_without_text_there_is_no_caption_and_no_caption_is_needed(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{n}.png", picture(8, 8, n)) for n in range(20)])
    list(build_index(str(tmp_path)))
    index = load_index(str(tmp_path))
    (step_batch,) = take(index, run_config(), 1, reads="images")
    assert all(micro.text is None for micro in step_batch.micro)
    with pytest.raises(DataError, match="none of the 20 samples has a caption"):
        take(index, run_config(), 1)


AUGMENTED = {"flip": True, "crop": 0.3, "color": 0.4}


@pytest.mark.parametrize("asked", [{"flip": True}, {"crop": 0.3}, {"color": 0.4}, AUGMENTED])
def test_teachers_are_shown_what_the_student_sees(corpus, asked):
    config = run_config(**asked)
    (step_batch,) = take(corpus, config, 1)
    changed = 0
    for key, (sample, grid, patches, *_) in contents(step_batch).items():
        size_hw_px = (grid[0] * PATCH_PX, grid[1] * PATCH_PX)
        seen = image_of(sample, key, size_hw_px, augmentation=augmentation_of(config.data))
        data = ShardReader().read(sample.shard, sample.offset_bytes, sample.size_bytes)
        (view,) = views_of(np.array([key]), augmentation_of(config.data))
        assert np.array_equal(seen, read_image_at(data, size_hw_px, view).permute(1, 2, 0).numpy())
        changed += not np.array_equal(seen, image_of(sample, key, size_hw_px))
        rows = seen.reshape(grid[0], PATCH_PX, grid[1], PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
        assert patches == np.ascontiguousarray(rows).tobytes()
    assert changed > 0 and (changed == 12 or asked == {"flip": True})


def test_augmentation_is_of_seed_epoch_and_sample_alone(corpus):
    config = run_config(global_batch_images=60, lookahead_steps=1, **AUGMENTED)  # a step is an epoch
    first, second = map(contents, take(corpus, config, 2))
    assert [first, second] == list(map(contents, take(corpus, config, 2)))  # a replay is equal
    (resumed,) = take(corpus, config, 1, position=replace(start_position(corpus, config, reads="captions"), step=1))
    assert contents(resumed) == second
    threads = replace(config, data=replace(config.data, decode_threads=3, prefetch_steps=4))
    ranks = [take(corpus, threads, 2, seat_of(config, rank, 4)) for rank in range(4)]
    for step, whole in enumerate((first, second)):
        assert {key: seen for rank in ranks for key, seen in contents(rank[step]).items()} == whole

    def pixels(step):
        return {sample.sample_id: patches for sample, _, patches, *_ in step.values()}

    reseeded = pixels(contents(take(corpus, replace(config, seed=8), 1)[0]))
    first, second = pixels(first), pixels(second)
    assert first.keys() == second.keys() == reseeded.keys() and len(first) == 60
    for other in (second, reseeded):
        assert sum(first[sample] == other[sample] for sample in first) == 0


@pytest.fixture
def damaged(tmp_path):
    """20 images of which one has a sound header and no pixels."""
    entries = []
    for number in range(20):
        image = picture(12, 12, number)
        entries += members(f"{number:02d}", image[:60] if number == 7 else image, captions={"en": [f"n {number}"]})
    write_tar(tmp_path / "s.tar", entries)
    list(build_index(str(tmp_path)))
    return load_index(str(tmp_path))


def test_image_that_does_not_decode_keeps_its_slot_with_weight_0(damaged, caplog):
    config = run_config(global_batch_images=20, lookahead_steps=1)
    with caplog.at_level(logging.WARNING, logger="data_pipeline.loader"):
        (step_batch,) = take(damaged, config, 1)
    weights = {}
    for micro in step_batch.micro:
        assert torch.equal(micro.images.weight, micro.text.weight)
        for slot, sample in enumerate(micro.samples):
            if sample is not None:
                weights[sample.sample_id] = float(micro.images.weight[slot])
                start, stop = micro.images.cu_seqlens[slot : slot + 2].tolist()
                assert stop - start == 9
    bad = int(table_of(damaged)["sample_id"][7])
    assert len(weights) == 20
    assert {sample for sample, weight in weights.items() if weight == 0} == {bad}
    assert "s.tar:07 counts with weight 0: does not decode" in caplog.text
    assert image_of(damaged.ref(7), 0, (12, 12)) is None


def test_damage_beyond_the_bound_stops_the_run(damaged):
    with pytest.raises(DataError, match=r"1 of 20 images did not decode.*data\.max_bad_fraction=0\.0"):
        take(damaged, run_config(global_batch_images=20, max_bad_fraction=0.0), 1)
    within = run_config(global_batch_images=20, max_bad_fraction=0.005)  # 5 of the first 1000
    assert len(take(damaged, within, 5)) == 5
    with pytest.raises(DataError, match="6 of 120"):
        take(damaged, within, 6)


def test_shard_that_vanishes_stops_the_run(tmp_path):
    index = indexed(tmp_path, num_shards=1)
    (tmp_path / "train-00000.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-00000\.tar"):
        take(index, run_config(), 1)


def test_position_of_another_plan_is_refused(corpus):
    config = run_config()
    position = start_position(corpus, config, reads="captions")
    assert take(corpus, config, 1, position=position)[0].position == replace(position, step=1)
    with pytest.raises(DataError, match="seed changed"):
        step_batches(corpus, replace(config, seed=8), seat_of(config), position, reads="captions")
    with pytest.raises(DataError, match=r"order of an older version.*--init RUN"):
        take(corpus, run_config(), 1, position=DataPosition("0123456789abcdef", 3))


def test_closing_stops_the_threads(corpus):
    config = run_config(decode_threads=2)
    batches = step_batches(corpus, config, seat_of(config), None, reads="captions")
    next(batches)
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_batches_are_those_of_the_plan(corpus):
    config = run_config()
    batch = Planner(corpus, plan_spec(config), config.seed).batch(3)
    assert set(contents(take(corpus, config, 4)[3])) == set(batch.key.tolist())


def test_image_of_is_what_the_teachers_decode(corpus):
    assert image_of(corpus.ref(0), 1, (10, 14)).shape == (10, 14, 3)


def test_an_epoch_opens_each_shard_about_once(tmp_path, monkeypatch):
    """Where far more shards are there than may be open."""
    monkeypatch.setattr("data_pipeline.order.BLOCK_IMAGES", (64, 64))
    monkeypatch.setattr("data_pipeline.plan.FEWEST_BLOCK_IMAGES", 64)
    monkeypatch.setattr("data_pipeline.shards.MAX_OPEN_SHARDS", 64)
    for shard in range(120):
        entries = [(f"{number}.png", picture(8, 8, 8 * shard + number)) for number in range(8)]
        write_tar(tmp_path / f"{shard:03d}.tar", entries)
    list(build_index(str(tmp_path)))
    config, opened = run_config(global_batch_images=16, canonical_shares=2), []
    plain = _LocalFile.__init__

    def noted(self, path):
        opened.append(path)
        plain(self, path)

    monkeypatch.setattr(_LocalFile, "__init__", noted)
    steps = take(load_index(str(tmp_path)), config, 60, reads="images")
    assert len({ref.sample_id for step in steps for ref in refs(step)}) == 960
    assert len(set(opened)) == 120 and len(opened) <= 1.2 * 120

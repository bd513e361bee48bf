"""Sequential order: shards without an index, and what of the planned order's promises is kept."""

import gzip
import io
import logging
import tarfile
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from cogvit.errors import DataError
from cogvit.model.tokenizer import CaptionTokens
from data_pipeline.augment import augmentation_of
from data_pipeline.caption import caption_id
from data_pipeline.decode import decode_patches
from data_pipeline.loader import image_of
from data_pipeline.stream import stream_batches, stream_position
from data_pipeline.topology import Seat
from tests.data.corpus import PATCH_PX, indexed, members, picture, run_config, table_of, write_tar
from tests.data.test_loader import contents, refs
from tests.data.test_loader import take as take_planned


def write_stream(directory, sizes=(20, 20, 20, 20)):
    """Shards of square pictures of several sizes, a caption in each language, no index."""
    for shard, size in enumerate(sizes):
        entries = []
        for number in range(size):
            captions = {"en": [f"picture {number} of {shard}"], "zh": [f"图{number}"]}
            image = picture(8 + 4 * (number % 4), 8 + 4 * (number % 3), 100 * shard + number)
            entries += members(f"{number:02d}", image, captions=captions)
        write_tar(directory / f"{shard}.tar", entries)
    return str(directory)


def config_of(shards, **data):
    return run_config(shards=shards, order="sequential", **data)


def take(config, steps, rank=0, ranks=1, position=None, reads="captions"):
    with closing(stream_batches(config, Seat(rank, ranks, range(4)), position, reads=reads)) as batches:
        return list(islice(batches, steps))


def test_a_pass_over_all_ranks_has_every_sample_once_and_a_later_one_draws_anew(tmp_path):
    config = config_of(write_stream(tmp_path), global_batch_images=10)  # 8 steps are a pass
    ranks = [take(config, 16, rank, 2) for rank in range(2)]
    for half in (slice(8), slice(8, 16)):
        seen = Counter(sample.sample_id for rank in ranks for step in rank[half] for sample in refs(step))
        assert len(seen) == 80 and set(seen.values()) == {1}
    assert [len(refs(step)) for rank in ranks for step in rank] == [5] * 32
    first, second = (
        {sample.sample_id: key for step in ranks[0][half] for key, (sample, *_) in contents(step).items()}
        for half in (slice(8), slice(8, 16))
    )
    assert first.keys() != second.keys()  # the shards are dealt anew
    assert all(first[sample] != second[sample] for sample in first.keys() & second.keys())
    assert [list(first)] != [sorted(first)]


def test_ranks_with_shards_of_other_lengths_make_as_many_steps(tmp_path):
    config = config_of(write_stream(tmp_path, (3, 40)), global_batch_images=6)
    ranks = [take(config, 30, rank, 2) for rank in range(2)]
    assert [[len(refs(step)) for step in rank] for rank in ranks] == [[3] * 30] * 2


def test_samples_are_those_that_an_index_finds_and_packs_hold_a_direct_decode(tmp_path):
    planned = indexed(tmp_path)
    config = config_of(f"{tmp_path}/train-*.tar", global_batch_images=10, flip=True, crop=0.5)
    # The rules of an index leave out small pictures, and shapes beyond 6.
    sizes = table_of(planned)[["height_px", "width_px"]]
    fit = np.array([min(size) >= 8 and max(size) <= 6 * min(size) for size in sizes.tolist()])
    steps = take(config, 8)
    assert {sample.sample_id for step in steps for sample in refs(step)} == set(
        table_of(planned)["sample_id"][fit].tolist()
    )
    augmentation = augmentation_of(config.data)
    for step in steps:
        for key, (sample, grid, patches, row_col, *_, weight) in contents(step).items():
            assert weight == 1.0
            size_hw_px = (grid[0] * PATCH_PX, grid[1] * PATCH_PX)
            seen = image_of(sample, key, size_hw_px, augmentation=augmentation)  # as a teacher's actor does
            rows = seen.reshape(grid[0], PATCH_PX, grid[1], PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
            assert patches == np.ascontiguousarray(rows).tobytes()
            expected = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(torch.int32)
            assert row_col == expected.numpy().tobytes()


def test_captions_and_their_hashes_are_those_of_the_planned_order(tmp_path):
    planned, config = indexed(tmp_path), config_of(f"{tmp_path}/train-*.tar", zh_fraction=0.0)
    config = replace(config, data=replace(config.data, global_batch_images=12, lookahead_steps=1))

    def concepts(steps):
        return {
            (sample.sample_id, int(micro.text.concept_id[slot]))
            for step in steps
            for micro in step.micro
            for slot, sample in enumerate(micro.samples)
            if sample is not None
        }

    found, wanted = concepts(take(config, 6)), concepts(take_planned(planned, config, 6))
    assert found and found <= wanted
    for step in take(config, 2):
        for *_, ids, number, _ in contents(step).values():
            assert ids[-1] == 1 and number == caption_id(CaptionTokens(np.array(ids), cut=False))


def test_same_start_gives_the_same_batches_and_a_resumed_run_begins_anew(tmp_path):
    config = config_of(write_stream(tmp_path), global_batch_images=8)
    straight = [contents(step) for step in take(config, 6)]
    threads = replace(config, data=replace(config.data, decode_threads=3, prefetch_steps=4))
    assert [contents(step) for step in take(threads, 6)] == straight
    position = take(config, 3)[-1].position
    assert position == replace(stream_position(config), step=3)
    resumed, again = take(config, 6, position=position), take(config, 6, position=position)
    assert [contents(step) for step in resumed] == [contents(step) for step in again]
    assert [step.position.step for step in resumed] == [4, 5, 6, 7, 8, 9]
    assert {sample.sample_id for sample in refs(resumed[0])} != {
        sample.sample_id for sample, *_ in straight[3].values()
    }
    other = take(config, 1, 1, 4, position)  # on any number of ranks
    assert len(refs(other[0])) == 2
    with pytest.raises(DataError, match="seed changed"):
        take(replace(config, seed=8), 1, position=position)


def test_steps_of_a_buffer_cost_about_the_same(tmp_path):
    images = [picture(8 + 8 * (number // 48), 8 + 4 * (number % 3), number) for number in range(96)]  # large ones last
    write_tar(tmp_path / "s.tar", [(f"{number:02d}.png", image) for number, image in enumerate(images)])
    for lookahead in (12, 1):
        config = config_of(str(tmp_path), global_batch_images=8, lookahead_steps=lookahead)
        steps = take(config, 12, reads="images")
        tokens = [sum(int(micro.images.cu_seqlens[-2]) for micro in step.micro) for step in steps]
        assert (max(tokens) <= 1.05 * np.mean(tokens)) == (lookahead == 12)


@pytest.mark.parametrize("kind", ["pipe", "gzip", "file"])
def test_streams_come_from_anywhere(tmp_path, kind):
    shards = write_stream(tmp_path / "shards", (12, 12))
    expected = {sample.sample_id for step in take(config_of(shards), 2) for sample in refs(step)}
    if kind == "pipe":
        shards = f"pipe:cat {shards}/{{0..1}}.tar"
    elif kind == "file":
        shards = f"file://{shards}/{{0..1}}.tar"
    else:
        (tmp_path / "packed").mkdir()
        for name in ("0.tar", "1.tar"):
            (tmp_path / "packed" / f"{name}.gz").write_bytes(gzip.compress((tmp_path / "shards" / name).read_bytes()))
        shards = f"pipe:zcat {tmp_path}/packed/{{0..1}}.tar.gz"
    assert {sample.sample_id for step in take(config_of(shards), 2) for sample in refs(step)} == expected


def test_what_is_left_out_is_told_after_each_pass_and_what_is_damaged_counts(tmp_path, caplog):
    image = picture(12, 12, 1)
    entries = [entry for number in range(8) for entry in members(f"{number}", picture(12, 12, number), caption="x")]
    entries += [
        *members("small", picture(3, 3, 0), caption="x"),
        *members("sliver", picture(1, 30_000, 0), caption="x"),
        *members("tall", picture(90, 9, 0), caption="x"),
        ("mute.png", image),
        ("latin.png", image),
        ("latin.txt", b"\xe9t\xe9"),
        ("alone.txt", b"x"),
        ("twice.png", image),
        ("twice.png", image),
        ("twice.jpg", picture(12, 12, 50, "JPEG")),
        ("twice.txt", b"x"),
        *members("junk", b"no image", caption="x"),
        *members("cut", image[:60], caption="x"),
        *members("../../etc/evil", picture(12, 12, 20), caption="x"),
    ]
    path = write_tar(tmp_path / "s.tar", entries)
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    config = config_of(str(tmp_path), global_batch_images=11, lookahead_steps=1)
    with caplog.at_level(logging.WARNING):
        steps = take(config, 3)
    assert [len(refs(step)) for step in steps] == [11] * 3  # 8, twice, cut and evil
    assert [sum(int(micro.images.weight.sum()) for micro in step.micro) for step in steps] == [10] * 3
    assert [step.decoded for step in steps[:2]] == [12, 12]
    (failures,) = {tuple(failure.partition(" ")[2] for failure in step.failures) for step in steps}
    assert [failure[:20] for failure in failures] == ["is left out: no know", "counts with weight 0"]
    assert [failure.partition(" ")[0] for failure in steps[0].failures] == [f"{path}:junk", f"{path}:cut"]
    told = next(text for text in caplog.messages if "pass 1 over 1 shards left out" in text)
    for reason in (
        "2 x a side is shorter than 8 px", "1 x the aspect ratio is beyond 6", "2 x no caption", "1 x no image",
        "1 x a second member of the same name", "1 x a second image of the same key",
    ):  # fmt: skip
        assert reason in told
    with pytest.raises(DataError, match=r"2 of 12 images did not decode.*max_bad_fraction=0\.0"):
        take(replace(config, data=replace(config.data, max_bad_fraction=0.0)), 1)


@pytest.mark.parametrize("damage", ["text", "cut in a member", "no end marker"])
def test_a_damaged_shard_stops_the_run(tmp_path, damage):
    path = tmp_path / "0.tar"
    write_stream(tmp_path, (20,))
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    cuts = {
        "text": b"this is no tar" * 100,
        "cut in a member": data[: last.offset_data + 10],
        "no end marker": data[: last.offset_data + 512],
    }
    path.write_bytes(cuts[damage])
    with pytest.raises(DataError, match=r"0\.tar (cannot be read as a tar|has no end marker).*re-create it"):
        take(config_of(str(tmp_path)), 4)


def test_a_shard_that_vanishes_and_a_command_that_fails_stop_the_run(tmp_path):
    config = config_of(write_stream(tmp_path, (12, 12)), global_batch_images=12, lookahead_steps=1)
    with closing(stream_batches(config, Seat(0, 1, range(4)), None, reads="captions")) as batches:
        next(batches)
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(DataError, match=r"cannot read .*\.tar"):
            list(islice(batches, 9))
    with pytest.raises(DataError, match=r"pipe:.*its command left with status 4: gone"):
        take(config_of("pipe:echo gone >&2; exit 4"), 1)
    with pytest.raises(DataError, match=r"pipe:true is empty"):
        take(config_of("pipe:true"), 1)


@pytest.mark.parametrize(
    ("write", "ranks", "message"),
    [
        (lambda path: write_stream(path, (5, 5)), 3, "each of 3 ranks shards of its own, and .* has 2"),
        (lambda path: write_tar(path / "s.tar", [("a.txt", b"x")]), 1, "hold no usable sample"),
        (lambda path: None, 1, "holds no .tar shards"),
    ],
)
def test_what_cannot_feed_a_run_is_refused(tmp_path, write, ranks, message):
    write(tmp_path)
    with pytest.raises(DataError, match=message):
        take(config_of(str(tmp_path)), 1, 0, ranks)


def test_without_text_no_caption_is_needed(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{number}.png", picture(9, 9, number)) for number in range(12)])
    (step,) = take(config_of(str(tmp_path)), 1, reads="images")
    assert len(refs(step)) == 12 and all(micro.text is None for micro in step.micro)
    data = {name: io.BytesIO(picture(9, 9, int(name))).getvalue() for name in map(str, range(12))}
    for sample, grid, patches in (
        (sample, micro.images.grid_hw[slot], micro.images.patches[slice(*micro.images.cu_seqlens[slot : slot + 2])])
        for micro in step.micro
        for slot, sample in enumerate(micro.samples)
        if sample is not None
    ):
        (name,) = (name for name, bytes_ in data.items() if bytes_ == sample.data)
        assert torch.equal(patches, decode_patches(data[name], tuple(grid.tolist()), PATCH_PX))


def test_closing_stops_the_threads(tmp_path):
    batches = stream_batches(config_of(write_stream(tmp_path)), Seat(0, 1, range(4)), None, reads="captions")
    next(batches)
    names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert {"read", "decode"} <= names
    batches.close()
    assert not {"read", "decode"} & {thread.name.partition("_")[0] for thread in threading.enumerate()}

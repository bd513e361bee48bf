"""Videos in conversations: what indexing takes and leaves out, exact lengths, and frames where their tokens stand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvit.errors import DataError
from cogvit.model.config import VideoConfig
from cogvit.model.dialog import Turn
from data_pipeline.clips import STILL, shown_of
from data_pipeline.conversation import Mark, conversation_of, file_names, marks_of
from data_pipeline.index import Index
from data_pipeline.loader import step_loader, usable_index
from data_pipeline.scan import scan_shard
from data_pipeline.shards import ShardReader
from data_pipeline.token_counts import Wording, read_text
from tests.clips import clip, sound
from tests.conversations import indexed, said, stage3, write_language_model
from tests.data.corpus import ANY_SIZE, picture, write_tar
from tests.data.test_talks import contents, seat_of, take

VIDEO = VideoConfig(frames=3)
PIXELS = 3 * 4 * 4


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language"))


def talk(key: str, question: Any, **others: Any) -> tuple[str, bytes]:
    return f"{key}.json", json.dumps({"messages": said(question, "yes"), **others}).encode()


def members(directory: Path) -> Path:
    """One video; an image and two videos in a text; an image alone; what has no conversation."""
    parts = [{"type": "video", "video": "x/one.mp4"}, {"type": "text", "text": "?"}]
    entries = [("one.mp4", clip(5)), talk("one", parts)]
    entries += [("all.0.avi", clip(8, container="avi")), ("all.1.webm", clip(2, container="webm", codec="libvpx"))]
    entries += [("all.jpg", picture(20, 30, 1)), talk("all", "<video>\nthen <image> and <video>")]
    entries += [("still.png", picture(20, 30, 2)), talk("still", "<image>?")]
    entries += [("alone.mp4", clip(3)), ("text.json", json.dumps({"messages": said("hi", "ho")}).encode())]
    write_tar(directory / "a.tar", entries)
    return directory


def rows_by_key(index: Index) -> dict[str, int]:
    return {index.name(row).rpartition(":")[2]: row for row in index.rows_of().tolist()}


def test_marks_of_videos_in_all_forms() -> None:
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "this"}]
    expected = (Turn("user", ("0.0s", None, "2.0s", None, "What?")), Turn("assistant", ("this",)))
    for metadata in (
        {"conversations": turns},
        {"conversations": [{**turns[0], "value": "<image>\nWhat?"}, turns[1]], "video": "a/b.mp4"},  # as LLaVA-Video
        {"messages": said([{"type": "video"}, {"type": "text", "text": "What?"}], "this")},
    ):
        assert conversation_of(metadata, 0, [["0.0s", "2.0s"]]) == expected
    assert conversation_of({"conversations": turns}, 0, [[""]])[0] == Turn("user", (None, "What?"))
    mixed = {"messages": said("a <video> b <image>", "c")}
    assert marks_of(mixed, 1, 1) == [Mark.VIDEO, Mark.IMAGE]
    parts = [{"type": "video_url", "video_url": {"url": "k.0.mp4"}}, {"type": "image", "image": "k.jpg"}]
    assert file_names({"messages": said(parts, "a")}, Mark.VIDEO) == ("k.0.mp4",)
    assert file_names({"video": "x.mp4"}, Mark.VIDEO) == ("x.mp4",) and file_names({"video": "x.mp4"}, Mark.IMAGE) == ()
    with pytest.raises(DataError, match="more or fewer places for videos than videos"):
        conversation_of(mixed, 1, [])
    with pytest.raises(DataError, match="an image in an answer, or a video"):
        conversation_of({"messages": said("what", "<video>")}, 0, [["0.0s"]])


def test_indexing_takes_videos_of_conversations_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    entries = [("good.mp4", clip(4)), talk("good", "<video>")]
    bad = {"sound": sound(), "empty": b"", "cut": clip(4)[:200], "thin": clip(2, size_hw_px=(16, 400))}
    for key, data in bad.items():
        entries += [(f"{key}.mp4", data), talk(key, "<video>")]
    entries += [("odd.avi", clip(4)), talk("odd", "<video>"), ("lost.mp4", clip(2)), talk("none", "<video>")]
    shard = write_tar(tmp_path / "a.tar", entries)
    with shard.open("rb") as file:
        table, left_out = scan_shard(str(shard), file, "default", replace(ANY_SIZE, max_aspect=6.0))
    assert sorted(table["key"].to_pylist()) == ["good", "odd"]  # an mp4 that is called avi is one
    assert left_out["a conversation with more or fewer places for videos than videos"] == 5
    assert left_out["a video without a moving picture, sound alone"] == left_out["the aspect ratio is beyond 6"] == 1
    assert (
        left_out["no known video format, or a damaged header"] == 2 and left_out["a video without a conversation"] == 1
    )


def test_the_index_says_what_is_shown(tmp_path: Path) -> None:
    index = indexed(members(tmp_path))
    rows = rows_by_key(index)
    assert sorted(rows) == ["all", "one", "still", "text"]
    shown = shown_of(index, np.array([rows["still"], rows["all"], rows["text"], rows["one"]]), VIDEO)
    assert shown.owner.tolist() == [0] + [1] * 6 + [3] * 3
    assert shown.time_ms.tolist() == [STILL, 0, 350, 700, STILL, 0, 100, 0, 200, 400]
    assert shown.number.tolist() == [0, 1, 1, 1, 2, 3, 3, 1, 1, 1] and shown.place.tolist() == [0, *range(6), 0, 1, 2]
    assert shown.width_px.tolist() == [30, 64, 64, 64, 30, 64, 64, 64, 64, 64]
    text = read_text(index.corpus, rows["all"], "en", 0, Wording({}, "", VIDEO), ShardReader())
    first, second = ("0.0s", None, "0.4s", None, "0.7s", None), ("0.0s", None, "0.1s", None)
    assert text[0].parts == (*first, "then ", None, " and ", *second)
    assert len(usable_index(index, "images")) == 1  # a video is no image of stage 1


def test_counts_are_exact_and_frames_stand_in_their_order(tmp_path: Path, language: Path) -> None:
    config = replace(stage3("", language, global_batch_images=4, canonical_shares=1, lookahead_steps=1), video=VIDEO)
    config = replace(config, language=replace(config.language, max_tokens=150))
    index = indexed(members(tmp_path))
    loader = step_loader(index, config, reads="conversations")
    batch, (step,) = loader.planner.batch(0), take(index, config, 1)
    found = contents(step.micro)
    assert not step.failures and step.decoded == 10
    assert [len(found[key][0]) for key in batch.key.tolist()] == batch.tokens.tolist()
    row_of = dict(zip(batch.key.tolist(), batch.rows.tolist(), strict=True))
    rows = rows_by_key(index)
    gray = {
        row_of[key]: [np.frombuffer(data, np.uint8)[-PIXELS:].mean() / 10 for _, _, data in shown]
        for key, (*_, shown) in found.items()
    }
    assert np.allclose(gray[rows["one"]], [0, 2, 4], atol=0.3)
    first, second = gray[rows["all"]][:3], gray[rows["all"]][4:]
    assert np.allclose(first, [0, 3, 7], atol=0.3) and np.allclose(second, [0, 1], atol=0.3)
    silent = replace(config, video=replace(VIDEO, times=False))
    shorter = contents(take(index, silent, 1)[0].micro)
    assert {key: len(found[key][0]) - len(one[0]) for key, one in shorter.items() if row_of[key] == rows["one"]} == {
        key: 12 for key in found if row_of[key] == rows["one"]
    }
    assert loader.planner.batch(0).images.sum() == 10 and seat_of(config).num_ranks == 1


def test_samples_are_the_same_on_two_ranks(tmp_path: Path, language: Path) -> None:
    config = replace(stage3("", language, global_batch_images=4, canonical_shares=2, lookahead_steps=1), video=VIDEO)
    index = indexed(members(tmp_path))
    (alone,) = take(index, config, 1)
    ranks = [take(index, config, 1, seat_of(config, rank, 2))[0] for rank in range(2)]
    assert {**contents(ranks[0].micro), **contents(ranks[1].micro)} == contents(alone.micro)


def test_a_video_that_does_not_decode_silences_its_sample_alone(tmp_path: Path, language: Path) -> None:
    data = clip(40, container="avi")
    half, end = len(data) // 2, len(data) * 3 // 4
    broken = data[:half] + bytes(end - half) + data[end:]  # the first frame and the index are sound
    entries = [("a.avi", data), talk("a", "<video>"), ("b.avi", broken), talk("b", "<video>")]
    write_tar(tmp_path / "a.tar", entries)
    config = replace(stage3("", language, global_batch_images=2, canonical_shares=1, lookahead_steps=1), video=VIDEO)
    index = indexed(tmp_path)
    assert sorted(rows_by_key(index)) == ["a", "b"]
    (step,) = take(index, config, 1)
    assert len(step.failures) == 3 and all(":b at " in one and "weight 0" in one for one in step.failures)
    weights = {rows: sum(weight) for rows, (_, _, weight, _, _) in contents(step.micro).items()}
    assert sorted(weights.values())[0] == 0.0 < sorted(weights.values())[1]


def test_more_frames_than_a_pack_has_slots_are_told(tmp_path: Path, language: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.mp4", clip(12)), talk("k", "<video>")])
    config = stage3("", language, canonical_shares=1, global_batch_images=1, lookahead_steps=1)
    with pytest.raises(DataError, match=r"one sample has 12 images, and data\.images_per_pack=8; raise that"):
        take(indexed(tmp_path), config, 1)

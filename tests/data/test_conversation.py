"""Conversations: what is read of a json, what is left out and why, and which samples each stage sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogvit.errors import DataError
from cogvit.model.config import VideoConfig
from cogvit.model.dialog import Turn
from data_pipeline.conversation import Mark, conversation_of, file_names
from data_pipeline.index import load_index
from data_pipeline.loader import usable_index
from data_pipeline.scan import scan_shard
from data_pipeline.shards import ShardReader
from data_pipeline.token_counts import Wording, read_text
from tests.conversations import TWO_TURNS, indexed, said, talk, write_talks
from tests.data.corpus import ANY_SIZE, members, picture, write_tar


def test_both_forms_say_the_same() -> None:
    theirs = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}]}
    parts = [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "What?"}]
    expected = (Turn("user", (None, "What?")), Turn("assistant", ("this",)))
    for metadata in (theirs, {"messages": said(parts, "this")}, {"messages": said("<image>What?", "this")}):
        assert conversation_of(metadata, 1) == expected
    several = {"messages": [{"role": "system", "content": "be brief"}, *said("one <image> and <image>", "two")]}
    turns = conversation_of(several, 2)
    assert turns[:2] == (Turn("system", ("be brief",)), Turn("user", ("one ", None, " and ", None)))


def test_images_are_named_in_parts_or_beside_them() -> None:
    parts = [{"type": "image", "image": "x.0.jpg"}, {"type": "image_url", "image_url": "x.1.jpg"}]
    assert file_names({"messages": said(parts, "a")}, Mark.IMAGE) == ("x.0.jpg", "x.1.jpg")
    assert file_names({"image": "coco/1.jpg", "conversations": []}, Mark.IMAGE) == ("coco/1.jpg",)
    assert file_names({"images": ["a", "b"], "messages": said(parts, "a")}, Mark.IMAGE) == ("a", "b")
    assert file_names({"messages": said("<image> what", "a")}, Mark.IMAGE) == ()


BAD: list[tuple[Any, int, str]] = [
    (said("<image> what", "a"), 0, "more or fewer places for images than images"),
    (said("what", "a"), 1, "more or fewer places for images than images"),
    (said("what", " \n"), 0, "an empty answer"),
    ([{"role": "user", "content": "what"}], 0, "without an answer"),
    (said("what", "<image>"), 1, "an image in an answer"),
    (said("say <|image|>", "a"), 0, "whose text spells"),
    ([{"role": "tool", "content": "x"}, *said("what", "a")], 0, "a role that is none of"),
    (said([{"type": "audio"}], "a"), 0, "neither text nor image"),
    (said(None, "a"), 0, "neither text nor image"),
    ([], 0, "no list of turns"),
    ("what", 0, "no list of turns"),
    (["what"], 0, "a turn that is no object"),
    (said("half \ud800", "a"), 0, "not UTF-8"),
]


@pytest.mark.parametrize(("turns", "images", "reason"), BAD)
def test_what_cannot_be_trained_on_has_a_reason(turns: Any, images: int, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        conversation_of({"messages": turns}, images)


def test_bad_conversations_are_left_out_and_counted(tmp_path: Path) -> None:
    entries = talk("good", said("hello", "hi"))
    for number, (turns, images, _) in enumerate(BAD):
        data = json.dumps({"messages": turns}).encode()
        entries += [(f"b{number}.json", data)] + [(f"b{number}.png", picture(9, 9, number))] * images
    entries += [("cut.0.png", picture(9, 9, 1)[:20]), *talk("cut", said("<image>", "a"))]
    entries += talk("lost", said("<image><image>", "a"), images=1, images_=0)
    shard = write_tar(tmp_path / "a.tar", entries)
    with shard.open("rb") as file:
        table, left_out = scan_shard(str(shard), file, "default", ANY_SIZE)
    assert table["key"].to_pylist() == ["good"]
    assert sum(count for reason, count in left_out.items() if "conversation" in reason) == len(BAD) + 2
    assert left_out["the header does not parse"] == 1


def test_images_come_as_the_json_names_them_or_by_number(tmp_path: Path) -> None:
    pictures = [(f"k.{name}png", picture(8 + n, 9, n)) for n, name in enumerate(("10.", "", "2.", "front."))]
    heights = {name: 8 + n for n, name in enumerate(("10", "", "2", "front"))}
    for number, (named, order) in enumerate(
        [
            (None, ["", "2", "10", "front"]),
            (["k.front.png", "k.2.png"], ["front", "2"]),
            (["a/x.png", "a/y.png", "a/z.png", "a/w.png"], ["", "2", "10", "front"]),
        ]
    ):
        turns = said("<image>" * len(order), "a")
        metadata = {"messages": turns} | ({"images": named} if named else {})
        directory = tmp_path / str(number)
        write_tar(directory / "a.tar", [*pictures, ("k.json", json.dumps(metadata).encode())])
        index = indexed(directory)
        (row,) = index.rows_of().tolist()
        more = index.corpus.further(0, row)
        assert [int(index.take(index.rows_of())[0]["height_px"]), *more["height_px"].tolist()] == [
            heights[name] for name in order
        ]
        for place, name in enumerate(order):
            ref = index.ref(row, place)
            data = ShardReader().read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)
            assert data == dict(pictures)[f"k.{name}.png" if name else "k.png"]


def test_each_stage_sees_what_it_can_read(tmp_path: Path) -> None:
    index = indexed(write_talks(tmp_path))
    counts = {reads: len(usable_index(index, reads)) for reads in ("images", "captions", "conversations")}
    assert counts == {"images": 28, "captions": 20, "conversations": 36}
    assert "left out: 16 x no caption" in usable_index(index, "captions").describe()
    row = next(row for row in index.rows_of().tolist() if index.name(row).endswith(":two3"))
    text = read_text(index.corpus, row, "en", 0, Wording({}, "", VideoConfig()), ShardReader())
    assert text == conversation_of({"conversations": TWO_TURNS}, 2)
    assert index.corpus.captions(row, ShardReader()) == {"en": (), "zh": ()}


def test_conversations_about_one_image_are_no_duplicates(tmp_path: Path) -> None:
    image = picture(9, 9, 1)
    entries = [part for n in range(3) for part in (*talk(f"t{n}", said("<image>?", str(n))), (f"t{n}.png", image))]
    entries += [part for n in range(2) for part in members(f"c{n}", image, captions={"en": ["x"]})]
    write_tar(tmp_path / "a.tar", entries)
    indexed(tmp_path)
    assert len(load_index(str(tmp_path), duplicates="drop")) == 3 + 1

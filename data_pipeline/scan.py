"""One pass over a shard: the headers of its tar and of its images, and its captions. No pixel is decoded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import IO, Any

import pyarrow as pa
import xxhash

from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from cogvit.model.video import Measured, VideoReader
from data_pipeline.caption import LANGUAGES, NO_LABEL, captions_of, label_of, not_understood, parse_metadata, source_of
from data_pipeline.conversation import (
    Mark,
    Names,
    conversation_of,
    file_names,
    is_conversation,
    marks_of,
    spelt_bytes,
)
from data_pipeline.decode import is_damaged_exif, read_header
from data_pipeline.rules import Rules
from data_pipeline.shards import Member, members_of, shard_name
from data_pipeline.table import CONVERSATION, METADATA_EXTENSIONS, MORE_COLUMNS, SCHEMA

MAX_SIDE_PX = 2**16 - 1  # what the corpus file's rows hold
MAX_MEMBER_BYTES = 2**32 - 1
VIDEO_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "webm", "mkv", "avi"})
MAX_CAPTIONS = 2**8 - 1  # of a language that a sample draws from, the first
IMAGE_EXTENSIONS = frozenset(
    {"png", "jpg", "jpeg", "jpe", "jfif", "mpo", "webp", "gif", "tif", "tiff", "bmp", "avif", "jp2", "j2k"}
)


class LeftOut(Counter[str]):
    """How many members or samples are left out for which reason, and which: names of members, or keys of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.named: list[tuple[str, str]] = []  # name, reason

    def note(self, name: str, reason: str) -> None:
        """Count one."""
        self[reason] += 1
        self.named.append((name, reason))


@dataclass(slots=True)
class _Found:
    """What a shard holds of one key."""

    images: dict[str, dict[str, Any]] = field(default_factory=dict)  # columns, by what stands between key and extension
    videos: dict[str, dict[str, Any]] = field(default_factory=dict)  # likewise
    texts: dict[str, Member] = field(default_factory=dict)  # by extension


def scan_shard(shard: str, file: IO[bytes], default_source: str, rules: Rules) -> tuple[pa.Table, LeftOut]:
    """Read an open shard; returns its rows and what was left out.

    Errors: DataError when it is not a sound tar.
    """
    problems, videos = LeftOut(), VideoReader()
    found: dict[str, _Found] = {}
    for member in members_of(shard, file):
        if not member.name.isprintable():
            problems.note(member.name, "a name is not printable UTF-8")
        elif not member.is_regular:
            problems.note(member.name, "a link, device or sparse file, which is not followed")
        elif member.extension in METADATA_EXTENSIONS:
            texts = found.setdefault(member.key, _Found()).texts
            if texts.setdefault(member.extension, member) is not member:
                problems.note(member.name, "a second json, txt or cls of the same key")
        elif _kind(member) in IMAGE_EXTENSIONS:
            images = found.setdefault(member.key, _Found()).images
            _take(member, images, problems, partial(_image, member, rules, problems))
        elif _kind(member) in VIDEO_EXTENSIONS:
            shots = found.setdefault(member.key, _Found()).videos
            _take(member, shots, problems, partial(_video, member, rules, videos))
        else:
            problems.note(member.name, "neither an image, a video nor a caption by its name")
    videos.close()
    distinct: dict[int, dict[str, Any]] = {}
    for key, one in found.items():
        row = _row(key, one, rules, problems)
        if row is None:
            continue
        row = {f"more_{name}": [] for name in MORE_COLUMNS} | {"key": key, "source": default_source} | row
        row["sample_id"] = name_to_int64(f"{row['source']}/{shard_name(shard)}/{key}")
        if distinct.setdefault(row["sample_id"], row) is not row:
            problems.note(key, "its key hashes to the number of another key of the shard")
    rows = list(distinct.values())
    if rules.captions == "required":
        for row in rows:
            if row["caption_member"] < 0:
                problems.note(row["key"], "no caption")
        rows = [row for row in rows if row["caption_member"] >= 0]
    return pa.Table.from_pylist(rows, schema=SCHEMA), problems


def _kind(member: Member) -> str:
    return member.extension.rpartition(".")[2]


def _take(
    member: Member,
    known: dict[str, dict[str, Any]],
    problems: LeftOut,
    columns: Callable[[], dict[str, Any]],
) -> None:
    """Add an image or video to those of its key: KEY.jpg is called "", KEY.0.jpg is called "0"."""
    name = member.extension.rpartition(".")[0]
    if name in known:
        kind = "video" if _kind(member) in VIDEO_EXTENSIONS else "image"
        problems.note(member.name, f"a second {kind} of the same key")
        return
    try:
        known[name] = columns()
    except DataError as error:
        problems.note(member.name, str(error))


def _row(key: str, found: _Found, rules: Rules, problems: LeftOut) -> dict[str, Any] | None:
    """Return the columns of a sample; None where it is left out, and the reason is counted."""
    if "json" in found.texts:
        try:
            talk = _conversation_columns(found, rules)
        except DataError as error:
            problems.note(key, str(error))
            return None
        if talk is not None:
            return talk
    for name in found.videos:
        problems.note(".".join(filter(None, (key, name))), "a video without a conversation")
    for name in found.images.keys() - {""}:
        problems.note(f"{key}.{name}", "an image with a second dot in its name (keys end at the first one)")
    if "" not in found.images:
        if found.texts:
            problems.note(key, "captions without an image")
        return None
    image = {name: value for name, value in found.images[""].items() if name not in ("frames", "last_ms")}
    return image | _caption_columns(key, found.texts, rules, problems)


def _conversation_columns(found: _Found, rules: Rules) -> dict[str, Any] | None:
    """Return the columns of a sample whose json is a conversation; None where it is none.

    Errors: DataError with the reason why it is left out.
    """
    member = found.texts["json"]
    try:
        metadata = parse_metadata(member.data, "json")
    except DataError:
        return None  # its image serves without it, and the reason is counted there
    if not is_conversation(metadata):
        return None
    images = _in_order(found.images, file_names(metadata, Mark.IMAGE))
    videos = _in_order(found.videos, file_names(metadata, Mark.VIDEO))
    conversation = conversation_of(metadata, len(images), ((),) * len(videos))
    rest = {Mark.IMAGE: iter(images), Mark.VIDEO: iter(videos)}
    shown = [next(rest[mark]) for mark in marks_of(metadata, len(images), len(videos))]
    # An image that comes first has its place in the sample's row; a video never has.
    begins = bool(shown) and not shown[0]["frames"]
    columns: dict[str, Any] = dict(shown[0]) if begins else _no_image(member, shown)
    columns |= {f"more_{name}": [one[name] for one in shown[begins:]] for name in MORE_COLUMNS}
    for name in ("frames", "last_ms"):
        columns.pop(name, None)
    columns |= {f"{language}_bytes": [] for language in LANGUAGES} | {"en_bytes": [spelt_bytes(conversation)]}
    source = source_of(metadata, rules.source_field)
    return columns | {
        "caption_member": CONVERSATION,
        "caption_offset_bytes": member.offset_bytes,
        "caption_size_bytes": len(member.data),
        "label": label_of(metadata),
        **({} if source is None else {"source": source}),
    }


def _in_order(images: dict[str, dict[str, Any]], names: Names) -> list[dict[str, Any]]:
    """Return the images of a conversation: as its json names them, or else KEY.jpg and then the others by number.

    A name may be that of the member, or say in its own way what it was called elsewhere: as many names as images are in
    the images' order. Errors: DataError.
    """

    def number(name: str) -> tuple[int, str]:
        return (int(name), "") if name.isdecimal() else (1 << 62, name) if name else (-1, "")

    own = [images[name] for name in sorted(images, key=number)]
    if not names:
        return own
    called = [name.rpartition("/")[2].partition(".")[2].rpartition(".")[0].lower() for name in names]
    if len({*names}) == len({*called}) and all(name in images for name in called):
        return [images[name] for name in called]
    if len(names) != len(own):
        raise DataError("a conversation that names images which are not in the shard")
    return own


def _no_image(member: Member, shown: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the columns of a conversation that begins with no image; its first video, or its text, stands for it."""
    columns: dict[str, Any] = dict.fromkeys(("offset_bytes", "size_bytes", "height_px", "width_px"), 0)
    hashes = {name: shown[0][name] for name in ("content_hash", "content_check")} if shown else _hashes(member.data)
    return columns | {"format": ""} | hashes


def _hashes(data: bytes) -> dict[str, int]:
    return {
        "content_hash": int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True),
        "content_check": int.from_bytes(xxhash.xxh3_64_digest(data), "little", signed=True),
    }


def _image(member: Member, rules: Rules, problems: LeftOut) -> dict[str, Any]:
    header = read_header(member.data)
    rules.check_size(header.height_px, header.width_px)
    if header.exif and is_damaged_exif(header.exif):
        problems.note(member.name, "damaged EXIF (the image is taken as it lies)")
    return _columns(member, Measured(header.height_px, header.width_px, 0, 0)) | {"format": header.format}


def _video(member: Member, rules: Rules, videos: VideoReader) -> dict[str, Any]:
    measured = videos.measure(member.data)
    rules.check_size(measured.height_px, measured.width_px)
    return _columns(member, measured)


def _columns(member: Member, measured: Measured) -> dict[str, Any]:
    """Return the columns of an image, which has no frames, or a video."""
    if max(measured.height_px, measured.width_px) > MAX_SIDE_PX or len(member.data) > MAX_MEMBER_BYTES:
        raise DataError(f"a side is longer than {MAX_SIDE_PX:,} px, or the file than {MAX_MEMBER_BYTES:,} bytes")
    place = {"offset_bytes": member.offset_bytes, "size_bytes": len(member.data)}
    return {**_hashes(member.data), **place, **asdict(measured)}


def _caption_columns(key: str, members: dict[str, Member], rules: Rules, problems: LeftOut) -> dict[str, Any]:
    """Return source and label, if there are any, and where the captions lie: in the json, or else in the txt."""
    columns: dict[str, Any] = {"caption_offset_bytes": 0, "caption_size_bytes": 0, "caption_member": -1}
    columns["label"] = NO_LABEL
    columns |= {f"{language}_bytes": [] for language in LANGUAGES}
    for number, extension in enumerate(METADATA_EXTENSIONS):
        if extension not in members:
            continue
        member = members[extension]
        try:
            metadata = parse_metadata(member.data, extension)
        except DataError as error:
            problems.note(key, str(error))
            continue
        if (source := source_of(metadata, rules.source_field)) is not None:
            columns["source"] = source
        elif metadata.get(rules.source_field) is not None:
            problems.note(key, "a source that is no text (the default stands for it)")
        if columns["label"] == NO_LABEL:
            columns["label"] = label_of(metadata)
        found = captions_of(metadata, _field(rules, extension))
        captions = {language: texts[:MAX_CAPTIONS] for language, texts in found.items()}
        if any(captions.values()) and columns["caption_member"] < 0:
            columns |= {
                f"{language}_bytes": [len(text.encode()) for text in captions[language]] for language in captions
            }
            columns["caption_member"] = number
            columns["caption_offset_bytes"] = member.offset_bytes
            columns["caption_size_bytes"] = len(member.data)
        elif not_understood(metadata, _field(rules, extension)):
            problems.note(
                key,
                "captions of a form that is not understood: no text, list of texts, COCO's list, or these by en, zh",
            )
    if members and columns["caption_member"] < 0 and columns["label"] == NO_LABEL:
        problems.note(key, "a sample's captions are empty or missing in its json or txt (it serves stage 1)")
    return columns


def _field(rules: Rules, extension: str) -> str:
    """A txt is a caption, whatever the field of a json's is called."""
    return rules.caption_field if extension == "json" else ""

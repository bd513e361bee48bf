"""One pass over a shard: the headers of its tar and of its images, and its captions. No pixel is decoded."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import IO, Any

import pyarrow as pa
import xxhash

from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from data_pipeline.caption import LANGUAGES, NO_LABEL, captions_of, label_of, not_understood, parse_metadata, source_of
from data_pipeline.decode import is_damaged_exif, read_header
from data_pipeline.rules import Rules
from data_pipeline.shards import Member, members_of, shard_name
from data_pipeline.table import METADATA_EXTENSIONS, SCHEMA

MAX_SIDE_PX = 2**16 - 1  # what the corpus file's rows hold
MAX_MEMBER_BYTES = 2**32 - 1
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


def scan_shard(shard: str, file: IO[bytes], default_source: str, rules: Rules) -> tuple[pa.Table, LeftOut]:
    """Read an open shard; returns its rows and what was left out.

    Errors: DataError when it is not a sound tar.
    """
    problems = LeftOut()
    images: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, Member]] = {}
    for member in members_of(shard, file):
        if not member.name.isprintable():
            problems.note(member.name, "a name is not printable UTF-8")
        elif not member.is_regular:
            problems.note(member.name, "a link, device or sparse file, which is not followed")
        elif member.extension in METADATA_EXTENSIONS and member.extension in texts.get(member.key, {}):
            problems.note(member.name, "a second json, txt or cls of the same key")
        elif member.extension in METADATA_EXTENSIONS:
            texts.setdefault(member.key, {})[member.extension] = member
        elif member.extension in IMAGE_EXTENSIONS and member.key in images:
            problems.note(member.name, "a second image of the same key")
        elif member.extension in IMAGE_EXTENSIONS:
            try:
                images[member.key] = _image_columns(member, rules, problems)
            except DataError as error:
                problems.note(member.name, str(error))
        elif member.extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            problems.note(member.name, "an image with a second dot in its name (keys end at the first one)")
        else:
            problems.note(member.name, "neither an image nor a caption by its name")
    for key in sorted(texts.keys() - images.keys()):
        problems.note(key, "captions without an image")
    for key, row in images.items():
        row |= {"key": key, "source": default_source} | _caption_columns(key, texts.get(key, {}), rules, problems)
        row["sample_id"] = name_to_int64(f"{row['source']}/{shard_name(shard)}/{key}")
    distinct: dict[int, dict[str, Any]] = {}
    for key, row in images.items():
        if distinct.setdefault(row["sample_id"], row) is not row:
            problems.note(key, "its key hashes to the number of another key of the shard")
    rows = list(distinct.values())
    if rules.captions == "required":
        for row in rows:
            if row["caption_member"] < 0:
                problems.note(row["key"], "no caption")
        rows = [row for row in rows if row["caption_member"] >= 0]
    return pa.Table.from_pylist(rows, schema=SCHEMA), problems


def _image_columns(member: Member, rules: Rules, problems: LeftOut) -> dict[str, Any]:
    header = read_header(member.data)
    rules.check_size(header.height_px, header.width_px)
    if header.exif and is_damaged_exif(header.exif):
        problems.note(member.name, "damaged EXIF (the image is taken as it lies)")
    if max(header.height_px, header.width_px) > MAX_SIDE_PX or len(member.data) > MAX_MEMBER_BYTES:
        raise DataError(f"a side is longer than {MAX_SIDE_PX:,} px, or the file than {MAX_MEMBER_BYTES:,} bytes")
    return {
        "format": header.format,
        "content_hash": int.from_bytes(hashlib.blake2b(member.data, digest_size=8).digest(), "little", signed=True),
        "content_check": int.from_bytes(xxhash.xxh3_64_digest(member.data), "little", signed=True),
        "offset_bytes": member.offset_bytes,
        "size_bytes": len(member.data),
        "height_px": header.height_px,
        "width_px": header.width_px,
    }


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

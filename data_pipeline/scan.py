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
from data_pipeline.decode import read_header
from data_pipeline.rules import Rules
from data_pipeline.shards import Member, members_of, shard_name
from data_pipeline.table import METADATA_EXTENSIONS, SCHEMA

MAX_SIDE_PX = 2**16 - 1  # what the corpus file's rows hold
MAX_MEMBER_BYTES = 2**32 - 1
MAX_CAPTIONS = 2**8 - 1  # of a language that a sample draws from, the first
IMAGE_EXTENSIONS = frozenset(
    {"png", "jpg", "jpeg", "jpe", "jfif", "mpo", "webp", "gif", "tif", "tiff", "bmp", "avif", "jp2", "j2k"}
)


def scan_shard(shard: str, file: IO[bytes], default_source: str, rules: Rules) -> tuple[pa.Table, dict[str, int]]:
    """Read an open shard; returns its rows and how many members or samples were left out for which reason.

    Errors: DataError when it is not a sound tar.
    """
    problems: Counter[str] = Counter()
    images: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, Member]] = {}
    for member in members_of(shard, file):
        if not member.name.isprintable():
            problems["a name is not printable UTF-8"] += 1
        elif not member.is_regular:
            problems["a link, device or sparse file, which is not followed"] += 1
        elif member.extension in METADATA_EXTENSIONS and member.extension in texts.get(member.key, {}):
            problems["a second json, txt or cls of the same key"] += 1
        elif member.extension in METADATA_EXTENSIONS:
            texts.setdefault(member.key, {})[member.extension] = member
        elif member.extension in IMAGE_EXTENSIONS and member.key in images:
            problems["a second image of the same key"] += 1
        elif member.extension in IMAGE_EXTENSIONS:
            try:
                images[member.key] = _image_columns(member, rules)
            except DataError as error:
                problems[str(error)] += 1
        elif member.extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            problems["an image with a second dot in its name (keys end at the first one)"] += 1
        else:
            problems["neither an image nor a caption by its name"] += 1
    problems["captions without an image"] += len(texts.keys() - images.keys())
    for key, row in images.items():
        row |= {"key": key, "source": default_source} | _caption_columns(texts.get(key, {}), problems)
        row["sample_id"] = name_to_int64(f"{row['source']}/{shard_name(shard)}/{key}")
    distinct: dict[int, dict[str, Any]] = {}
    for row in images.values():
        distinct.setdefault(row["sample_id"], row)
    rows = list(distinct.values())
    problems["its key hashes to the number of another key of the shard"] += len(images) - len(rows)
    if rules.captions == "required":
        captioned = [row for row in rows if row["caption_member"] >= 0]
        problems["no caption"] += len(rows) - len(captioned)
        rows = captioned
    problems += Counter()  # drops what was counted zero times
    return pa.Table.from_pylist(rows, schema=SCHEMA), dict(problems)


def _image_columns(member: Member, rules: Rules) -> dict[str, Any]:
    header = read_header(member.data)
    rules.check_size(header.height_px, header.width_px)
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


def _caption_columns(members: dict[str, Member], problems: Counter[str]) -> dict[str, Any]:
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
            problems[str(error)] += 1
            continue
        if (source := source_of(metadata)) is not None:
            columns["source"] = source
        elif metadata.get("source") is not None:
            problems["a source that is no text (the default stands for it)"] += 1
        if columns["label"] == NO_LABEL:
            columns["label"] = label_of(metadata)
        captions = {language: texts[:MAX_CAPTIONS] for language, texts in captions_of(metadata).items()}
        if any(captions.values()) and columns["caption_member"] < 0:
            columns |= {
                f"{language}_bytes": [len(text.encode()) for text in captions[language]] for language in captions
            }
            columns["caption_member"] = number
            columns["caption_offset_bytes"] = member.offset_bytes
            columns["caption_size_bytes"] = len(member.data)
        elif not_understood(metadata):
            problems[
                "captions of a form that is not understood: no text, list of texts, COCO's list, or these by en, zh"
            ] += 1
    if members and columns["caption_member"] < 0 and columns["label"] == NO_LABEL:
        problems["a sample's captions are empty or missing in its json or txt (it serves stage 1)"] += 1
    return columns

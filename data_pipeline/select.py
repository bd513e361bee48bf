"""Which samples of a corpus a run uses: by a user's rule, once of equal images, with a caption.

The answer is a bit a sample, made once and stored beside the corpus file under the hash of the question.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from cogvit.config.split import DRAW
from cogvit.draws import uniform
from cogvit.errors import ConfigError
from data_pipeline.caption import LANGUAGES
from data_pipeline.corpus import Corpus
from data_pipeline.rules import read_rule
from data_pipeline.stored import stored
from data_pipeline.table import CONVERSATION

Needs = Literal["anything", "image", "caption", "text"]  # text: a caption or a conversation

VERSION = 1
RULE_COLUMNS = ("key", "source", "format", "height_px", "width_px", "size_bytes", "captions_en", "captions_zh", DRAW)
_DRAW_SALT = 0x73706C69  # "spli"
_FACTS = b"cogvit.selection"
_BUCKET_IMAGES = 1 << 25  # whose hashes are sorted at a time
_HASHED = np.dtype([("hash", np.int64), ("check", np.int64), ("mute", np.bool_), ("row", np.int64)])


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked of samples."""

    where: str = ""  # a rule over RULE_COLUMNS
    duplicates: Literal["keep", "drop"] = "keep"  # of equal images, the first that has a caption or else the first
    needs: Needs = "anything"  # only samples that have it


@dataclass(frozen=True, eq=False)
class Selection:
    """Which samples of a corpus are used."""

    choice: Choice
    left_out: NDArray[np.uint8] | None  # a bit a sample, each shard's from a byte of its own; None: all are used
    start: NDArray[np.int64]  # [shards], of each shard's bits in bytes
    images: int
    by_source: tuple[tuple[str, int], ...]  # those with samples, by name
    captions: tuple[int, ...]  # by language
    reasons: dict[str, int]  # why samples are left out, and how many
    content: str  # hash of corpus and bits

    def of_shard(self, shard: int, images: int) -> NDArray[np.bool_] | None:
        """Return which samples of a shard are used; None for all."""
        if self.left_out is None:
            return None
        start = int(self.start[shard])
        return np.unpackbits(self.left_out[start : start - (-images // 8)], count=images) == 0


def select(corpus: Corpus, choice: Choice) -> Selection:
    """Return the samples that a choice keeps, as they are stored beside the corpus or made now.

    Errors: ConfigError for a rule that is not understood.
    """
    if choice.where:
        read_rule(choice.where, RULE_COLUMNS)  # refused before anything is looked for
    start = np.cumsum(-(-np.diff(corpus.first) // 8)) + corpus.first[:1]
    start = np.concatenate([[0], start[:-1]]).astype(np.int64)
    if choice == Choice():
        return _whole(corpus, start)
    question = json.dumps([VERSION, corpus.content, corpus.identity(), asdict(choice)])
    table = stored(corpus.path, "chosen", question, lambda: _make(corpus, choice, start))
    facts = json.loads(table.schema.metadata[_FACTS])
    bits = table["left_out"].chunk(0).to_numpy() if table.num_rows else None
    return Selection(
        choice,
        bits,
        start,
        facts["images"],
        tuple((name, count) for name, count in facts["by_source"]),
        tuple(facts["captions"]),
        facts["reasons"],
        facts["content"],
    )


def _whole(corpus: Corpus, start: NDArray[np.int64]) -> Selection:
    numbers = corpus.shards["sources"].flatten().to_numpy()
    counts = np.bincount(numbers, corpus.shards["source_images"].flatten().to_numpy(), len(corpus.sources)).astype(int)
    captions = tuple(pc.sum(corpus.shards[f"captions_{language}"]).as_py() or 0 for language in LANGUAGES)
    return Selection(Choice(), None, start, len(corpus), _named(corpus, counts), captions, {}, corpus.content)


def _named(corpus: Corpus, counts: NDArray[np.int64]) -> tuple[tuple[str, int], ...]:
    used = np.flatnonzero(counts)
    return tuple(
        sorted(zip(corpus.sources["name"].take(pa.array(used)).to_pylist(), counts[used].tolist(), strict=True))
    )


def _make(corpus: Corpus, choice: Choice, start: NDArray[np.int64]) -> pa.Table:
    """Go through the corpus shard by shard; returns the bits and what they leave."""
    chosen = np.zeros(int(start[-1] - (-np.diff(corpus.first)[-1] // 8)) if len(start) else 0, np.uint8)
    reasons: dict[str, int] = {}
    for shard in range(corpus.num_shards):
        kept = np.ones(len(corpus.rows_of(shard)), np.bool_)
        if choice.where:
            kept = _ruled(corpus, shard, choice.where)
        _put(chosen, int(start[shard]), kept)
        reasons["data.where"] = reasons.get("data.where", 0) + int((~kept).sum())
    if choice.duplicates == "drop":
        reasons["a second copy of an image"] = _drop_duplicates(corpus, chosen, start)
    counts = np.zeros(len(corpus.sources), np.int64)
    captions = np.zeros(len(LANGUAGES), np.int64)
    for shard in range(corpus.num_shards):
        rows = corpus.rows_of(shard)
        kept = _get(chosen, int(start[shard]), len(rows))
        if choice.needs != "anything":
            fit, reason = has(rows, choice.needs), f"no {choice.needs}"
            reasons[reason] = reasons.get(reason, 0) + int((kept & ~fit).sum())
            kept &= fit
            _put(chosen, int(start[shard]), kept)
        counts += np.bincount(rows["source"][kept], minlength=len(counts))
        captions += rows["num_captions"][kept].sum(axis=0, dtype=np.int64)
    reasons = {reason: count for reason, count in reasons.items() if count}
    left_out = ~chosen if reasons else chosen[:0]
    content = hashlib.blake2b(corpus.content.encode() + left_out.tobytes(), digest_size=8).hexdigest()
    facts = {
        "images": int(counts.sum()),
        "by_source": _named(corpus, counts),
        "captions": captions.tolist(),
        "reasons": reasons,
        "content": content if reasons else corpus.content,
    }
    return pa.table({"left_out": left_out}).replace_schema_metadata({_FACTS: json.dumps(facts)})


def has(rows: NDArray[Any], needs: Needs) -> NDArray[np.bool_]:
    """Return which rows have what is needed."""
    spoken = rows["caption_member"] >= 0
    match needs:
        case "image":
            return rows["height_px"] > 0
        case "caption":
            return spoken & (rows["caption_member"] != CONVERSATION)
        case "text":
            return spoken
        case "anything":
            return np.ones(len(rows), np.bool_)


def _put(bits: NDArray[np.uint8], start: int, values: NDArray[np.bool_]) -> None:
    packed = np.packbits(values)
    bits[start : start + len(packed)] = packed


def _get(bits: NDArray[np.uint8], start: int, count: int) -> NDArray[np.bool_]:
    return np.unpackbits(bits[start : start - (-count // 8)], count=count).astype(np.bool_)


def _ruled(corpus: Corpus, shard: int, where: str) -> NDArray[np.bool_]:
    """Return which samples of a shard a user's rule keeps. Errors: ConfigError."""
    rows = corpus.rows_of(shard)
    columns: dict[str, Any] = {name: rows[name].astype(np.int64) for name in ("height_px", "width_px", "size_bytes")}
    columns["key"] = pa.array(corpus.keys(shard), pa.string())
    columns["source"] = corpus.sources["name"].take(pa.array(rows["source"]))
    columns["format"] = pa.array(corpus.formats, pa.string()).take(pa.array(rows["format"]))
    columns |= {f"captions_{one}": rows["num_captions"][:, n].astype(np.int64) for n, one in enumerate(LANGUAGES)}
    hashes = torch.from_numpy(corpus.hashes(shard)["content_hash"].copy())  # equal images are drawn together
    columns[DRAW] = uniform(hashes, _DRAW_SALT).double().numpy()
    columns["row"] = np.arange(len(rows))
    kept = np.zeros(len(rows), np.bool_)
    try:
        kept[pa.table(columns).filter(read_rule(where, RULE_COLUMNS))["row"].to_numpy()] = True
    except pa.ArrowException as error:
        raise ConfigError(f"--data.where {where!r} does not fit the columns: {str(error).splitlines()[0]}") from None
    return kept


def _drop_duplicates(corpus: Corpus, chosen: NDArray[np.uint8], start: NDArray[np.int64]) -> int:
    """Leave out all but one of equal images, and return how many those are."""
    dropped = 0
    for bucket in _buckets(corpus, chosen, start):
        order = np.lexsort((bucket["row"], bucket["mute"], bucket["check"], bucket["hash"]))
        hashes = bucket[["hash", "check"]][order]
        rows = bucket["row"][order][1:][hashes[1:] == hashes[:-1]]
        dropped += len(rows)
        shard = corpus.shard_of(rows)
        byte, bit = np.divmod(rows - corpus.first[shard], 8)
        np.bitwise_and.at(chosen, start[shard] + byte, ~(np.uint8(128) >> bit.astype(np.uint8)))
    return dropped


def _buckets(corpus: Corpus, chosen: NDArray[np.uint8], start: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Deal the hashes of the chosen images to files, equal ones to the same, and yield what each file holds."""
    count = 1 + len(corpus) // _BUCKET_IMAGES
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch, str(number)) for number in range(count)]
        files = [path.open("wb") for path in paths]
        for shard in range(corpus.num_shards):
            rows, hashes = corpus.rows_of(shard), corpus.hashes(shard)
            hashed = np.zeros(len(rows), _HASHED)
            hashed["hash"], hashed["check"] = hashes["content_hash"], hashes["content_check"]
            hashed["mute"], hashed["row"] = rows["caption_member"] < 0, corpus.first[shard] + np.arange(len(rows))
            # Many conversations may be about one image.
            alone = rows["caption_member"] != CONVERSATION
            hashed = hashed[_get(chosen, int(start[shard]), len(rows)) & alone]
            owner = hashed["hash"].view(np.uint64) % np.uint64(count) if count > 1 else np.zeros(len(hashed), np.uint64)
            for number in np.unique(owner).tolist():
                files[number].write(hashed[owner == number].tobytes())
        for path, file in zip(paths, files, strict=True):
            file.close()
            yield np.fromfile(path, _HASHED)
            path.unlink()

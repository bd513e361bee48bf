"""The form of a corpus file: its fixed rows, the parts of a shard's block, its list of shards and its first bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from data_pipeline.caption import LANGUAGES

VERSION = 3
MAGIC = b"CVCORPUS"
PRELUDE = struct.Struct("<8sIIQQQQ")  # magic, version, bytes of a row, offset, size and hash of the tail, hash of these

# One sample. Members of a tar begin at multiples of 512 bytes, which is the unit of the blocks.
ROW = np.dtype(
    [
        ("sample_id", np.int64),
        ("image_block", np.uint32),
        ("size_bytes", np.uint32),
        ("caption_block", np.uint32),
        ("caption_size_bytes", np.uint32),
        ("caption_start", np.uint32),  # of its caption lengths among the shard's, language after language
        ("source", np.uint32),
        ("label", np.int32),  # class for evaluation; NO_LABEL where there is none
        ("height_px", np.uint16),  # upright; 0 where there is no image
        ("width_px", np.uint16),
        ("num_captions", np.uint8, (len(LANGUAGES),)),
        ("caption_member", np.int8),  # index into CAPTION_EXTENSIONS, or CONVERSATION; -1 where nothing is said
        ("format", np.uint8),  # index into Corpus.formats
    ]
)
HASHES = np.dtype([("content_hash", np.int64), ("content_check", np.int64)])  # of the encoded image
MORE = np.dtype(  # a further image of a conversation, or a video
    [
        ("row", np.uint32),  # of its sample in the shard
        ("image_block", np.uint32),
        ("size_bytes", np.uint32),
        ("height_px", np.uint16),
        ("width_px", np.uint16),
        ("frames", np.uint32),  # of a video; 0 of an image
        ("last_ms", np.uint32),  # when a video's last frame appears
    ]
)
FURTHER = np.dtype([(name, np.int64) for name in ("owner", "number", "height_px", "width_px", "frames", "last_ms")])
TAR_BLOCK_BYTES = 512
BLOCKS_AT = 2 * ROW.itemsize  # where the first block may begin; all begin at a multiple of a row
SHARDS = pa.schema(
    [
        ("name", pa.string()),  # behind the head of the pattern
        ("mark", pa.string()),  # with size_bytes its version
        ("size_bytes", pa.int64()),
        ("made_from", pa.uint64()),  # hash of what its index was made from
        ("block", pa.int64()),  # where its block begins, in rows
        ("images", pa.int64()),
        *((f"captions_{language}", pa.int64()) for language in LANGUAGES),
        ("captioned", pa.int64()),  # images with a caption
        ("pictured", pa.int64()),  # samples with an image
        ("spoken", pa.int64()),  # with a caption or a conversation
        ("more", pa.int64()),  # further images, and videos
        ("key_bytes", pa.int64()),
        ("rows_hash", pa.uint64()),
        ("apart_hash", pa.uint64()),
        ("content", pa.uint64()),  # hash of what plans depend on; moving a shard keeps it
        ("sources", pa.list_(pa.uint32())),
        ("source_images", pa.list_(pa.int64())),
    ]
)
SOURCES = pa.schema([("name", pa.string())])
FACTS = b"cogvit.corpus"


@dataclass(frozen=True, slots=True)
class Sections:
    """Where the parts of a shard's block begin, in bytes after its first row."""

    hashes: int
    lengths: int
    more: int
    key_ends: int
    keys: int
    end: int  # a whole number of rows

    @staticmethod
    def of(images: int, captions: int, more: int, key_bytes: int) -> Sections:
        """Return those of a shard of so many samples, captions, further images and bytes of keys."""
        hashes = images * ROW.itemsize
        lengths = hashes + images * HASHES.itemsize
        further = lengths + 4 * captions
        key_ends = further + MORE.itemsize * more
        keys = key_ends + 4 * images
        return Sections(hashes, lengths, further, key_ends, keys, -(-(keys + key_bytes) // ROW.itemsize) * ROW.itemsize)


def tail_bytes(
    shards: pa.Table, sources: list[str], formats: list[str], content: str, part: tuple[int, int, int] | None
) -> pa.Buffer:
    """Return the tail of a corpus file."""
    sink = pa.BufferOutputStream()
    facts = json.dumps({"formats": formats, "content": content, "part": part})
    for table in (
        shards.replace_schema_metadata({FACTS: facts}),
        pa.table({"name": sources}, schema=SOURCES),
    ):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            batches = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
            writer.write_batch(batches[0])
    return sink.getvalue()


def prelude_bytes(offset: int, tail: pa.Buffer) -> bytes:
    """Return the start of a corpus file whose tail lies at an offset."""
    fields = (MAGIC, VERSION, ROW.itemsize, offset, tail.size, xxhash.xxh3_64_intdigest(tail))
    start = PRELUDE.pack(*fields, 0)[:-8]
    return start + xxhash.xxh3_64_intdigest(start).to_bytes(8, "little")

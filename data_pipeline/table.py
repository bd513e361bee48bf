"""The file of an index: SHARD.parquet with a row for each sample, and what it was made from in its metadata."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogvit.errors import ConfigError, DataError
from data_pipeline.caption import LANGUAGES
from data_pipeline.shards import filesystem, is_pipe, is_remote, retry, shard_name

VERSION = 7
CAPTION_EXTENSIONS = ("json", "txt")  # in the order in which captions are looked for
CONVERSATION = len(CAPTION_EXTENSIONS)  # caption_member of a json that is a conversation
METADATA_EXTENSIONS = (*CAPTION_EXTENSIONS, "cls")  # and labels
_METADATA_KEY = b"cogvit.index"

MORE_COLUMNS = ("offset_bytes", "size_bytes", "height_px", "width_px", "frames", "last_ms")
SCHEMA = pa.schema(  # a row a sample
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("format", pa.string()),  # as its bytes say, lower case: jpeg, png, webp, ...
        ("sample_id", pa.int64()),
        ("content_hash", pa.int64()),  # of the first file that is shown, or of the json where there is none
        ("content_check", pa.int64()),  # another hash of it: images are equal where both are
        ("offset_bytes", pa.int64()),
        ("size_bytes", pa.int64()),
        ("height_px", pa.int32()),  # upright; 0 where there is no image
        ("width_px", pa.int32()),
        *((f"more_{name}", pa.list_(pa.int64())) for name in MORE_COLUMNS),  # a conversation's, and its videos
        ("caption_offset_bytes", pa.int64()),
        ("caption_size_bytes", pa.int32()),
        ("caption_member", pa.int8()),  # index into CAPTION_EXTENSIONS, or CONVERSATION; -1 where nothing is said
        ("label", pa.int32()),  # class for evaluation; NO_LABEL where there is none
        *((f"{language}_bytes", pa.list_(pa.int32())) for language in LANGUAGES),  # a conversation's all count as en
    ]
)


def index_path(shard: str, index_dir: str = "") -> str:
    """Return where the index of a shard lies: SHARD.parquet beside it, or in index_dir.

    Errors: DataError for a pipe without an index_dir.
    """
    if is_pipe(shard) and not index_dir:
        raise DataError(f"there is no place beside {shard} for its index; pass --index-dir (--data.index-dir)")
    return f"{index_dir.rstrip('/') if index_dir else shard.rpartition('/')[0]}/{shard_name(shard)}.parquet"


def table_exists(path: str) -> bool:
    """Whether there is a file. Errors: DataError when its place is out of reach."""
    fs, bare = filesystem(path)
    return retry(lambda: bool(fs.exists(bare)), path)


def read_facts(path: str) -> tuple[int, dict[str, Any]]:
    """Return the number of rows and the facts of an index, without its rows where it lies on a disk.

    Errors: DataError when it is no index.
    """
    if is_remote(path):
        table, facts = read_table(path)
        return table.num_rows, facts
    try:
        metadata = retry(lambda: pq.read_metadata(path), path)
    except pa.ArrowInvalid:
        raise _foreign(path) from None
    if _METADATA_KEY not in (metadata.metadata or {}):
        raise _foreign(path)
    return metadata.num_rows, json.loads(metadata.metadata[_METADATA_KEY])


def _foreign(path: str) -> DataError:
    return DataError(f"{path} is no index of this version; remove it and run python -m tools.index_shards again")


def read_table(path: str) -> tuple[pa.Table, dict[str, Any]]:
    """Return the rows and the facts that were written with them, of an older version as they are.

    Errors: DataError when it is no index.
    """

    def read() -> bytes:
        fs, bare = filesystem(path)
        with fs.open(bare, "rb") as file:
            return bytes(file.read())

    try:
        # Not pq.read_table, whose reading threads now and then abort a process that ends soon (arrow issue 34314).
        table = pq.ParquetFile(pa.BufferReader(retry(read, path))).read(use_threads=False)
    except pa.ArrowInvalid:
        raise _foreign(path) from None
    if _METADATA_KEY not in (table.schema.metadata or {}):
        raise _foreign(path)
    facts = json.loads(table.schema.metadata[_METADATA_KEY])
    if facts["made_from"]["version"] == VERSION and table.schema.names != SCHEMA.names:
        raise _foreign(path)
    return table, facts


def write_table(path: str, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Write all or nothing: a reader never sees half an index. Errors: ConfigError when its place does not take it."""
    buffer = io.BytesIO()
    # Dictionaries and compression would cost more to undo than they save of columns that hardly repeat.
    rows = table.replace_schema_metadata({_METADATA_KEY: json.dumps(facts)})
    pq.write_table(rows, buffer, compression="none", use_dictionary=["source", "format"])
    fs, bare = filesystem(path)
    temporary = f"{bare}.{os.getpid()}.partial"
    try:
        fs.makedirs(bare.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(temporary, buffer.getvalue())
        fs.mv(temporary, bare)
    except Exception as error:  # the drivers of remote stores have errors of their own
        raise ConfigError(f"cannot write {path} ({error or type(error).__name__}); pass --index-dir DIR") from None

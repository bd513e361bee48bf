"""What is worked out of a corpus once and stored beside it, as an Arrow stream and a hash of its bytes."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import xxhash

from data_pipeline.corpus import map_file
from data_pipeline.shards import is_remote

log = logging.getLogger(__name__)

_HASH_BYTES = 8


def stored(corpus_path: str, kind: str, question: str, make: Callable[[], pa.Table]) -> pa.Table:
    """Return the answer to a question about a corpus, mapped: the one that lies beside it, or one that is made now.

    One process of those that ask makes it. Where nothing can be written, or what lies there is damaged, it goes to a
    temporary file. No corpus_path: it stays in memory.
    """
    if not corpus_path:
        return make()
    name = hashlib.blake2b(question.encode(), digest_size=6).hexdigest()
    path = f"{corpus_path}.{kind}-{name}.arrow"
    if not is_remote(path):
        if (table := _mapped(path)) is not None:
            return table
        try:
            with _locked(path):
                if (table := _mapped(path)) is None:
                    _write(path, make())
                    table = _mapped(path)
        except OSError as error:
            why = error.strerror or error
            log.warning(
                "%s cannot be stored (%s), so every process works through the corpus at its start; let this user write"
                " there, or index the shards with --index-dir DIR", path, why,
            )  # fmt: skip
            table = None
        if table is not None:
            return table
    with tempfile.TemporaryDirectory() as scratch:
        _write(copy := os.path.join(scratch, "table"), make())
        mapped = _mapped(copy)
        assert mapped is not None
        return mapped


def _mapped(path: str) -> pa.Table | None:
    """Map a table; None where it is not there or not whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        buffer = map_file(descriptor)
    finally:
        os.close(descriptor)
    data, ending = buffer[:-_HASH_BYTES], bytes(buffer[-_HASH_BYTES:])
    if xxhash.xxh3_64_digest(data) != ending:
        log.warning("%s is cut short or damaged; it is made anew", path)
        return None
    with pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(data))) as reader:
        return reader.read_all()


def _write(path: str, table: pa.Table) -> None:
    """Write all or nothing."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    data = sink.getvalue()
    temporary = Path(f"{path}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.write(xxhash.xxh3_64_digest(data))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock beside a file, where the file system has locks."""
    with open(f"{path}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            log.warning("%s cannot be locked; processes may make it side by side", path)
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)

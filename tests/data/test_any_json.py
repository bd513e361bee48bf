"""Whatever a sample's json, txt or cls holds, indexing counts it, and reading it again gives what the index says."""

import io
import json
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from cogvit.config import DataConfig
from cogvit.draws import name_to_int64
from data_pipeline.caption import LANGUAGES, captions_of, parse_metadata
from data_pipeline.rules import Rules
from data_pipeline.scan import scan_shard
from data_pipeline.stream import _texts
from tests.data.corpus import picture

IMAGE = picture(16, 16, seed=0)
TEXT = st.text(st.characters(), max_size=8)  # halves of surrogate pairs too
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["en", "zh", "raw", "caption", "x"]), inner)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(["caption", "captions", "source", "label", "key", "url", "width", "text"])


@settings(max_examples=2000)
@given(st.dictionaries(FIELDS, VALUE) | VALUE, st.binary(max_size=12) | st.none())
def test_no_json_stops_indexing_or_a_stream(value, text):
    entries = [("a.png", IMAGE), ("a.json", json.dumps(value).encode())]
    entries += [] if text is None else [("a.txt", text), ("a.cls", text)]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    table, problems = scan_shard("shard.tar", file, "default", Rules())
    (row,) = table.to_pylist()
    assert all(count > 0 for count in problems.values())
    if row["caption_member"] >= 0:
        at, size = row["caption_offset_bytes"], row["caption_size_bytes"]
        extension = ("json", "txt")[row["caption_member"]]
        captions = captions_of(parse_metadata(file.getvalue()[at : at + size], extension))
        for language in LANGUAGES:
            assert row[f"{language}_bytes"] == [len(caption.encode()) for caption in captions[language]]
    members = {name.rpartition(".")[2]: data for name, data in entries[1:3]}
    source, captions = _texts(members, DataConfig())
    assert source in ("", row["source"]) and isinstance(name_to_int64(f"{source}/s/{captions!r}"), int)
    assert any(captions.values()) == (row["caption_member"] >= 0)

"""Fields of a json by their names, and a report that names what is left out."""

import json
import os

import numpy as np
import pytest

from cogvit.config import DataConfig
from cogvit.errors import DataError
from data_pipeline.index import load_index
from tests.data.corpus import picture, write_tar
from tools.index_shards import main

SOURCES = ("one.example", "two.example")


def write(directory):
    entries = []
    for number in range(6):
        said = {"TEXT": [f"picture {number}"], "site": SOURCES[number % 2], "source": f"https://page/{number}"}
        entries += [(f"{number}.png", picture(16, 16, seed=number)), (f"{number}.json", json.dumps(said).encode())]
    entries += [("thin.png", picture(200, 9, seed=9)), ("lost.json", b"{}"), ("bad.png", b"no picture")]
    entries += [("odd.png", picture(16, 16, seed=77)), ("odd.json", json.dumps({"TEXT": 7}).encode())]
    return write_tar(directory / "shard-00.tar", entries)


def test_captions_and_sources_go_by_the_fields_that_are_named(tmp_path, capsys):
    write(tmp_path)
    assert main([str(tmp_path), "--caption-field", "TEXT", "--source-field", "site"]) == 0
    index = load_index(str(tmp_path))
    assert index.sources == ("default", *SOURCES) and len(index.captioned()) == 6
    assert "captions of a form that is not understood" in capsys.readouterr().out
    assert main([str(tmp_path), "--source-field", "none", "--source", "web"]) == 0
    assert load_index(str(tmp_path)).sources == ("web",)
    assert DataConfig().caption_field == "" and DataConfig().source_field == "source"


def test_the_report_names_each_that_is_left_out(tmp_path, capsys):
    shard = write(tmp_path)
    assert main([str(tmp_path), "--caption-field", "TEXT", "--report", str(tmp_path / "left.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "left.jsonl").open()]
    assert {row["shard"] for row in rows} == {str(shard)}
    reasons = {row["name"]: row["reason"] for row in rows}
    assert "aspect" in reasons["thin.png"] and "no known image format" in reasons["bad.png"]
    assert reasons["lost"] == "captions without an image" and "odd" in reasons
    printed = capsys.readouterr().out
    counts = [int(line.split()[2]) for line in printed.splitlines() if line.startswith("left out:")]
    assert np.sum(counts) == len(rows)
    assert main([str(tmp_path), "--report", str(tmp_path / "none" / "x")]) == 2


def test_a_copy_of_a_shard_with_another_time_is_told_in_words(tmp_path):
    """transformers#28862's kin: what changed is said, and how a copy keeps what counts."""
    shard = write(tmp_path)
    assert main([str(tmp_path)]) == 0
    os.utime(shard, (1, 1))
    with pytest.raises(DataError, match=r"its size is the same and its time is not: copy it with its time") as failure:
        load_index(str(tmp_path))
    assert "{" not in str(failure.value)
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"bytes then, .* now"):
        load_index(str(tmp_path))

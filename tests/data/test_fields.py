"""Fields of a json by their names, and a report that names what is left out."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from cogvit.config import DataConfig
from cogvit.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.shards import ShardReader, _digest
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


@pytest.mark.parametrize("together", [True, False])
def test_a_copy_of_a_shard_with_another_time_is_the_same_shard(tmp_path, together):
    """transformers#28862's kin: by the corpus file, by the shard's own index, and when a reader opens it."""
    shard = write(tmp_path)
    assert main([str(tmp_path)]) == 0
    if not together:
        next(tmp_path.glob("corpus-*")).unlink()
    os.utime(shard, (1, 1))
    index = load_index(str(tmp_path))
    row, reader = int(index.rows_of()[0]), ShardReader()
    ref = index.ref(row)
    assert reader.read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version) == picture(16, 16, seed=0)
    caption = shard.read_bytes().replace(b"picture 0", b"another 0")  # no image's bytes, and no size
    shard.write_bytes(caption)
    with pytest.raises(DataError, match="its size is the same, its time and bytes are not") as failure:
        load_index(str(tmp_path))
    assert "{" not in str(failure.value)
    with pytest.raises(DataError, match="changed after it was indexed"):
        ShardReader().read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)
    shard.write_bytes(caption + bytes(512))
    with pytest.raises(DataError, match=r"bytes then, .* now"):
        load_index(str(tmp_path))


def test_a_copy_is_compared_once_however_often_it_is_opened(tmp_path, monkeypatch):
    shards = [write_tar(tmp_path / f"{n}.tar", [("a.png", picture(16, 16, seed=n))]) for n in range(2)]
    assert main([str(tmp_path)]) == 0
    index = load_index(str(tmp_path))
    for shard in shards:
        os.utime(shard, (1, 1))
    compared = []
    monkeypatch.setattr("data_pipeline.shards._digest", lambda descriptor: compared.append(1) or _digest(descriptor))
    monkeypatch.setattr("data_pipeline.shards.MAX_OPEN_SHARDS", 1)
    reader = ShardReader()
    for row in index.rows_of().tolist() * 3:
        ref = index.ref(row)
        reader.read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)
    assert len(compared) == 2


def test_what_is_advised_for_two_shards_of_one_name_works(tmp_path, capsys):
    for place in "ab":
        said = json.dumps({"source": "web"}).encode()
        write_tar(tmp_path / place / "s.tar", [("0.png", picture(16, 16, seed=ord(place))), ("0.json", said)])
    pattern = f"{tmp_path}/*/s.tar"
    assert main([pattern]) == 2
    told = capsys.readouterr().err
    assert "both have samples of source 'web'" in told and "--source-field none" in told
    assert main([str(tmp_path / "b"), "--source", "other"]) == 0  # alone it changes nothing: the json names one
    with pytest.raises(DataError, match="both have samples of source 'web'"):
        load_index(pattern)
    assert main([str(tmp_path / "b"), "--source", "other", "--source-field", "none"]) == 0
    assert load_index(pattern).sources == ("other", "web") and len(load_index(pattern)) == 2


def test_damaged_exif_is_counted_and_the_image_is_taken(tmp_path, capfd):
    good = Image.Exif()
    good[0x0112] = 6
    exif = {"damaged": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", "good": good.tobytes()}
    entries = [(f"{name}.jpg", picture(8, 16, 0, "JPEG", exif=data)) for name, data in exif.items()]
    write_tar(tmp_path / "s.tar", [*entries, ("none.png", picture(16, 16, seed=1))])
    assert main([str(tmp_path), "--report", str(tmp_path / "left.jsonl")]) == 0
    said = capfd.readouterr()
    assert "left out: 1 x damaged EXIF (the image is taken as it lies)" in said.out and "Warning" not in said.err
    assert [json.loads(line)["name"] for line in (tmp_path / "left.jsonl").open()] == ["damaged.jpg"]
    assert len(load_index(str(tmp_path))) == 3

"""Which samples of a corpus are used: by a user's rule, and once of equal images."""

import numpy as np
import pyarrow as pa
import pytest

from cogvit.errors import ConfigError, DataError
from data_pipeline.index import load_index
from data_pipeline.table import read_table, write_table
from tests.data.corpus import indexed, keys_of, members, picture, table_of, write_tar
from tests.data.test_index import build


def test_equal_images_are_used_once_when_asked(tmp_path):
    image = picture(8, 8, 0)
    for shard in range(2):
        entries = [("same.png", image), (f"own{shard}.png", picture(8, 8, 1 + shard)), ("twin.png", image)]
        write_tar(tmp_path / f"s-{shard}.tar", entries)
    build(tmp_path)
    assert len(load_index(str(tmp_path))) == 6
    index = load_index(str(tmp_path), duplicates="drop")
    assert keys_of(index) == ["same", "own0", "own1"]
    assert "left out: 3 x a second copy of an image" in index.describe()


def test_of_equal_images_the_first_with_a_caption_is_used(tmp_path):
    image = picture(8, 8, 0)
    entries = [("mute.png", image), ("own.png", picture(8, 8, 1))]
    entries += [*members("said", image, caption="x"), *members("twin", image, caption="y")]
    write_tar(tmp_path / "s.tar", entries)
    build(tmp_path)
    assert keys_of(load_index(str(tmp_path), duplicates="drop")) == ["own", "said"]


def test_many_sources_are_told_in_one_short_line(tmp_path):
    entries = [part for n in range(40) for part in members(f"{n:02d}", picture(8, 8, n), source=f"http://{n:02d}")]
    entries += members("40", picture(8, 8, 40), source="http://39")
    write_tar(tmp_path / "s.tar", entries)
    build(tmp_path)
    told = load_index(str(tmp_path)).describe()
    assert "http://00 1, " in told and "http://39 2 and 20 more; captions" in told


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("width_px > 12 and source != 'blue'", lambda row, key: row["width_px"] > 12 and row["source"] == 1),
        ("not (height_px * width_px < 100) or format in ('jpeg', 'webp')", lambda row, key: True),
        ("key in ['0003', '0005']", lambda row, key: key in ("0003", "0005")),
        ("captions_zh >= 1", lambda row, key: row["num_captions"][1] >= 1),
    ],
)
def test_rules_over_the_index(tmp_path, rule, kept):
    every = indexed(tmp_path)
    wanted = [kept(row, key) for row, key in zip(table_of(every), keys_of(every), strict=True)]
    if "format" in rule:
        wanted = [h * w >= 100 or n % 3 for n, (h, w) in enumerate(table_of(every)[["height_px", "width_px"]].tolist())]
    index = load_index(str(tmp_path), where=rule)
    assert 0 < len(index) < 60
    assert table_of(index)["sample_id"].tolist() == table_of(every)["sample_id"][np.array(wanted, bool)].tolist()
    assert index.rows_of().tolist() == np.flatnonzero(wanted).tolist()
    assert f"left out: {60 - len(index)} x data.where" in index.describe()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("width_px >", "is no expression: invalid syntax"),
        ("breadth > 3", "does not understand 'breadth'; columns are key, source, format"),
        ("__import__('os').system('x')", "does not understand"),
        ("1 < 2", "does not compare columns"),
        ("source > 3", "does not fit the columns"),
        ("key in (1, 2)", "does not fit the columns"),
        ("width_px + 1", "does not fit the columns"),
        ("source in (1, 'x')", "does not compare columns"),
        ("1 / 0 < width_px", "does not compare columns"),
        ("width_px < 99999999999999999999", "does not compare columns"),
        ("source == '\\ud800'", "does not compare columns"),
        ("source in 'red'", r"looks in 'red', which is no list; write \('red',\)"),
    ],
)
def test_rules_that_mean_nothing_are_refused(tmp_path, rule, message):
    indexed(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_index(str(tmp_path), where=rule)


def test_a_rule_that_leaves_nothing_is_named(tmp_path):
    indexed(tmp_path)
    with pytest.raises(DataError, match=r"hold no usable image; --data\.where 'width_px > 999' leaves none"):
        load_index(str(tmp_path), where="width_px > 999")


def test_images_are_equal_by_both_of_their_hashes(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{n}.png", picture(8, 8, n % 3)) for n in range(6)])
    build(tmp_path)
    path = str(tmp_path / "s.tar.parquet")
    table, facts = read_table(path)
    collided = table.set_column(table.schema.get_field_index("content_hash"), "content_hash", pa.array([7] * 6))
    write_table(path, collided, facts)
    next(tmp_path.glob("corpus-*.cogvit")).unlink()
    assert keys_of(load_index(str(tmp_path), duplicates="drop")) == ["0", "1", "2"]

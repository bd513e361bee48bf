"""The index: what it records of each sample, what it leaves out and counts, and when it is refused."""

import json
import os

import fsspec
import numpy as np
import pytest

from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from data_pipeline.caption import CaptionChoice
from data_pipeline.index import build_index, load_index
from data_pipeline.rules import Rules
from data_pipeline.shards import ShardReader
from data_pipeline.table import VERSION, index_path, read_table, write_table
from tests.data.corpus import ANY_SIZE, indexed, keys_of, members, picture, table_of, write_corpus, write_tar
from tools.index_shards import main


def build(pattern, **options):
    return list(build_index(str(pattern), **({"rules": ANY_SIZE} | options)))


def test_index_records_every_sample(tmp_path):
    index = indexed(tmp_path, num_shards=2, per_shard=12)
    assert len(index) == 24
    assert index.sources == ("blue", "red")
    assert keys_of(index) == [f"{number:04d}" for number in range(12)] * 2
    for row in range(24):
        ref = index.ref(row)
        height_px, width_px = (int(table_of(index)[name][row]) for name in ("height_px", "width_px"))
        expected = picture(6 + 5 * (row % 4), 5 + 7 * (row % 3), row, ("PNG", "JPEG", "WEBP")[row % 3])
        assert (height_px, width_px) == (6 + 5 * (row % 4), 5 + 7 * (row % 3))
        assert ShardReader().read(ref.shard, ref.offset_bytes, ref.size_bytes) == expected
        source = "red" if row % 5 else "blue"
        assert ref.sample_id == name_to_int64(f"{source}/train-{row // 12:05d}.tar/{row % 12:04d}")
        assert table_of(index)["num_captions"][row].tolist() == [2, row % 2]


def test_index_knows_the_length_of_every_caption(tmp_path):
    index = indexed(tmp_path, num_shards=2, per_shard=12)
    rows = np.array([1, 5, 23])
    english = CaptionChoice(np.zeros(3, np.int64), np.array([0, 1, 0]))
    chinese = CaptionChoice(np.ones(3, np.int64), np.zeros(3, np.int64))
    texts = ["thing " * 2, "number 5", "thing " * 4]
    assert index.chosen_bytes(rows, english).tolist() == [len(text.strip()) for text in texts]
    assert index.chosen_bytes(rows, chinese).tolist() == [len(f"第{row}个".encode()) for row in rows]
    odd = load_index(str(tmp_path), where="captions_zh > 0").rows_of()[[0, 2, 11]]
    assert odd.tolist() == rows.tolist()


def test_img2dataset_and_txt_layouts(tmp_path):
    image = picture(8, 8, 0)
    entries = [
        *members("0", image, caption="from img2dataset", url="u"),
        ("1.png", image),
        ("1.txt", b"only a txt"),
        *members("2", image, width=8),
        ("2.txt", b"json without captions"),
        ("3.png", image),
    ]
    write_tar(tmp_path / "00000.tar", entries)
    build(tmp_path, source="laion")
    index = load_index(str(tmp_path))
    assert index.sources == ("laion",)
    assert table_of(index)["num_captions"][:, 0].tolist() == [1, 1, 1, 0]
    assert len(index.captioned()) == 3
    assert keys_of(index.captioned()) == ["0", "1", "2"]


def test_labels_lie_in_json_or_cls_with_or_without_captions(tmp_path):
    entries = [
        *members("0", picture(8, 8, 0), label=3),
        ("1.png", picture(8, 8, 1)), ("1.cls", b"12\n"),
        *members("2", picture(8, 8, 2), caption="both", label=0), ("2.cls", b"7"),
        *members("3", picture(8, 8, 3), label=True), ("3.txt", b"a txt beside"), ("3.cls", b"5"),
        *members("4", picture(8, 8, 4), label=-2, caption="x"),
        ("5.png", picture(8, 8, 5)), ("5.cls", b"cat"),
    ]  # fmt: skip
    write_tar(tmp_path / "s.tar", entries)
    (report,) = build(tmp_path)
    index = load_index(str(tmp_path))
    assert table_of(index)["label"].tolist() == [3, 12, 0, 5, -1, -1]
    assert keys_of(index.captioned()) == ["2", "3", "4"]
    assert report.problems == {
        "a cls is no whole number": 1,
        "a sample's captions are empty or missing in its json or txt (it serves stage 1)": 1,
    }


def test_an_index_of_another_version_is_made_anew(tmp_path):
    write_tar(tmp_path / "s.tar", members("0", picture(8, 8, 0), label=3))
    build(tmp_path)
    path = tmp_path / "s.tar.parquet"
    table, facts = read_table(str(path))
    facts["made_from"]["version"] = VERSION - 1
    write_table(str(path), table.drop_columns(["label"]), facts)
    next(tmp_path.glob("corpus-*.cogvit")).unlink()  # such an index is older than these files
    with pytest.raises(DataError, match=rf"version {VERSION - 1}.*python -m tools.index_shards"):
        load_index(str(tmp_path))
    (report,) = build(tmp_path)
    assert not report.reused and table_of(load_index(str(tmp_path)))["label"].tolist() == [3]


def test_what_is_left_out_is_counted(tmp_path):
    image = picture(8, 8, 0)
    entries = [
        *members("good", image, captions={"en": ["x"]}),
        ("bad.png", b"no image"),
        ("bad.txt", b"orphan"),
        ("good.jpg", picture(8, 8, 1, "JPEG")),
        ("latin.png", image),
        ("latin.txt", b"\xe9t\xe9"),
        ("broken.png", image),
        ("broken.json", b"{"),
        ("evil\udcff.png", image),
        ("mask.seg.png", image),
        ("photo.v1.jpg", picture(8, 8, 2, "JPEG")),
        ("photo.v1.txt", b"of a key that ends at its first dot"),
        ("good.mp3", b"neither"),
        ("deep.png", image),
        ("deep.json", b"[" * 200_000),
    ]
    write_tar(tmp_path / "s.tar", entries)
    (report,) = build(tmp_path)
    assert report.num_images == 4
    assert sum(report.problems.values()) == 14
    assert report.problems["an image with a second dot in its name (keys end at the first one)"] == 2
    assert report.problems["neither an image, a video nor a caption by its name"] == 2
    assert report.problems["a sample's json does not parse"] == 2
    assert report.problems["a second image of the same key"] == 1
    assert report.problems["captions without an image"] == 1
    assert report.problems["a name is not printable UTF-8"] == 1
    assert report.problems["a caption is not UTF-8: invalid continuation byte"] == 1
    assert report.problems["a sample's captions are empty or missing in its json or txt (it serves stage 1)"] == 3


def test_rules_leave_out_what_they_say(tmp_path):
    sizes = {
        "good": (12, 70),
        "small": (7, 12),
        "wide": (12, 73),
        "tall": (300, 9),
        "large": (40, 40),
        "sliver": (1, 3000),
    }
    entries = [(f"{name}.png", picture(*size, seed)) for seed, (name, size) in enumerate(sizes.items())]
    entries += [("good.txt", b"a caption"), ("blank.png", picture(12, 12, 9)), ("blank.txt", b" ")]
    write_tar(tmp_path / "s.tar", entries)
    (report,) = build(tmp_path, rules=Rules(max_pixels=1500, captions="required"))
    assert keys_of(load_index(str(tmp_path))) == ["good"]
    assert report.problems == {
        "a side is shorter than 8 px": 2,
        "the aspect ratio is beyond 6": 2,
        "more than 1,500 pixels": 1,
        "a sample's captions are empty or missing in its json or txt (it serves stage 1)": 1,
        "no caption": 1,
    }
    assert [one.reused for one in build(tmp_path, rules=Rules(max_pixels=1500, captions="required"))] == [True]
    (again,) = build(tmp_path)  # other rules: another index
    assert not again.reused and again.num_images == 7


def test_second_run_reuses_and_a_changed_shard_is_refused_until_it_is_indexed_again(tmp_path):
    pattern = write_corpus(tmp_path, num_shards=2)
    assert [report.reused for report in build(pattern)] == [False, False]
    assert [report.reused for report in build(pattern)] == [True, True]
    before = load_index(pattern).content_hash()
    write_tar(tmp_path / "train-00001.tar", members("new", picture(9, 9, 9)))
    with pytest.raises(DataError, match=r"train-00001\.tar changed after it was indexed.*tools\.index_shards"):
        load_index(pattern)
    assert [report.reused for report in build(pattern)] == [True, False]
    assert load_index(pattern).content_hash() != before


def test_touched_shard_is_the_same_before_and_after_indexing_it_again(tmp_path):
    before = indexed(tmp_path).content_hash()
    os.utime(tmp_path / "train-00000.tar", (1, 1))
    assert load_index(str(tmp_path)).content_hash() == before
    build(tmp_path)
    assert load_index(str(tmp_path)).content_hash() == before


def test_content_hash_survives_a_move(tmp_path):
    one, two = indexed(tmp_path / "a"), indexed(tmp_path / "b")
    assert one.content_hash() == two.content_hash()


def test_missing_index_names_the_command(tmp_path):
    pattern = write_corpus(tmp_path)
    with pytest.raises(DataError, match=f"run python -m tools.index_shards '{pattern}' --index-dir /x"):
        load_index(pattern, "/x")


def test_index_dir_keeps_the_shards_directory_clean(tmp_path):
    pattern = write_corpus(tmp_path / "shards")
    build(pattern, index_dir=str(tmp_path / "index"))
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".tar"}
    assert len(load_index(pattern, str(tmp_path / "index"))) == 60


def test_two_shards_of_one_name_do_not_share_an_index_dir(tmp_path):
    for name in "ab":
        write_corpus(tmp_path / name)
    with pytest.raises(DataError, match="share a file name"):
        build(f"{tmp_path}/*/*.tar", index_dir=str(tmp_path))


def test_samples_of_one_identity_are_refused(tmp_path):
    for name in "ab":
        indexed(tmp_path / name)
    with pytest.raises(DataError, match="--source"):
        load_index(f"{tmp_path}/*/*.tar")


def test_keys_that_hash_to_one_number_are_counted_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.scan.name_to_int64", lambda name: len(name))
    write_tar(tmp_path / "s.tar", [(f"{key}.png", picture(8, 8, 1)) for key in ("a", "bb", "c")])
    (report,) = build(tmp_path)
    assert report.problems["its key hashes to the number of another key of the shard"] == 1
    assert keys_of(load_index(str(tmp_path))) == ["a", "bb"]


def test_foreign_parquet_is_not_taken_for_an_index(tmp_path):
    pattern = write_corpus(tmp_path, num_shards=1)
    (tmp_path / "train-00000.tar.parquet").write_bytes(b"something else")
    with pytest.raises(DataError, match="is no index of this version"):
        load_index(pattern)


def test_shards_without_images_are_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.txt", b"alone")])
    build(tmp_path)
    with pytest.raises(DataError, match="no usable image"):
        load_index(str(tmp_path))


def test_remote_shards_are_indexed_beside_themselves(tmp_path):
    write_corpus(tmp_path, num_shards=1)
    store = fsspec.filesystem("memory")
    store.pipe_file("/corpus/s.tar", (tmp_path / "train-00000.tar").read_bytes())
    assert index_path("memory://corpus/s.tar") == "memory://corpus/s.tar.parquet"
    build("memory://corpus")
    index = load_index("memory://corpus/*.tar")
    ref = index.ref(3)
    assert ref.shard.startswith("memory://")
    assert ShardReader().read(ref.shard, ref.offset_bytes, ref.size_bytes) == picture(21, 5, 3)
    store.rm("/corpus", recursive=True)


def test_command_indexes_and_reports(tmp_path, capsys):
    pattern = write_corpus(tmp_path, num_shards=2)
    write_tar(tmp_path / "train-00002.tar", [("bad.png", b"junk"), *members("ok", picture(4, 4, 4), caption="c")])
    sizes = ["--min-side-px", "1"]
    assert main([pattern, f"--index-dir={tmp_path}/index", "--source", "mine", *sizes]) == 0
    out = capsys.readouterr().out
    assert "[2/3] train-00001.tar: 20 images, indexed" in out
    assert "left out: 1 x no known image format, or a damaged header" in out
    assert "41 images in 3 shards; sources: blue 8, mine 1, red 32; captions: en 81, zh 20" in out


def test_damaged_shards_are_named_and_the_others_indexed(tmp_path, capsys):
    pattern = write_corpus(tmp_path, num_shards=4)
    for number in (0, 2):
        (tmp_path / f"train-0000{number}.tar").write_bytes(b"no tar" * 400)
    assert main([pattern, "--min-side-px", "1"]) == 2
    printed = capsys.readouterr()
    assert "[1/4]" in printed.out and "[3/4]" in printed.out and printed.out.count("is not a plain tar") == 2
    assert printed.err.startswith("error: 2 of 4 shards cannot be indexed: ") and printed.err.count("\n") == 1
    assert "train-00000.tar is not a plain tar" in printed.err
    assert len(load_index(f"{pattern}/train-0000{{1,3}}.tar")) == 40


@pytest.mark.timeout(180)
def test_workers_write_what_one_process_writes_and_report_a_bad_shard(tmp_path, capsys):
    pattern = write_corpus(tmp_path, num_shards=5)
    whole = (tmp_path / "train-00004.tar").read_bytes()
    (tmp_path / "train-00004.tar").write_bytes(b"no tar" * 400)
    command = [pattern, "--min-side-px", "1", f"--index-dir={tmp_path}/one"]
    assert main([*command, "--workers", "2"]) == 2
    assert "train-00004.tar is not a plain tar" in capsys.readouterr().err
    (tmp_path / "train-00004.tar").write_bytes(whole)
    assert main(command) == 0  # goes on where the workers stopped
    assert ": 20 images, fits" in capsys.readouterr().out
    assert main([pattern, "--min-side-px", "1", f"--index-dir={tmp_path}/two"]) == 0
    one, two = (load_index(pattern, str(tmp_path / name)) for name in ("one", "two"))
    assert one.content_hash() == two.content_hash()
    assert table_of(one).tobytes() == table_of(two).tobytes()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--help"],
        ["x", "y"],
        ["x", "--nope"],
        ["x", "--source"],
        ["x", "--workers", "no"],
        ["x", "--max-aspect", "wide"],
        ["x", "--captions", "some"],
        ["x", "--max-aspect", "nan"],
        ["x", "--min-side-px", "0"],
        ["x", "--max-pixels", "200000000"],
        ["/nowhere/*.tar"],
    ],
)
def test_command_explains_itself_and_fails_in_one_line(argv, capsys):
    assert main(argv) == (0 if argv == ["--help"] else 2)
    printed = capsys.readouterr()
    if argv and argv != ["--help"]:
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    else:
        assert "--index-dir DIR" in printed.out


def test_command_refuses_a_shard_that_is_not_a_tar(tmp_path, capsys):
    (tmp_path / "s.tar").write_text(json.dumps({"not": "a tar"}))
    assert main([str(tmp_path)]) == 2
    assert "s.tar is not a plain tar" in capsys.readouterr().err

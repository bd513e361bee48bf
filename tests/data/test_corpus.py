"""The corpus file: what it costs to write and to open, whose it is, and when it is refused."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cogvit.errors import ConfigError, DataError
from data_pipeline import merge
from data_pipeline.corpus import corpus_place, open_corpus
from data_pipeline.corpus_form import PRELUDE, VERSION
from data_pipeline.index import load_index
from data_pipeline.loader import start_position
from data_pipeline.merge import _Writer
from data_pipeline.shards import ShardReader
from tests.data.corpus import indexed, keys_of, members, picture, run_config, table_of, write_corpus, write_tar
from tests.data.test_index import build
from tests.disk import files_of_at_most
from tools.index_shards import main

STRACE = shutil.which("strace")


def file_of(directory: Path) -> Path:
    (found,) = directory.glob("corpus-*.cogvit")
    return found


def test_a_directory_stands_for_its_shards_and_moves_with_its_corpus_file(tmp_path, monkeypatch):
    before = indexed(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    places = {corpus_place(pattern) for pattern in ("a", "a/*.tar", "./a/", str(tmp_path / "a"))}
    assert {place.path for place in places} == {str(file_of(tmp_path / "a"))}
    assert corpus_place("a/{0..3}.tar") not in places
    (tmp_path / "a").rename(tmp_path / "b")
    after = load_index(str(tmp_path / "b"))
    assert after.corpus.path and after.content_hash() == before.content_hash()
    ref = after.ref(7)
    assert ref.shard == str(tmp_path / "b" / "train-00000.tar")
    assert len(ShardReader().read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)) == ref.size_bytes


def test_without_a_corpus_file_a_few_shards_are_joined(tmp_path):
    whole = indexed(tmp_path)
    part = load_index(str(tmp_path / "train-0000{0,2}.tar"))
    assert not part.corpus.path and len(part) == 40
    kept = np.r_[0:20, 40:60]
    assert table_of(part)["sample_id"].tolist() == table_of(whole)["sample_id"][kept].tolist()


def test_many_shards_without_a_corpus_file_are_refused(tmp_path, monkeypatch):
    indexed(tmp_path)
    monkeypatch.setattr("data_pipeline.index.JOINED_AT_START", 1)
    with pytest.raises(
        DataError, match=r"the 2 shards of .* have no corpus file .*; run python -m tools\.index_shards"
    ):
        load_index(str(tmp_path / "train-0000{0,2}.tar"))


def test_new_and_changed_shards_cost_their_own_samples(tmp_path, monkeypatch):
    pattern = write_corpus(tmp_path, num_shards=4, per_shard=60)
    build(pattern)
    added = []
    plain = _Writer.add
    monkeypatch.setattr(
        _Writer, "add", lambda self, entry, *rest: added.append(entry.path) or plain(self, entry, *rest)
    )
    path = file_of(tmp_path)
    start, inode = path.read_bytes()[PRELUDE.size : 5_000], path.stat().st_ino
    build(pattern)
    assert not added and path.read_bytes()[PRELUDE.size : 5_000] == start
    mapped = load_index(pattern)
    before = table_of(mapped).tobytes()
    write_tar(tmp_path / "train-00004.tar", members("new", picture(9, 9, 9)))
    write_tar(tmp_path / "train-00001.tar", members("other", picture(9, 9, 8)))
    build(pattern)
    assert sorted(added) == [str(tmp_path / f"train-0000{number}.tar") for number in (1, 4)]
    assert path.stat().st_ino == inode and path.read_bytes()[PRELUDE.size : 5_000] == start  # appended to
    assert table_of(mapped).tobytes() == before  # a run that has it open sees what it saw
    grown = load_index(pattern)
    assert keys_of(grown)[60] == "other" and keys_of(grown)[-1] == "new" and len(grown) == 182
    path.unlink()
    build(pattern)
    anew = load_index(pattern)
    assert anew.content_hash() == grown.content_hash() and keys_of(anew) == keys_of(grown)
    fields = [name for name in anew.take(np.arange(1)).dtype.names if name != "source"]
    assert (table_of(anew)[fields] == table_of(grown)[fields]).all()


def test_a_file_that_is_mostly_dead_is_written_anew(tmp_path):
    write_corpus(tmp_path, num_shards=4)
    build(tmp_path)
    size = file_of(tmp_path).stat().st_size
    for round_ in range(6):
        for number in range(4):
            os.utime(tmp_path / f"train-0000{number}.tar", (round_, round_))
        build(tmp_path)
        assert file_of(tmp_path).stat().st_size < 3 * size
    assert len(load_index(str(tmp_path))) == 80


def test_a_writer_that_dies_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    before = indexed(tmp_path).content_hash()
    write_tar(tmp_path / "train-00009.tar", members("new", picture(9, 9, 9)))

    def full(self, part):
        self.file.write(b"half a tail")
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_Writer, "finish", full)
    with pytest.raises(ConfigError, match=r"cannot write .* \(No space left on device\); make room, or pass"):
        build(tmp_path)
    assert load_index(str(tmp_path)).content_hash() == before
    file_of(tmp_path).unlink()
    with pytest.raises(ConfigError, match="make room"):
        build(tmp_path)
    assert not list(tmp_path.glob("corpus-*"))


def test_two_writers_at_once_overwrite_nothing(tmp_path, monkeypatch):
    """The second one had looked at the file before the first one was done."""
    write_corpus(tmp_path)
    build(tmp_path)
    write_tar(tmp_path / "train-00009.tar", members("new", picture(9, 9, 9)))

    def seen_before_the_other_wrote(file, path):
        monkeypatch.undo()
        build(tmp_path)

    monkeypatch.setattr(merge, "_lock", seen_before_the_other_wrote)
    with pytest.raises(DataError, match=r"another process has just written .*corpus-.*; run the command again"):
        build(tmp_path)
    index = load_index(str(tmp_path))
    index.corpus.check_shards(range(index.corpus.num_shards))
    build(tmp_path)
    assert load_index(str(tmp_path)).content_hash() == index.content_hash()


@pytest.mark.parametrize("place", ["rows", "keys", "list", "prelude"])
def test_a_flipped_bit_is_refused(tmp_path, place):
    index = indexed(tmp_path)
    path, size = file_of(tmp_path), file_of(tmp_path).stat().st_size
    block = int(index.corpus.block[1]) * 44
    key_bytes = index.corpus._sections(1).keys
    at = {"rows": block + 100, "keys": block + key_bytes + 2, "list": size - 700, "prelude": 20}[place]
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name} is damaged: .*changed.*; remove it and run"):
        table_of(found := load_index(str(tmp_path)))
        found.name(25)
    assert len(keys_of_first(tmp_path)) == 20 if place in ("rows", "keys") else True


def keys_of_first(directory: Path) -> list[str]:
    """Other shards are as they were."""
    return open_corpus(corpus_place(str(directory))).keys(0)


def test_a_file_that_is_cut_short_or_of_another_version_or_kind_is_refused(tmp_path):
    indexed(tmp_path)
    path = file_of(tmp_path)
    data = path.read_bytes()
    for size in (0, 40, 5000, len(data) - 200):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=rf"is damaged: it is cut short at {size:,}.* bytes"):
            load_index(str(tmp_path))
    path.write_bytes(data[:8] + (VERSION + 1).to_bytes(4, "little") + data[12:])
    with pytest.raises(DataError, match=rf"has version {VERSION + 1}, this program reads {VERSION}; run"):
        load_index(str(tmp_path))
    path.write_bytes(b"something else" * 100)
    with pytest.raises(DataError, match="does not begin as a corpus file"):
        load_index(str(tmp_path))
    build(tmp_path)
    assert len(load_index(str(tmp_path))) == 60


def test_a_shard_that_is_newer_than_the_file_is_refused_when_it_is_read(tmp_path):
    """Not all are looked at when a run starts; the reader compares each when it opens it."""
    index = indexed(tmp_path, num_shards=12, per_shard=3)
    newer = tmp_path / "train-00005.tar"
    newer.write_bytes(newer.read_bytes().replace(b"thing", b"other"))
    os.utime(newer, (1, 1))
    assert len(load_index(str(tmp_path))) == 36
    ref = index.ref(15)
    with pytest.raises(DataError, match=r"train-00005\.tar changed after it was indexed; restore it or run"):
        ShardReader().read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)


def test_parts_made_apart_become_what_one_machine_makes(tmp_path, capsys):
    pattern = write_corpus(tmp_path, num_shards=5)
    flags = [pattern, "--min-side-px", "1"]
    assert main([*flags, "--index-dir", str(tmp_path / "one")]) == 0
    two = [*flags, "--index-dir", str(tmp_path / "two")]
    for number in (2, 0, 1):
        assert main([*two, "--part", f"{number}/3"]) == 0
        assert "images in" not in capsys.readouterr().out.splitlines()[-1]
    assert main([*two, "--merge", "3"]) == 0
    assert "100 images in 5 shards" in capsys.readouterr().out
    one, both = (load_index(pattern, str(tmp_path / name)) for name in ("one", "two"))
    assert one.content_hash() == both.content_hash() and keys_of(one) == keys_of(both)
    assert not list((tmp_path / "two").glob("*part*"))
    assert main(two) == 0  # and goes on from there
    assert load_index(pattern, str(tmp_path / "two")).content_hash() == one.content_hash()


def test_parts_that_lack_or_repeat_something_are_refused(tmp_path, capsys):
    pattern = write_corpus(tmp_path, num_shards=4)
    flags = [pattern, "--min-side-px", "1"]
    assert main([*flags, "--part", "0/2"]) == 0
    assert main([*flags, "--merge", "2"]) == 2
    assert "part 1 of 2, " in (said := capsys.readouterr().err) and "--part 1/2" in said
    write_tar(tmp_path / "train-00000a.tar", members("new", picture(9, 9, 9)))
    (tmp_path / "train-00003.tar").unlink()
    assert main([*flags, "--part", "1/2"]) == 0
    assert main([*flags, "--merge", "2"]) == 2
    assert "train-00001.tar: its directory changed between them" in capsys.readouterr().err
    for wrong in (["--part", "2/2"], ["--part", "x"], ["--merge", "0"], ["--merge", "2", "--part", "0/2"]):
        assert main([*flags, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_corpus_file_without_room_is_refused_and_the_indexes_stay(tmp_path, capsys):
    pattern = write_corpus(tmp_path, num_shards=3)
    assert main([pattern, "--min-side-px", "1"]) == 0
    (corpus_file,) = tmp_path.glob("corpus*.cogvit")
    corpus_file.unlink()
    with files_of_at_most(6000):
        assert main([pattern, "--min-side-px", "1"]) == 2
    assert f"cannot write {corpus_file} (File too large)" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.parquet"))) == 3 and not list(tmp_path.glob("corpus*.cogvit"))


def test_a_selection_is_made_once_and_again_where_it_is_damaged(tmp_path, monkeypatch):
    indexed(tmp_path)
    rule = {"where": "width_px > 12", "duplicates": "drop"}
    first = load_index(str(tmp_path), **rule)
    (path,) = tmp_path.glob("*.chosen-*.arrow")
    monkeypatch.setattr("data_pipeline.select._make", None)
    assert load_index(str(tmp_path), **rule).rows_of().tolist() == first.rows_of().tolist()
    monkeypatch.undo()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert load_index(str(tmp_path), **rule).rows_of().tolist() == first.rows_of().tolist()
    assert path.read_bytes() != data


FILE_CALLS = "open,openat,stat,lstat,newfstatat,statx,access,readlink,getdents64"


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
def test_what_a_start_asks_of_the_file_system_does_not_depend_on_the_number_of_shards(tmp_path):
    """All that names the corpus or lies beside it."""
    counts = []
    for number in (3, 40):
        directory = tmp_path / str(number)
        indexed(directory, num_shards=number, per_shard=2)
        code = (
            "from data_pipeline.index import load_index\nfrom data_pipeline.loader import step_loader\n"
            "from tests.data.corpus import run_config\n"
            f"index = load_index({str(directory)!r}, duplicates='drop')\n"
            "step_loader(index, run_config(), reads='captions')\n"
        )
        exec(code, {})  # makes what is kept
        log = tmp_path / f"log{number}"
        command = [
            STRACE,
            "-f",
            "--seccomp-bpf",
            "-e",
            f"trace={FILE_CALLS}",
            "-o",
            str(log),
            sys.executable,
            "-c",
            code,
        ]
        subprocess.run(command, check=True, timeout=100)
        counts.append(sum(f'"{directory}' in line for line in log.read_text().splitlines()))
    assert counts[0] == counts[1] - 1 and counts[1] <= 10  # of three shards, all are compared with the file


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
def test_an_epoch_on_one_node_opens_a_shard_once(tmp_path):
    indexed(tmp_path / "shards", num_shards=20, per_shard=12)
    code = (
        "from itertools import islice\nfrom data_pipeline.index import load_index\n"
        "from data_pipeline.loader import step_batches\nfrom tests.data.corpus import run_config\n"
        "from tests.data.test_bad_input import seat_of\n"
        "sizes = dict(tokens_per_pack=400, images_per_pack=24, text_tokens_per_pack=4000)\n"
        f"config, index = run_config(global_batch_images=24, **sizes), load_index({str(tmp_path / 'shards')!r})\n"
        "batches = step_batches(index, config, seat_of(config), None, reads='captions')\n"
        "print(sum(int(micro.images.weight.sum()) for step in islice(batches, 10) for micro in step.micro))\n"
        "batches.close()\n"
    )
    log = tmp_path / "log"
    command = [STRACE, "-f", "--seccomp-bpf", "-e", "trace=open,openat", "-o", str(log), sys.executable, "-c", code]
    done = subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "240\n"
    assert 20 <= sum('.tar"' in line for line in log.read_text().splitlines()) <= 1.2 * 20


def test_the_plan_is_one_of_the_corpus_and_not_of_where_it_lies(tmp_path):
    positions = [start_position(indexed(tmp_path / name), run_config(), reads="captions") for name in "ab"]
    assert positions[0] == positions[1]

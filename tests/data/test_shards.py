"""Shards as files: patterns, byte ranges, retries and the walk through a tar, whatever the tar holds."""

import io
import os
import resource
import tarfile

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cogvit.errors import DataError
from data_pipeline.index import build_index, load_index
from data_pipeline.shards import RETRY_DELAYS_S, ShardReader, expand_shards, read_members
from tests.data.corpus import members, picture, write_tar

ENTRIES = [("a.txt", b"first"), ("b.c.json", b"{}"), ("dir.v1/c.PNG", b"x" * 1000)]


class FlakyFileSystem(MemoryFileSystem):
    """A remote store whose reads fail a few times, then work."""

    protocol = "flaky"
    failures_left = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def cat_file(self, path, start=None, end=None, **options):
        if FlakyFileSystem.failures_left > 0:
            FlakyFileSystem.failures_left -= 1
            raise OSError("connection reset")
        return super().cat_file(path, start, end, **options)


def test_pattern_is_a_directory_a_glob_a_brace_range_or_a_name(tmp_path):
    shards = [write_tar(tmp_path / f"s-{number:02d}.tar", ENTRIES) for number in (2, 0, 1)]
    write_tar(tmp_path / "other.tar.bak", ENTRIES)
    names = tuple(sorted(map(str, shards)))
    assert expand_shards(str(tmp_path)) == names
    assert expand_shards(f"{tmp_path}/s-*.tar") == names
    assert expand_shards(f"{tmp_path}/s-{{00..02}}.tar") == names
    assert expand_shards(names[1]) == names[1:2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "no shards are named"),
        ("{dir}", "holds no .tar shards"),
        ("{dir}/*.tar", "no shard matches"),
        ("{dir}/s-{{0..2}}.tar", "s-0.tar does not exist"),
        ("nowhere://x", "cannot reach nowhere://x"),
    ],
)
def test_pattern_without_shards_is_refused(tmp_path, pattern, message):
    with pytest.raises(DataError, match=message):
        expand_shards(pattern.format(dir=tmp_path))


def test_shard_named_twice_is_refused(tmp_path):
    write_tar(tmp_path / "s-0.tar", ENTRIES)
    with pytest.raises(DataError, match="twice"):
        expand_shards(f"{tmp_path}/s-{{0,0}}.tar")


def test_members_come_with_their_keys_and_places(tmp_path):
    shard = str(write_tar(tmp_path / "s.tar", ENTRIES))
    members = list(read_members(shard))
    assert [(member.key, member.extension) for member in members] == [
        ("a", "txt"),
        ("b", "c.json"),
        ("dir.v1/c", "png"),
    ]
    for member, (_, data) in zip(members, ENTRIES, strict=True):
        assert member.data == data == ShardReader().read(shard, member.offset_bytes, len(data))


def test_only_regular_members_count(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("../../etc/evil.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("/absolute/../real.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert [(member.name, member.data) for member in read_members(str(tmp_path / "s.tar"))] == [
        ("/absolute/../real.png", b"abc")
    ]


def test_long_names_are_read(tmp_path):
    name = "d" * 150 + "/" + "k" * 120 + ".png"
    assert [member.name for member in read_members(str(write_tar(tmp_path / "s.tar", [(name, b"1")])))] == [name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"this is no tar" * 100,
        lambda data: b"",
        lambda data: data[:1200],  # inside a header
        lambda data: data[:2600],  # inside a member
        lambda data: data[:3072],  # between members: no end marker
        lambda data: data[:1024] + b"\x55" * 512 + data[1536:],  # a broken header in the middle
    ],
    ids=["text", "empty", "cut in a header", "cut in a member", "no end marker", "broken header"],
)
def test_damaged_tar_is_refused(tmp_path, damage):
    shard = write_tar(tmp_path / "s.tar", ENTRIES)
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(DataError, match=r"s\.tar"):
        list(read_members(str(shard)))


def test_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="not a plain tar"):
        list(read_members(str(tmp_path / "s.tar")))


def test_vanished_and_shortened_shards_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tar: No such file"):
        ShardReader().read(str(tmp_path / "gone.tar"), 0, 1)
    shard = write_tar(tmp_path / "s.tar", ENTRIES)
    with pytest.raises(DataError, match="ends before byte 20005"):
        ShardReader().read(str(shard), 20000, 5)


def test_reader_keeps_a_bounded_number_of_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.shards.MAX_OPEN_SHARDS", 2)
    shards = [str(write_tar(tmp_path / f"{number}.tar", ENTRIES)) for number in range(5)]
    reader = ShardReader()
    for shard in shards * 2:
        assert reader.read(shard, 512, 5) == b"first"
    assert len(reader._open) == 2


def test_a_reader_closes_files_where_the_process_may_have_no_more(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = ShardReader()
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 5, hard))
    try:
        for number in [*range(12), *range(12)]:
            assert reader.read(str(tmp_path / f"{number}.tar"), 0, 1) == bytes([number])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_transient_errors_are_retried_and_lasting_ones_reported():
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    fsspec.filesystem("flaky").pipe_file("/bucket/s.bin", b"0123456789")
    FlakyFileSystem.failures_left = len(RETRY_DELAYS_S)
    assert ShardReader().read("flaky://bucket/s.bin", 2, 3) == b"234"
    FlakyFileSystem.failures_left = len(RETRY_DELAYS_S) + 1
    with pytest.raises(DataError, match="after 3 retries: connection reset"):
        ShardReader().read("flaky://bucket/s.bin", 2, 3)


@pytest.mark.parametrize("name", ["data[v2]", "a::b", "plain", "x{1,2}y", "what?"])
def test_letters_of_patterns_in_the_name_of_a_directory(tmp_path, name):
    path = str(write_tar(tmp_path / name / "s-00.tar", ENTRIES))
    assert expand_shards(str(tmp_path / name)) == (path,)
    assert expand_shards(path) == (path,)
    if "{" not in name and "::" not in name:
        assert expand_shards(f"{tmp_path / name}/*.tar") == (path,)


def test_a_directory_with_odd_letters_is_indexed_and_read(tmp_path):
    entries = members("a", picture(16, 16, seed=0), captions={"en": ["a"]})
    write_tar(tmp_path / "data[v2]" / "a::b" / "s.tar", entries)
    list(build_index(str(tmp_path / "data[v2]" / "a::b")))
    assert len(load_index(str(tmp_path / "data[v2]" / "a::b"))) == 1

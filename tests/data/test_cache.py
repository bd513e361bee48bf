"""Remote shards: indexed and read as local ones are, and copied to a bounded cache that a node's processes share."""

import fcntl
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import fsspec
import pytest

from cogvit.batch import ShardVersion
from cogvit.errors import ConfigError, DataError
from data_pipeline.cache import ShardCache
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import image_of
from data_pipeline.shards import RETRY_DELAYS_S, ShardReader, copy_shard, expand_shards, shard_name
from data_pipeline.table import index_path
from tests.data.corpus import ANY_SIZE, members, picture, run_config, table_of, write_corpus, write_tar
from tests.data.remote import serving
from tests.data.test_loader import contents, take
from tests.disk import files_of_at_most

LARGE = 1 << 30


def index_of(pattern, index_dir):
    for _ in build_index(pattern, index_dir, rules=ANY_SIZE):
        pass
    return load_index(pattern, index_dir)


@contextmanager
def remote(kind, directory):
    """The pattern of a directory's shards as a kind of remote storage has them."""
    if kind == "pipe":
        yield f"pipe:cat {directory}/train-{{00000..00002}}.tar"
    elif kind == "http":
        with serving(directory) as server:
            yield server.url("train-{00000..00002}.tar")
    else:
        store = fsspec.filesystem("memory")
        for path in directory.glob("*.tar"):
            store.pipe_file(f"/cache-test/{path.name}", path.read_bytes())
        yield "memory://cache-test/train-*.tar"
        store.rm("/cache-test", recursive=True)


@pytest.mark.parametrize("kind", ["pipe", "http", "memory"])
def test_remote_shards_train_as_local_ones_do(tmp_path, kind):
    write_corpus(tmp_path / "shards")
    config = run_config(cache_dir=str(tmp_path / "cache"), flip=True)
    local = index_of(str(tmp_path / "shards"), str(tmp_path / "local"))
    with remote(kind, tmp_path / "shards") as pattern:
        index = index_of(pattern, str(tmp_path / "index"))
        assert table_of(index).tobytes() == table_of(local).tobytes() and index.content_hash() == local.content_hash()
        (expected,), (found,) = (take(one, config, 1) for one in (local, index))

        def seen(step):
            return {key: value[1:] for key, value in contents(step).items()}  # all but where it lies

        assert seen(found) == seen(expected)
        sample = index.ref(4)
        cache = ShardCache(str(tmp_path / "cache"), LARGE)
        assert image_of(sample, 0, (8, 8), cache=cache).tolist() == image_of(local.ref(4), 0, (8, 8)).tolist()
        if kind != "pipe":  # without a cache, range by range
            (ranged,) = take(index, run_config(flip=True), 1)
            assert seen(ranged) == seen(expected)
    assert len(list((tmp_path / "cache").iterdir())) == 4  # three shards and the lock


def test_a_pipe_needs_a_place_for_its_index_and_a_cache(tmp_path):
    write_corpus(tmp_path, num_shards=1)
    (shard,) = expand_shards(f"pipe:cat {tmp_path}/train-00000.tar")
    with pytest.raises(DataError, match=r"no place beside pipe:cat .* pass --index-dir"):
        index_path(shard)
    index = index_of(shard, str(tmp_path / "index"))
    with pytest.raises(DataError, match=r"prints a shard from its start.*--data\.cache-dir"):
        take(index, run_config(), 1)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/a.tar", "a.tar"),
        ("s3://bucket/x/a.tar", "a.tar"),
        ("pipe:aws s3 cp s3://bucket/00001.tar -", "00001.tar"),
        ("pipe:zcat '/x/one.tar.gz' | tee two", "one.tar"),
    ],
)
def test_shards_have_the_name_of_their_file(path, name):
    assert shard_name(path) == name


def test_pipes_without_a_name_have_different_ones():
    one, two = (shard_name(f"pipe:produce --shard {number}") for number in (1, 2))
    assert one != two and one.endswith(".tar") and "/" not in one


def test_a_command_that_fails_is_named_with_what_it_said():
    with pytest.raises(DataError, match=r"pipe:.*after 3 retries: its command left with status 3: no such bucket"):
        copy_shard("pipe:echo no such bucket >&2; exit 3", io.BytesIO())


def test_the_index_of_a_web_servers_shards_needs_a_place(tmp_path):
    write_corpus(tmp_path, num_shards=1)
    with serving(tmp_path) as server, pytest.raises(ConfigError, match=r"cannot write http.*; pass --index-dir DIR"):
        index_of(server.url("train-00000.tar"), "")


@pytest.fixture
def web(tmp_path):
    """A server of one shard, its index, and a cache."""
    directory = tmp_path / "shards"
    write_tar(directory / "s.tar", [(f"{number}.png", picture(9, 9, number)) for number in range(6)])
    with serving(directory) as server:
        index = index_of(server.url("s.tar"), str(tmp_path / "index"))
        server.sent.clear()
        yield server, index.ref(2), ShardCache(str(tmp_path / "cache"), LARGE), directory / "s.tar"


def read(cache, sample):
    return ShardReader(cache).read(sample.shard, sample.offset_bytes, sample.size_bytes, sample.version)


def test_a_shard_is_fetched_once_and_survives_a_restart(web):
    server, sample, cache, _ = web
    assert read(cache, sample) == picture(9, 9, 2)
    script = (
        "import pickle, sys; from data_pipeline.shards import ShardReader as R; c, s = pickle.load(sys.stdin.buffer);"
    )
    script += "sys.stdout.buffer.write(R(c).read(s.shard, s.offset_bytes, s.size_bytes, s.version))"

    server.shutdown()  # nobody is asked again
    again = subprocess.run([sys.executable, "-c", script], input=pickle.dumps((cache, sample)), capture_output=True)
    assert again.stdout == picture(9, 9, 2), again.stderr
    assert server.sent == ["s.tar"]


def test_processes_that_want_a_shard_at_once_fetch_it_once(web):
    server, sample, cache, _ = web
    found = []
    threads = [threading.Thread(target=lambda: found.append(read(cache, sample))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [picture(9, 9, 2)] * 8
    assert server.sent == ["s.tar"]


def test_a_connection_that_breaks_is_tried_again(web):
    server, sample, cache, _ = web
    server.cut_next = 2
    assert read(cache, sample) == picture(9, 9, 2)
    server.cut_next = len(RETRY_DELAYS_S) + 1
    with pytest.raises(DataError, match=r"cannot read http://.*s\.tar after 3 retries"):
        copy_shard(sample.shard, io.BytesIO())


def test_a_shard_that_changed_at_its_source_is_refused_and_not_kept(web):
    _, sample, cache, path = web
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # of the same size, in the pixels of an image
    for changed in (bytes(data), path.read_bytes() + b"\0" * 512, path.read_bytes()[:-512]):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"s\.tar changed after it was indexed"):
            read(cache, sample)
    assert [entry.name for entry in os.scandir(cache.directory)] == ["lock"]


def test_a_cached_shard_is_the_one_that_was_indexed_whatever_its_source_has_now(web):
    _, sample, cache, path = web
    assert read(cache, sample) == picture(9, 9, 2)
    path.write_bytes(b"another")
    assert read(cache, sample) == picture(9, 9, 2)


def test_an_entry_that_was_cut_is_fetched_again(web):
    server, sample, cache, _ = web
    read(cache, sample)
    (entry,) = (entry for entry in os.scandir(cache.directory) if entry.name != "lock")
    os.truncate(entry.path, 100)
    assert read(cache, sample) == picture(9, 9, 2)
    assert server.sent == ["s.tar"] * 2


def test_a_server_without_ranges_needs_the_cache(web):
    server, sample, cache, _ = web
    server.takes_ranges = False
    with pytest.raises(DataError, match=r"sends whole files instead of byte ranges; pass --data\.cache-dir"):
        read(None, sample)
    assert read(cache, sample) == picture(9, 9, 2)


@pytest.fixture
def shelf(tmp_path):
    """Five shards of 10 kB behind pipes, and a function that reads one through a cache of a size."""
    versions = []
    for number in range(5):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes([number]) * 10_000)
        versions.append(copy_shard(f"pipe:cat {path}", io.BytesIO()))

    def shown(number, limit_bytes):
        cache = ShardCache(str(tmp_path / "cache"), limit_bytes)
        data = cache.read(f"pipe:cat {tmp_path}/{number}.tar; echo >> {tmp_path}/log", 5, 3, versions[number])
        assert data == bytes([number]) * 3
        return sorted(n for n, version in enumerate(versions) if (tmp_path / "cache" / version.mark).exists())

    shown.log, shown.directory, shown.versions = tmp_path / "log", tmp_path / "cache", versions
    return shown


def test_what_was_read_longest_ago_leaves_first(shelf):
    assert [shelf(number, 30_000) for number in (0, 1, 2)][-1] == [0, 1, 2]
    assert shelf(0, 30_000) == [0, 1, 2]  # read again
    assert shelf(3, 30_000) == [0, 2, 3]
    assert shelf(4, 10_000) == [4]
    assert len(shelf.log.read_text()) == 5


def test_a_shard_larger_than_the_cache_is_refused(shelf):
    with pytest.raises(DataError, match=r"10000 bytes, more than --data\.cache-bytes 9999; raise it"):
        shelf(0, 9_999)


def test_a_disk_that_fills_up_keeps_nobody_out(shelf):
    with files_of_at_most(2048), pytest.raises(DataError, match=r"--data\.cache-dir .* cannot be used: File too large"):
        shelf(0, 30_000)
    assert shelf(0, 30_000) == [0]  # the reservation is not held any more


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_fetches_counts(shelf):
    shelf(0, 30_000)
    dead, live = shelf.directory / "dead.part", shelf.directory / "live.part"
    for path in (dead, live):
        path.write_bytes(bytes(15_000))
    with live.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert shelf(1, 30_000) == [1]  # 15 kB are live, and two shards do not fit beside them
        assert not dead.exists() and live.exists()
        started = time.monotonic()
        release = threading.Timer(0.5, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        release.start()
        assert shelf(2, 20_000) == [1, 2]  # waits until there is room
        assert time.monotonic() - started >= 0.5
        release.join()
    assert not live.exists()


def test_concurrent_readers_never_exceed_the_bound(shelf):
    sizes, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            found, there = 0, {*shelf.directory.glob("*")}
            for path in there:
                try:
                    found += path.stat().st_size
                except FileNotFoundError:
                    continue
            if there == {*shelf.directory.glob("*")}:  # else files of two moments were added up
                sizes.append(found)

    shelf(0, 20_000)
    failures = []

    def work(number):
        try:
            for turn in range(4):
                shelf((number + turn) % 5, 20_000)
        except BaseException as error:
            failures.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert not failures
    assert max(sizes) <= 20_000


def test_a_cache_without_a_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--data\.cache-dir .*file cannot be used"):
        ShardCache(str(tmp_path / "file"), LARGE).read("pipe:true", 0, 1, ShardVersion(1, "x"))


def test_a_stale_index_of_a_local_shard_is_noticed_when_it_is_opened(tmp_path):
    write_tar(tmp_path / "s.tar", members("a", picture(9, 9, 1), caption="x"))
    sample = index_of(str(tmp_path), "").ref(0)
    write_tar(tmp_path / "s.tar", members("a", picture(9, 9, 2), caption="x"))
    with pytest.raises(DataError, match=r"s\.tar changed after it was indexed; restore it or run"):
        read(None, sample)
    assert ShardReader().read(sample.shard, sample.offset_bytes, sample.size_bytes)  # no version: as it is

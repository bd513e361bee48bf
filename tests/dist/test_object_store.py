"""Checkpoints in an object store keep what they promise on a disk; the disk is tested in test_checkpoint.py."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import fsspec
import pytest
import torch

from cogvit.errors import CheckpointError
from cogvit.parallel.mesh import start_mesh
from cogvit.training.checkpoint import Checkpoints, latest, list_checkpoints, read_state, weights
from cogvit.training.folder import Folder
from cogvit.training.manifest import verify
from tests.dist.runs import Case, Trace, run_config, start_engine, train
from tests.dist.test_checkpoint import EACH_STEP, START, train_in
from tests.object_store import ObjectStore, use_objects, use_s3
from tests.pool import Pool
from tests.slurm.lab import wait_for

CASE = Case(world=2, zero=2, optimizer="adamw")
pytestmark = pytest.mark.timeout(300)
Connect = tuple[Callable[[str], None], str]


@pytest.fixture(params=["objects", pytest.param("s3", marks=pytest.mark.long)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Connect, Folder]]:
    """How a process connects to a store, and a place in it."""
    if request.param == "objects":
        connect: Connect = (use_objects, str(tmp_path))
        use_objects(str(tmp_path))
        yield connect, Folder("objects://bucket/run")
        return
    absent = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"a real S3 protocol needs {', '.join(absent)}: pip install s3fs 'moto[s3,server]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(endpoint), 60, "moto's server")
        use_s3(endpoint)
        fsspec.filesystem("s3").mkdir("bucket")
        yield (use_s3, endpoint), Folder("s3://bucket/run")
    finally:
        server.kill()
        server.wait()


def answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
    except URLError:
        return False
    return True


def train_there(rank: int, world: int, connect: Connect, case: Case, folder: Folder, note: Path, until: int) -> Trace:
    """Resume if there is something to resume, train to `until`, save after every step."""
    connect[0](connect[1])
    return train_in(case, folder, note, until)


def test_a_run_resumes_from_a_store_to_the_bit(pool: Pool, store: tuple[Connect, Folder], tmp_path: Path) -> None:
    connect, folder = store
    note = tmp_path / "newest"
    straight = pool.run(train, world=2, args=(CASE, 4))[0]
    pool.run(train_there, world=2, args=(connect, CASE, folder, note, 2))
    assert note.read_text() == "step_00000002\n"
    resumed = pool.run(train_there, world=2, args=(connect, CASE, folder, note, 4))[0]
    assert resumed.losses == straight.losses[2:]
    assert all(torch.equal(resumed.state[key], tensor) for key, tensor in straight.state.items())
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000003", "step_00000004"]
    assert folder.folders() == ["step_00000003", "step_00000004"] and read_state(folder / "step_00000004").step == 4
    vision = weights(folder / "step_00000004", "vision.")
    assert all(torch.equal(tensor, straight.state[f"master/vision.{name}"]) for name, tensor in vision.items())


def test_what_is_not_whole_is_no_checkpoint(
    pool: Pool, store: tuple[Connect, Folder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    connect, folder = store
    alone = Case()
    pool.run(train_there, world=1, args=(connect, alone, folder, tmp_path / "newest", 2))
    newest = folder / "step_00000002"
    shard = next(name for name in newest.sizes() if name.endswith(".distcp"))
    content = bytearray(newest.read(shard))
    content[len(content) // 2] ^= 1
    newest.write(shard, bytes(content))
    assert "SHA-256" in str(verify(newest))
    assert latest(folder) == folder / "step_00000001"
    assert "step_00000002 is not used" in caplog.text
    newest.write(shard, bytes(content[:-1]))
    assert "bytes long" in str(verify(newest))
    # A save that was cut off: everything but the manifest. It is not one, and the next save clears it away.
    newest.remove("manifest.json")
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000001"]
    resumed = pool.run(train_there, world=1, args=(connect, alone, folder, tmp_path / "newest", 3))[0]
    assert len(resumed.losses) == 2 and latest(folder) == folder / "step_00000003"
    assert verify(folder / "step_00000002") is None


class Silent(ObjectStore):
    """A store that does not answer."""

    def ls(self, path: str, detail: bool = True, **_: object) -> list[object]:
        raise TimeoutError("no answer")

    def _open(self, path: str, mode: str = "rb", **_: object) -> object:
        raise TimeoutError("no answer")


def say_what_fails(rank: int, world: int, directory: Path) -> list[str]:
    """Save into a store that is lost between two saves; returns what the saves and the start after them say."""
    use_objects(str(directory))
    mesh = start_mesh(run_config(Case(world=world)).parallel)
    engine, _ = start_engine(Case(world=world), mesh)
    said, folder = [], Folder("objects://bucket/run")
    with Checkpoints(folder, mesh, EACH_STEP, directory / "newest") as checkpoints:
        for step in (1, 2):
            checkpoints.save(replace(START, step=step), engine)
            try:
                checkpoints.finish()
                said.append("")
            except CheckpointError as error:
                said.append(str(error))
            fsspec.register_implementation("objects", Silent, clobber=True)
        try:
            checkpoints.resume(engine)
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_store_that_does_not_answer_is_not_an_empty_one(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(say_what_fails, world=2, args=(tmp_path,)):
        assert said[0] == ""
        assert said[1].startswith("checkpoint objects://bucket/run/step_00000002 could not be written")
        assert said[2].endswith("does not answer: TimeoutError: no answer") and "objects://bucket/run" in said[2]


class Slow(ObjectStore):
    """A store that takes a while to delete."""

    def rm_file(self, path: str) -> None:
        time.sleep(0.2)
        super().rm_file(path)


def say_what_is_left(rank: int, world: int, directory: Path) -> list[str]:
    """Save twice, keeping one; returns what this rank sees when it may go on."""
    use_objects(str(directory))
    fsspec.register_implementation("objects", Slow, clobber=True)
    mesh = start_mesh(run_config(Case(world=world)).parallel)
    engine, _ = start_engine(Case(world=world), mesh)
    folder = Folder("objects://bucket/run")
    with Checkpoints(folder, mesh, replace(EACH_STEP, keep_last=1), directory / "newest") as checkpoints:
        for step in (1, 2):
            checkpoints.save(replace(START, step=step), engine)
            checkpoints.finish()
        return folder.folders()


def test_all_ranks_wait_while_old_checkpoints_are_removed(pool: Pool, tmp_path: Path) -> None:
    """One that went on would wait inside the next step, where its watchdog ends it."""
    assert pool.run(say_what_is_left, world=2, args=(tmp_path,)) == [["step_00000002"]] * 2


def test_a_store_without_its_driver_is_refused() -> None:
    with pytest.raises(CheckpointError, match="nosuch://bucket/run cannot be used"):
        list_checkpoints(Folder("nosuch://bucket/run"))

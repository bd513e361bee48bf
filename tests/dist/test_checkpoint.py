"""Checkpoints: a resumed run equals an undisturbed one, on the same layout to the bit and on another to rounding."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from cogvit.batch import DataPosition
from cogvit.config import CheckpointConfig, GuardConfig
from cogvit.errors import CheckpointError
from cogvit.parallel.mesh import start_mesh
from cogvit.training.checkpoint import Checkpoints, latest, list_checkpoints, read_state, weights
from cogvit.training.chrono import Chrono
from cogvit.training.folder import Folder
from cogvit.training.manifest import verify
from cogvit.training.state import TrainState, state_to_json
from cogvit.training.together import Together, turn_of
from tests.disk import small_file_system
from tests.dist.runs import Case, Trace, micro_of, run_config, start_engine, train, whole_state
from tests.pool import Pool

EACH_STEP = CheckpointConfig(every_steps=1, keep_last=2)
START = TrainState(step=0, position=DataPosition("plan", 0), images=0, tokens=0)


def folder(path: Path) -> Folder:
    return Folder(str(path))


def note_of(directory: Path) -> Path:
    """Where the name of the newest checkpoint is written."""
    return directory.with_name(directory.name + "-newest")


def train_and_save(
    rank: int, world: int, case: Case, directory: Path, until: int, config: CheckpointConfig = EACH_STEP
) -> Trace:
    """Resume if there is something to resume, train to `until`, save after every step."""
    return train_in(case, folder(directory), note_of(directory), until, config)


def train_in(
    case: Case, checkpoints_folder: Folder, note: Path, until: int, config: CheckpointConfig = EACH_STEP
) -> Trace:
    """The same in any folder."""
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    with Checkpoints(checkpoints_folder, mesh, config, note) as checkpoints:
        state = checkpoints.resume(engine) or START
        losses, norms = [], []
        while state.step < until:
            report = engine.step(objective, micro_of(case, mesh), state.step)
            state = state.after(DataPosition("plan", state.step + 1), images=20, tokens=100, spent=Chrono(step_s=1.0))
            losses.append(report.terms["loss"])
            norms.append(report.grad_norm)
            checkpoints.save(state, engine)
        checkpoints.finish()
    return Trace(losses, norms, {}, whole_state(engine, mesh), 0)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(world=2, zero=2, optimizer="muon", stage="contrast"), id="dp2", marks=pytest.mark.long),
        pytest.param(Case(world=4, tp=2, pp=2, optimizer="muon", family="cogvit_l"), id="tp2-pp2"),
    ],
)
def test_resume_on_the_same_layout_is_bitwise(pool: Pool, tmp_path: Path, case: Case) -> None:
    straight = pool.run(train, world=case.world, args=(case, 4))[0]
    pool.run(train_and_save, world=case.world, args=(case, tmp_path, 2))
    resumed = pool.run(train_and_save, world=case.world, args=(case, tmp_path, 4))[0]
    assert resumed.losses == straight.losses[2:]
    assert resumed.grad_norms == straight.grad_norms[2:]
    for key, tensor in straight.state.items():
        assert torch.equal(resumed.state[key], tensor), key
    assert [path.name for path in list_checkpoints(folder(tmp_path))] == ["step_00000003", "step_00000004"]
    assert read_state(folder(tmp_path / "step_00000004")).position == DataPosition("plan", 4)


def test_resume_on_another_layout(pool: Pool, tmp_path: Path) -> None:
    case = Case(world=4, tp=2, pp=2, optimizer="muon", stage="contrast", family="cogvit_l")
    other = Case(world=2, zero=2, optimizer="muon", stage="contrast", family="cogvit_l")
    first = pool.run(train_and_save, world=4, args=(case, tmp_path, 2))[0]
    loaded = pool.run(train_and_save, world=2, args=(other, tmp_path, 2))[0]
    for key, tensor in first.state.items():
        assert torch.equal(loaded.state[key], tensor), key
    straight = pool.run(train, world=4, args=(case, 3))[0]
    resumed = pool.run(train_and_save, world=2, args=(other, tmp_path, 3))[0]
    assert resumed.losses == pytest.approx(straight.losses[2:], rel=1e-6)


def bytes_of_resuming(rank: int, world: int, case: Case, directory: Path) -> int:
    mesh = start_mesh(run_config(case).parallel)
    engine, _ = start_engine(case, mesh)
    with Checkpoints(folder(directory), mesh, EACH_STEP, note_of(directory)) as checkpoints:
        assert checkpoints.resume(engine) is not None
    return checkpoints.bytes_read


@pytest.mark.long
def test_ranks_that_resume_read_a_checkpoint_once_between_them_on_any_layout(pool: Pool, tmp_path: Path) -> None:
    case = Case(world=4, tp=2, optimizer="muon", family="cogvit_l")
    pool.run(train_and_save, world=4, args=(case, tmp_path, 1))
    files = {file.name: file.stat().st_size for file in (tmp_path / "step_00000001").iterdir()}
    assert files.keys() == {".metadata", "__0_0.distcp", "manifest.json", "state.json"}  # one file of this machine
    for world, tp, pp in ((4, 2, 1), (4, 1, 1), (2, 1, 2), (2, 2, 1), (1, 1, 1)):
        other = replace(case, world=world, tp=tp, pp=pp, zero=2 if pp == 1 else 1)
        read = pool.run(bytes_of_resuming, world=world, args=(other, tmp_path))
        assert sum(read) <= sum(files.values())
        assert world != 4 or max(read) < 0.5 * sum(read)


def wait_for_all(rank: int, rendezvous: Path, said: Connection) -> None:
    """Be one of four ranks that write a checkpoint, the third of which is killed in the middle; tell what is said."""
    store = dist.FileStore(str(rendezvous), 4)  # type: ignore[attr-defined]
    os.environ |= {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    together = Together(rank, 4)
    together.run(lambda: None, lambda _: None)
    try:
        together.run(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 2 else None, lambda _: None)
    except CheckpointError as error:
        said.send(str(error))
        said.recv()


def test_a_rank_that_is_killed_while_a_checkpoint_is_written_is_noticed_by_all(pool: Pool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # the pool's, which has imported everything
    pipes = [context.Pipe() for _ in range(4)]
    ranks = [context.Process(target=wait_for_all, args=(rank, tmp_path / "store", pipes[rank][1])) for rank in range(4)]
    for process in ranks:
        process.start()
    try:
        for rank in (0, 1, 3):
            assert pipes[rank][0].poll(60), f"rank {rank} waits on"
            assert pipes[rank][0].recv() == "rank 2 is gone"
    finally:
        for process in ranks:
            process.kill()
            process.join()


def save_as_older_versions(directory: Path, state: dict[str, Tensor]) -> None:
    """Write what format 2 was: whole tensors by the library, and one digest a file."""
    directory.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saving from one process
        dcp.save(state, checkpoint_id=directory, no_dist=True)
    (directory / "state.json").write_text(json.dumps(state_to_json(replace(START, step=1))))
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in directory.iterdir()
    }
    (directory / "manifest.json").write_text(json.dumps({"format": 2, "step": 1, "files": files}))


def test_a_checkpoint_of_an_older_version_resumes_on_any_layout(pool: Pool, tmp_path: Path) -> None:
    case = Case(world=2, zero=2, optimizer="muon", family="cogvit_l")
    made = pool.run(train, world=2, args=(case, 1))[0].state
    save_as_older_versions(tmp_path / "step_00000001", made)
    assert verify(folder(tmp_path / "step_00000001")) is None
    for other in (case, replace(case, world=4, tp=2, zero=1)):
        loaded = pool.run(train_and_save, world=other.world, args=(other, tmp_path, 1))[0].state
        assert loaded.keys() == made.keys() and all(torch.equal(loaded[key], tensor) for key, tensor in made.items())


@pytest.mark.parametrize("nodes", [1, 3, 8])
def test_ranks_of_a_node_write_one_file_after_one_another_and_few_nodes_at_a_time(nodes: int) -> None:
    hosts = [f"node{number}" for number in range(nodes) for _ in range(4)]
    turns = [turn_of(rank, hosts, at_a_time=2) for rank in range(len(hosts))]
    assert [turn.file for turn in turns] == [int(host[4:]) for host in hosts]
    assert [turn.begins for turn in turns] == [True, False, False, False] * nodes
    assert [turn.ends for turn in turns] == [False, False, False, True] * nodes
    waited_for = [turn.after for turn in turns if turn.after is not None]
    assert sorted(waited_for) == [rank for rank, turn in enumerate(turns) if turn.followed]
    done: set[int | None] = {None}
    while len(done) <= len(turns):  # a round lets write who can
        writing = {rank for rank, turn in enumerate(turns) if turn.after in done and rank not in done}
        assert 0 < len(writing) <= 2
        done |= writing
    apart = turn_of(3, hosts, shared=False)
    assert (apart.file, apart.begins, apart.ends, apart.after) == (3, True, True, 2)


def skip_then_save(rank: int, world: int, directory: Path, resume: bool) -> dict[str, Tensor]:
    """Three AdamW steps of which the second is skipped, in one go or with a resumption before the third."""
    case = Case(world=world, optimizer="adamw")
    mesh = start_mesh(run_config(case).parallel)
    with Checkpoints(folder(directory), mesh, CheckpointConfig(every_steps=1), note_of(directory)) as checkpoints:
        engine, objective = start_engine(case, mesh)
        engine.guard = GuardConfig(non_finite="skip")
        state = START
        for step in range(2):
            micro = micro_of(case, mesh)
            if step == 1:
                assert micro[0].targets is not None
                micro[0].targets.features["dinov3"][0] = torch.nan
            report = engine.step(objective, micro, step)
            position = DataPosition("plan", step + 1)
            state = state.after(position, images=20, tokens=100, spent=Chrono(), skipped=bool(report.skipped))
        assert state.skipped == 1
        if resume:
            checkpoints.save(state, engine)
            checkpoints.finish()
            engine, objective = start_engine(case, mesh)
            assert checkpoints.resume(engine) == state
        engine.step(objective, micro_of(case, mesh), 2)
    return whole_state(engine, mesh)


def test_a_skipped_step_does_not_count_as_an_update_after_resuming(pool: Pool, tmp_path: Path) -> None:
    straight = pool.run(skip_then_save, world=2, args=(tmp_path / "a", False))[0]
    resumed = pool.run(skip_then_save, world=2, args=(tmp_path / "b", True))[0]
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.items())


def damage(directory: Path) -> None:
    """Flip a bit in a checkpoint's first shard."""
    shard = min(directory.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def test_damage_is_seen_and_the_previous_checkpoint_used(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool.run(train_and_save, world=1, args=(Case(), tmp_path, 2))
    newest = tmp_path / "step_00000002"
    shard = next(newest.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:-1])
    assert f"not {len(content)} bytes long" in str(verify(folder(newest)))
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "SHA-256" in str(verify(folder(newest)))
    assert latest(folder(tmp_path)) == folder(tmp_path / "step_00000001")
    assert "step_00000002 is not used" in caplog.text
    shutil.rmtree(tmp_path / "step_00000001")
    assert latest(folder(tmp_path)) is None


def test_weights_are_read_without_any_layout(pool: Pool, tmp_path: Path) -> None:
    case = Case(world=4, tp=2, pp=2, family="cogvit_l")
    trained = pool.run(train_and_save, world=4, args=(case, tmp_path, 1))[0]
    vision = weights(folder(tmp_path / "step_00000001"), "vision.")
    expected = {
        key.removeprefix("master/vision."): tensor
        for key, tensor in trained.state.items()
        if key.startswith("master/vision.")
    }
    assert vision.keys() == expected.keys()
    assert all(torch.equal(vision[name], tensor) for name, tensor in expected.items())


def test_every_kth_checkpoint_is_kept(pool: Pool, tmp_path: Path) -> None:
    config = CheckpointConfig(every_steps=1, keep_last=1, keep_every_steps=2)
    pool.run(train_and_save, world=1, args=(Case(), tmp_path, 5, config))
    assert [path.name for path in list_checkpoints(folder(tmp_path))] == [
        "step_00000002",
        "step_00000004",
        "step_00000005",
    ]


def test_damaged_checkpoints_do_not_push_out_good_ones(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_and_save, args=(Case(), tmp_path, 4, CheckpointConfig(every_steps=1, keep_last=3)), world=1)
    for name in ("step_00000003", "step_00000004"):
        damage(tmp_path / name)
    pool.run(train_and_save, args=(Case(), tmp_path, 3, CheckpointConfig(every_steps=1, keep_last=1)), world=1)
    assert [path.name for path in list_checkpoints(folder(tmp_path))] == ["step_00000003"]
    assert latest(folder(tmp_path)) == folder(tmp_path / "step_00000003")


def test_a_run_is_not_begun_anew_over_damaged_checkpoints(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_and_save, world=1, args=(Case(), tmp_path, 1))
    damage(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match=r"none of .*'s checkpoints \(step_00000001\) is whole"):
        pool.run(train_and_save, world=1, args=(Case(), tmp_path, 2))


def test_a_checkpoint_outlives_what_goes_wrong_after_it(pool: Pool, tmp_path: Path) -> None:
    """Neither a note that cannot be written nor an old checkpoint that cannot be removed makes a new one bad."""
    directory = tmp_path / "checkpoints"
    note_of(directory).mkdir()
    with small_file_system(directory / "step_00000000", "1m"):
        pool.run(train_and_save, world=2, args=(Case(world=2), directory, 3))
        assert [path.name for path in list_checkpoints(folder(directory))] == ["step_00000002", "step_00000003"]
        assert latest(folder(directory)) == folder(directory / "step_00000003")


def fill_the_disk(rank: int, world: int, case: Case, directory: Path) -> list[str]:
    """Save twice on a file system that holds one checkpoint; returns what the two saves said."""
    mesh = start_mesh(run_config(case).parallel)
    engine, _ = start_engine(case, mesh)
    said = []
    with Checkpoints(folder(directory), mesh, EACH_STEP, note_of(directory)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(replace(START, step=step), engine)
            try:
                checkpoints.finish()
                said.append("")
            except CheckpointError as error:
                said.append(str(error))
    return said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 checkpoints of the test's model."""
    with small_file_system(tmp_path / "disk", "3m") as mounted:
        yield mounted


def test_a_full_disk_leaves_the_checkpoint_before(pool: Pool, small_disk: Path) -> None:
    said = pool.run(fill_the_disk, world=2, args=(Case(world=2), small_disk))
    assert "step_00000002 could not be written" in said[1][1]
    assert said[0][0] == "" and "step_00000002 could not be written, 0." in said[0][1]
    assert latest(folder(small_disk)) == folder(small_disk / "step_00000001")
    assert [path.name for path in small_disk.iterdir()] == ["step_00000001"]


class Exploit:
    """What unpickling must never call."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._proof),)


def test_a_checkpoint_of_a_stranger_runs_nothing(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_and_save, world=1, args=(Case(), tmp_path, 1))
    metadata = tmp_path / "step_00000001" / ".metadata"
    metadata.write_bytes(pickle.dumps(Exploit(tmp_path / "proof")))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        weights(folder(tmp_path / "step_00000001"), "vision.")
    assert not (tmp_path / "proof").exists()


def test_a_checkpoint_of_another_version_is_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_and_save, world=1, args=(Case(), tmp_path, 1))
    manifest = tmp_path / "step_00000001" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 7}))
    assert verify(folder(manifest.parent)) == "its format is 7, this version reads 2 and 3"
    with pytest.raises(CheckpointError, match="its format is 7, this version reads 2 and 3; go on with that version"):
        latest(folder(tmp_path))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read (it has no 'format')"),
        ('{"files": {}}', "cannot be read (it has no 'format')"),
        ('{"format": 2, "files": {"a": 1}}', "cannot be read"),
        ('{"format": 2, "files": {}}', "does not name state.json"),
    ],
)
def test_a_damaged_manifest_is_no_checkpoint_and_no_crash(tmp_path: Path, content: str, fault: str) -> None:
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "manifest.json").write_text(content)
    assert f"its manifest {fault}" in str(verify(folder(tmp_path / "step_00000001")))
    assert latest(folder(tmp_path)) is None

"""Many jobs on one feature store: parts, a shard's one writer, room, and what opening asks of the file system."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogvit.config import RunConfig
from cogvit.errors import ConfigError
from cogvit.teacher.store import Maker, claimed, path_of, writing
from cogvit.teacher.stream import LocalFeatures
from cogvit.teacher.zoo import load_teacher
from data_pipeline.loader import image_of
from tests.runs_on_disk import store_run
from tools.precompute_features import check_room, main, plan_job, run_job

MAKERS = {name: Maker("f" * 16, "fp32", 32) for name in ("one", "two")}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return store_run(tmp_path_factory.mktemp("world"))


def test_parts_make_a_store_together_and_a_shard_of_another_job_is_left_out(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, out=str(tmp_path / "parts"))
    members = {member.name: load_teacher(member.path, "fp32") for member in config.teachers.members}
    source = LocalFeatures(members, image_of)
    jobs = [plan_job(config, part=(number, 2)) for number in range(2)]
    assert [[Path(shard.path).name for shard in job.shards] for job in jobs] == [["a.tar"], ["b.tar"]]
    assert "1 shards take 0.0 GB in fp32" in check_room(jobs[0])
    shard = jobs[1].shards[0]
    with claimed(jobs[1].out, shard.path, shard.contents):
        run_job(jobs[1], source)
    assert len(plan_job(config).shards) == 2
    for job in jobs:
        run_job(job, source)
    assert plan_job(config).shards == () and not list(jobs[0].out.glob("*.lock"))


def test_a_store_without_room_is_refused_before_anything_starts(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plan_job(replace(config, out=str(tmp_path / "store")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        ConfigError, match=r"2 shards take 0\.0 GB in fp32; 0\.0 GB are free at --out .*; take another disk"
    ):
        check_room(job)
    assert not job.out.exists()


def test_a_dry_run_starts_nothing_and_a_mistyped_flag_is_refused(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {member.name: member.path for member in config.teachers.members}
    words = [
        "demo_stage1",
        "--data.shards",
        config.data.shards,
        "--out",
        str(tmp_path / "store"),
        "--data.duplicates",
        "keep",
        "--dry-run",
    ]
    words += [word for name, path in paths.items() for word in (f"--teachers.members.{name}.path", path)]
    monkeypatch.setitem(sys.modules, "ray", None)  # to import it fails
    assert main([*words, "--eval.every-steps", "0"]) == 0
    said = capsys.readouterr().out
    assert "0 of 2 shards are in" in said and "2 shards take" in said and not (tmp_path / "store").exists()
    assert main([*words, "--part", "2/2"]) == 2 and "--part 2/2 must be I/N" in capsys.readouterr().err
    assert main([*words, "--data.shrads", "x"]) == 2 and "unknown flag --data.shrads" in capsys.readouterr().err


def test_a_shard_is_held_by_one_job_at_a_time(tmp_path: Path) -> None:
    shards = ("a.tar", "a.tar", "b.tar")
    with ExitStack() as stack:
        assert [stack.enter_context(claimed(tmp_path, one, "1" * 64)) for one in shards] == [True, False, True]
    with claimed(tmp_path, "a.tar", "1" * 64) as later:
        assert later
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_looking_for_every_shard_asks_the_file_system_as_often_whatever_their_number(tmp_path: Path) -> None:
    counts = []
    for number in (3, 40):
        store = tmp_path / str(number)
        store.mkdir()
        with writing(store, MAKERS, "fp32"):
            for name in MAKERS:
                for shard in range(number):
                    path_of(store, name, f"{shard}.tar", "0" * 64).touch()
        code = (
            "from pathlib import Path\nfrom cogvit.teacher.store import StoreFeatures\n"
            "from tests.unit.test_store_jobs import MAKERS\n"
            f"held = {{f'{{n}}.tar': '0' * 64 for n in range({number})}}\n"
            f"StoreFeatures(Path({str(store)!r}), MAKERS, held).require_all()\n"
        )
        log = tmp_path / f"log{number}"
        calls = "trace=open,openat,stat,lstat,newfstatat,statx,access"
        command = ["strace", "-f", "--seccomp-bpf", "-e", calls, "-o", str(log), sys.executable, "-c", code]
        subprocess.run(command, check=True, timeout=100)
        counts.append(sum(f'"{store}' in line for line in log.read_text().splitlines()))
    assert counts[0] == counts[1] <= 4 * len(MAKERS)

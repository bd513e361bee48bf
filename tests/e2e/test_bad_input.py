"""What a user gets wrong: one clear line, exit status 2, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cogvit.train import main
from tests.e2e.corpus import write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", "numbers-00000", 8)
    return tmp_path / "shards"


def refuse(capsys: pytest.CaptureFixture[str], argv: list[str], *expected: str) -> None:
    """The command fails with one line that holds every expected word."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    for word in expected:
        assert word in lines[0]
    assert captured.out == ""


def test_missing_preset(capsys: pytest.CaptureFixture[str]) -> None:
    refuse(capsys, ["demo_stage9"], "demo_stage9", "demo_stage1")
    refuse(capsys, ["demo_stage9", "--help"], "demo_stage9", "demo_stage1")


@pytest.mark.parametrize("rank", [0, 1])
def test_help_wherever_it_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    for argv in (["--help"], ["-h"], ["demo_stage1", "--help"], ["demo_stage1", "--no-such-flag", "-h"]):
        assert main(argv) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        if rank:
            assert printed.out == ""  # one page, not one from every process
            continue
        assert "usage: python -m cogvit.train PRESET" in printed.out
        own = argv[0] == "demo_stage1"  # the preset's defaults
        assert ("[120]" in printed.out) == own
    assert main(["demo_stage1", "--help", "teachers"]) == 0
    assert ("--teachers.members.dinov3.path TEXT" in capsys.readouterr().out) == (rank == 0)


def test_help_of_the_tools(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.index_shards import main as index_shards
    from tools.precompute_features import main as precompute

    for command in (index_shards, precompute):
        assert command(["x", "--help"]) == 0
        assert "usage:" in capsys.readouterr().out.lower()


def test_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    refuse(capsys, ["demo_stage2", "--data.shard", "x"], "--data.shard", "--data.shards")


def launched(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """This process is the first of so many."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", world_size), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))


def test_world_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 6)
    refuse(capsys, ["demo_stage2", "--parallel.tp", "4", "--out", "x"], "6 processes", "tp=4")


@pytest.mark.parametrize("preset", ["demo_stage1", "demo_stage2", "demo_stage3"])
def test_more_ranks_than_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, preset: str, tmp_path: Path
) -> None:
    launched(monkeypatch, 8)
    out = tmp_path / "run"
    few = ["--data.global-batch-images", "6", "--out", str(out)]
    told = "8 data-parallel ranks are more than the 6 images of a step (--data.global-batch-images)"
    refuse(capsys, [preset, *few], told, "start at most 6 processes, or raise it to 8")
    refuse(capsys, [preset, *few, "--dry-run"], told)
    assert not out.exists()


def test_heads_that_tp_does_not_divide(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 3)
    refuse(capsys, ["demo_stage2", "--parallel.tp", "3", "--out", "x"], "num_heads=4", "--parallel.tp 3")


@pytest.mark.parametrize("stage", ["0", "3"])
def test_zero_stage(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    refuse(capsys, ["demo_stage2", "--zero.stage", stage], f"--zero.stage {stage}", "use 1 or 2")


def test_directory_without_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "run"
    argv = ["demo_stage2", "--data.shards", str(tmp_path / "empty"), "--eval.every-steps", "0", "--out", str(out)]
    refuse(capsys, argv, "empty")
    assert not out.exists()


def test_shard_that_is_not_a_tar(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_text("no tar at all" * 100)
    from tools.index_shards import main as index_shards

    assert index_shards([str(tmp_path)]) == 2
    assert "bad.tar" in capsys.readouterr().err


def test_shards_without_index(capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path) -> None:
    for index in [*shards.glob("*.parquet"), *shards.glob("*.cogvit")]:
        index.unlink()
    argv = ["demo_stage2", "--data.shards", str(shards), "--eval.every-steps", "0", "--out", str(tmp_path / "run")]
    refuse(capsys, argv, "python -m tools.index_shards")


def test_held_out_shards_that_are_not_there(capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path) -> None:
    argv = ["demo_stage2", "--data.shards", str(shards), "--out", str(tmp_path / "run")]
    gone = str(tmp_path / "gone" / "*.tar")
    refuse(capsys, [*argv, "--data.eval-shards", gone], "--data.eval-shards", "--eval.every-steps 0", gone)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data.tokenizer", "NOWHERE"], ["--data.tokenizer", "byt5"]),
        (["--text.vocab-size", "100"], ["byt5 has 259 ids", "text.vocab_size is 100"]),
    ],
)
def test_tokenizers_are_tried_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path, flags: list[str], expected: list[str]
) -> None:
    flags = [str(tmp_path / "nowhere") if word == "NOWHERE" else word for word in flags]
    argv = ["demo_stage2", "--data.shards", str(shards), "--eval.every-steps", "0", "--out", str(tmp_path / "run")]
    refuse(capsys, [*argv, *flags], *expected)
    assert not (tmp_path / "run").exists()


def test_directory_of_another_run(capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ["demo_stage2", "--data.shards", str(shards), "--eval.every-steps", "0", "--out", str(out)]
    assert main([*argv, "--dry-run", "--seed", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("data: 8 images in 1 shards") and "seed: 0 -> 1" in printed.err
    assert not out.exists()
    out.mkdir()
    (out / "config.json").write_text(printed.out)
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    before = (out / "config.json").read_bytes()
    refuse(capsys, [*argv, "--seed", "2"], "another run", "seed: 1 -> 2")
    refuse(capsys, [*argv, "--dry-run", "--seed", "2"], "another run", "seed: 1 -> 2")
    assert (out / "config.json").read_bytes() == before


def test_teacher_that_is_no_checkpoint(capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path) -> None:
    from cogvit.errors import ConfigError
    from cogvit.teacher.zoo import inspect_teacher

    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigError, match=r"teacher .*config\.json"):
        inspect_teacher(str(tmp_path / "teacher"))
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="does not exist"):
        inspect_teacher(str(tmp_path / "teacher"))


def test_out_that_cannot_be_written(capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    argv = ["demo_stage2", "--data.shards", str(shards), "--eval.every-steps", "0"]
    refuse(capsys, [*argv, "--out", str(tmp_path / "file" / "run")], "--out", "cannot be written")

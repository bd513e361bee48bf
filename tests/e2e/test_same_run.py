"""A run is recognized by what it is, goes on where it stood, and is never begun anew unless somebody asks for it."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import pytest

from cogvit.config import load_config
from cogvit.train import main
from cogvit.training.checkpoint import folder_of, latest, read_state
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_shards

SMALL = (
    "--data.global-batch-images", "8", "--data.tokens-per-pack", "256", "--data.images-per-pack", "8",
    "--data.text-tokens-per-pack", "512", "--eval.every-steps", "0", "--log.wandb", "off",
    "--schedule.kind", "constant", "--schedule.warmup-steps", "1", "--checkpoint.every-steps", "2",
    "--vision.depth", "1", "--text.depth", "1",
)  # fmt: skip


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """Two steps of a small stage 2 in OUT."""
    write_shards(tmp_path / "shards", "numbers-00000", 16)
    shards, out = str(tmp_path / "shards"), str(tmp_path / "run")
    return ["demo_stage2", "--data.shards", shards, "--out", out, "--schedule.steps", "2", *SMALL]


def with_flag(argv: list[str], flag: str, value: str) -> list[str]:
    place = argv.index(flag)
    return [*argv[: place + 1], value, *argv[place + 2 :]]


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def steps_of(out: Path) -> list[float]:
    return [row["step"] for row in read_metrics(out / "metrics.jsonl")]


def last_step(out: Path) -> int:
    path = latest(folder_of(out))
    return 0 if path is None else read_state(path).step


def test_progress_without_its_checkpoints_is_refused_until_somebody_asks(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(argv) == 0
    before = (out / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "checkpoints")
    for more in ([], ["--dry-run"]):
        told = refusal(capsys, [*argv, *more])
        assert f"{out} has saved step_00000002, and {out}/checkpoints holds no checkpoint" in told
        assert "--begin-anew" in told and (out / "metrics.jsonl").read_bytes() == before
    assert main([*argv, "--begin-anew", "--dry-run"]) == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    assert main([*argv, "--begin-anew"]) == 0
    assert (out / "before_1" / "metrics.jsonl").read_bytes() == before and steps_of(out) == [1, 2]
    assert main([*argv, "--begin-anew", "--seed", "3"]) == 0  # another run: its checkpoints go aside too
    assert (out / "before_2" / "checkpoints" / "step_00000002").is_dir() and steps_of(out) == [1, 2]


def test_metrics_of_a_start_that_saved_nothing_are_kept(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(argv) == 0
    shutil.rmtree(out / "checkpoints")
    (out / "logs" / "newest_checkpoint").unlink()  # as after a kill before the first save
    assert main(argv) == 0
    assert [json.loads(line)["step"] for line in (out / "metrics_before_1.jsonl").open()] == [1, 2]
    assert steps_of(out) == [1, 2]


def test_a_relative_checkpoint_dir_is_one_place(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    argv = [*argv, "--checkpoint.dir", "ckpts"]
    assert main(argv) == 0
    assert load_config(out / "config.json").checkpoint.dir == str(tmp_path / "one" / "ckpts")
    monkeypatch.chdir(tmp_path / "other")
    assert main(with_flag(argv, "--schedule.steps", "4")) == 0
    assert steps_of(out) == [1, 2, 3, 4] and not (tmp_path / "other" / "ckpts").exists()
    told = refusal(capsys, with_flag(argv, "--checkpoint.dir", str(tmp_path / "elsewhere")))
    assert f"{tmp_path}/elsewhere holds no checkpoint (they were in {tmp_path}/one/ckpts)" in told
    (tmp_path / "one" / "ckpts").rename(tmp_path / "moved")
    assert main(with_flag(argv, "--checkpoint.dir", str(tmp_path / "moved"))) == 0


def test_the_same_files_elsewhere_are_the_same_run(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, shards = tmp_path / "run", tmp_path / "shards"
    assert main(with_flag(argv, "--out", str(tmp_path / "first"))) == 0
    argv = [*argv, "--init", str(tmp_path / "first")]
    assert main(argv) == 0
    other = str(tmp_path / "x" / ".." / "shards")
    (tmp_path / "x").mkdir()
    assert main(with_flag(with_flag(argv, "--data.shards", other), "--schedule.steps", "3")) == 0
    shards.rename(tmp_path / "moved")
    (tmp_path / "first").rename(tmp_path / "zeroth")
    argv = with_flag(with_flag(argv, "--data.shards", str(tmp_path / "moved")), "--init", str(tmp_path / "zeroth"))
    assert main(with_flag(argv, "--schedule.steps", "4")) == 0
    assert steps_of(out) == [1, 2, 3, 4]
    changes = [json.loads(line) for line in (out / "logs" / "changes.jsonl").open()]
    fields = ["data.shards", "schedule.steps", "data.shards", "init", "schedule.steps"]
    assert sorted(row["field"] for row in changes) == sorted(fields)
    write_shards(tmp_path / "others", "numbers-00000", 12)
    told = refusal(capsys, with_flag(argv, "--data.shards", str(tmp_path / "others")))
    assert "holds another run" in told and "of other content" in told and "data.shards" in told


def test_a_run_is_made_longer_where_its_rates_allow_it(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(argv) == 0
    assert main(with_flag(argv, "--schedule.steps", "4")) == 0
    assert steps_of(out) == [1, 2, 3, 4] and last_step(out) == 4
    cosine = with_flag(with_flag(argv, "--schedule.kind", "cosine"), "--out", str(tmp_path / "cosine"))
    cosine = with_flag(cosine, "--schedule.steps", "3")
    assert main(cosine) == 0
    told = refusal(capsys, with_flag(cosine, "--schedule.steps", "5"))
    assert "has trained 3 steps of a cosine schedule over 3" in told and f"--init {tmp_path}/cosine" in told
    assert "wsd" in told


def test_a_directory_in_which_nothing_was_trained_is_free(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*argv, "--dry-run", "--seed", "5"]) == 0 and not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    assert main([*argv, "--seed", "5", "--checkpoint.dir", str(tmp_path / "file")]) == 2  # config.json was written
    assert load_config(tmp_path / "run" / "config.json").seed == 5
    assert main(argv) == 0
    assert load_config(tmp_path / "run" / "config.json").seed == 0


@pytest.mark.parametrize(
    ("content", "word"),
    [(b'{"model": "bert"}', "unknown configuration field model"), (b"\xff\xfe{", "not JSON"), (None, "directory")],
)
def test_the_configuration_of_something_else_is_named_and_kept(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, word: str
) -> None:
    path = tmp_path / "run" / "config.json"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    told = refusal(capsys, argv)
    assert f"--out {tmp_path}/run holds something else: {path}" in told and word.lower() in told.lower()
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_a_resumed_run_says_so(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "resumes" not in capsys.readouterr().out
    assert main(with_flag(argv, "--schedule.steps", "3")) == 0
    assert f"resumes after step 2 of 3, from {tmp_path}/run/checkpoints" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("damage", "kept"),
    [(b"\0" * 64, 4), (b"\n", 4), (b"{}\n", 4), (b"\xff\xfe\n", 4), (b'{"step": "x"}\n', 4), (b"[1]\n", 4)],
)
def test_damaged_metrics_lines_stop_nothing(
    argv: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: bytes, kept: int
) -> None:
    out = tmp_path / "run"
    assert main(argv) == 0
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(lines[0] + damage + lines[1] + damage)
    assert main(with_flag(argv, "--schedule.steps", str(kept))) == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert {row["step"] for row in rows} >= {1, 3, 4} and (out / "metrics_damaged.jsonl").read_bytes()
    assert "metrics_damaged.jsonl" in capfd.readouterr().err


def connections() -> int:
    """Threads of gloo in this process, one for each group that somebody still holds."""
    gc.collect()
    return [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()].count("gloo_tcp_loop\n")


def test_runs_that_have_ended_hold_no_connections(argv: list[str], tmp_path: Path) -> None:
    held = []
    for name in ("first", "second"):
        assert main(with_flag(argv, "--out", str(tmp_path / name))) == 0
        held.append(connections())
    assert held[1] <= held[0]  # one run would leave sixteen

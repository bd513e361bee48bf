"""metrics.jsonl, progress output and the W&B files of a run."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from cogvit.config import LogConfig, RunConfig, ScheduleConfig
from cogvit.errors import DataError
from cogvit.training.meter import Meter, duration, read_metrics
from tests.disk import files_of_at_most, small_file_system

CONFIG = RunConfig(schedule=ScheduleConfig(steps=10), log=LogConfig(wandb="off"))
VALUES = {"loss": 0.1 + 0.2, "loss_dinov3": 1 / 3, "lr": 1e-3, "images_per_s": 10.0, "tokens_per_s": 1234.5}


def record(out: Path, start_step: int, stop_step: int, value: float) -> None:
    with Meter(out, CONFIG, writer=True, start_step=start_step) as meter:
        for step in range(start_step + 1, stop_step + 1):
            meter.record(step, {"loss": value})


@given(st.dictionaries(st.sampled_from(["loss", "lr", "a"]), st.floats(allow_nan=False, allow_infinity=False)))
def test_floats_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, values: dict[str, float]) -> None:
    out = tmp_path_factory.mktemp("run")
    with Meter(out, CONFIG, writer=True, start_step=0) as meter:
        meter.record(1, values)
    assert read_metrics(out / "metrics.jsonl") == [{"step": 1, **values}]


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with Meter(tmp_path, CONFIG, writer=True, start_step=0) as meter:
        meter.record(1, VALUES)
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, **VALUES}]


def test_resume_leaves_every_step_once(tmp_path: Path) -> None:
    record(tmp_path, 0, 7, value=1.0)
    record(tmp_path, 4, 6, value=2.0)  # the newest checkpoint was of step 4
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    record(tmp_path, 0, 1, value=3.0)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3.0]


def test_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    record(tmp_path, 0, 3, value=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-4])
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    record(tmp_path, 2, 3, value=2.0)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_full_disk_has_room_to_resume(tmp_path: Path) -> None:
    record(tmp_path, 0, 7, value=1.0)
    with files_of_at_most(8), Meter(tmp_path, CONFIG, writer=True, start_step=4):
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_file_system(tmp_path / "disk", "64k") as disk:
        with Meter(disk, CONFIG, writer=True, start_step=0) as meter:
            meter.record(1, VALUES)
            ballast = disk / "ballast"
            ballast.write_bytes(b"0" * 60 * 1024)  # a page is left for metrics.jsonl
            for step in range(2, 60):
                meter.record(step, VALUES)
            assert len(read_metrics(disk / "metrics.jsonl")) < 59
            assert capfd.readouterr().err.count("metrics.jsonl waits: No space left on device; training goes on") == 1
            ballast.unlink()
            meter.record(60, VALUES)
        assert read_metrics(disk / "metrics.jsonl") == [{"step": step, **VALUES} for step in range(1, 61)]


def test_damaged_or_missing_metrics_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is .* a run directory\?"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n')
    with pytest.raises(DataError, match="has a line that is not JSON of a step: 'noise'"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    with Meter(tmp_path, CONFIG, writer=True, start_step=0) as meter:
        meter.record(1, {"loss": 1.0, "mfu": float("nan"), "ratio": float("inf")})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_only_the_writer_leaves_traces(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Meter(tmp_path / "run", CONFIG, writer=False, start_step=0) as meter:
        meter.record(1, VALUES)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_plain_lines_say_losses_speed_and_time_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(schedule=ScheduleConfig(steps=5), log=LogConfig(wandb="off", every_steps=2))
    with Meter(tmp_path, config, writer=True, start_step=0) as meter:
        for step in range(1, 6):
            meter.record(step, VALUES)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert lines[0] == "step 2/5 loss 0.3000 loss_dinov3 0.3333 lr 1.0e-03 10.0 img/s 1234 tok/s left 0s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (187, "3m07s"), (3719.9, "1h02m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_terminal_gets_a_bar(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.unit.test_meter import CONFIG, VALUES
from cogvit.training.meter import Meter
with Meter(Path({str(tmp_path)!r}), CONFIG, writer=True, start_step=4) as meter:
    for step in range(5, 11):
        meter.record(step, VALUES)
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=theirs) as process:
        os.close(theirs)
        screen = b""
        try:
            while chunk := os.read(ours, 65536):
                screen += chunk
        except OSError:  # the terminal's other side was closed
            pass
        assert process.wait(timeout=60) == 0
    os.close(ours)
    last = screen.decode().strip().rpartition("\r")[2]
    assert last.startswith("100%") and "10/10" in last
    assert re.search(r"loss 0\.3000 loss_dinov3 0\.3333 .* 10\.0 img/s 1234 tok/s", last)


def run_with_wandb(out: Path, environment: dict[str, str], start_steps: list[int]) -> str:
    """Record one step after each start, in a process without the user's settings; returns its stderr."""
    code = f"""
from pathlib import Path
from cogvit.config import RunConfig
from cogvit.training.meter import Meter
for start_step in {start_steps}:
    with Meter(Path({str(out)!r}), RunConfig(), writer=True, start_step=start_step) as meter:
        meter.record(start_step + 1, {{"loss": 1.0}})
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    clean |= {"HOME": str(out.parent), "NETRC": str(out.parent / "netrc")} | environment
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(out / "metrics.jsonl")) == start_steps[-1] + 1
    return done.stderr


def offline_records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Read a file of W&B: behind 7 bytes a log of LevelDB, blocks of 32 KiB of (checksum, size, kind) and a piece."""
    data, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        pieces, at = pieces + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


def test_three_starts_without_a_network_are_one_run_of_wandb(tmp_path: Path) -> None:
    """`wandb sync` puts files of one id together in the order of their starts."""
    assert "W&B" not in run_with_wandb(tmp_path / "run", {}, start_steps=[0, 1])
    assert "W&B" not in run_with_wandb(tmp_path / "run", {}, start_steps=[2])  # a process of its own
    files = sorted(tmp_path.glob("run/logs/wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 3
    ids, starts, steps = [], [], []
    for records in map(list, map(offline_records, files)):
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        ids.append((run.run_id, run.project, run.display_name))
        starts.append(run.start_time.ToNanoseconds())
        steps += [record.history.step.num for record in records if record.WhichOneof("record_type") == "history"]
    assert len(set(ids)) == 1 and starts == sorted(starts) and steps == [1, 2, 3]
    (tmp_path / "run" / "logs" / "wandb_id").write_text("")  # by a version that did not write it in one move
    assert "W&B" not in run_with_wandb(tmp_path / "run", {}, start_steps=[3])
    assert (tmp_path / "run" / "logs" / "wandb_id").read_text()


def test_wandb_failure_does_not_stop_the_run(tmp_path: Path) -> None:
    told = run_with_wandb(tmp_path / "run", {"WANDB_MODE": "no-such-mode"}, start_steps=[0])
    assert re.search(r"^W&B stopped \(.+\); metrics.jsonl goes on$", told, re.MULTILINE)


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    config = RunConfig(log=LogConfig(wandb="off", tensorboard=True))
    for start, stop in ((0, 4), (2, 6)):  # a resumed run goes on behind its checkpoint
        with Meter(tmp_path, config, writer=True, start_step=start) as meter:
            for step in range(start + 1, stop + 1):
                meter.record(step, {"loss": 10.0 * start + step})
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0), (6, 26.0),
    ]  # fmt: skip

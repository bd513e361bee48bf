"""Whole commands as a user runs them: both stages on two processes, a stop and a resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cogvit.training.checkpoint import folder_of, latest, read_state, weights
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_world
from tests.e2e.quiet import noise_of

ROOT = Path(__file__).parents[2]
SMALL = (
    "--data.global-batch-images", "16", "--data.tokens-per-pack", "256", "--data.images-per-pack", "12",
    "--eval.every-steps", "0", "--eval.steps", "1", "--log.wandb", "off",
)  # fmt: skip
TEACHERS = (
    "--teachers.members.siglip2.path", "teachers/siglip2", "--teachers.members.dinov3.path", "teachers/dinov3",
)  # fmt: skip
STAGE1 = ("launch/local.sh", "2", "demo_stage1", "--parallel.tp", "2", "--data.shards", "shards", *TEACHERS, *SMALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the repository's folders, shards, held-out shards and teachers."""
    directory = write_world(tmp_path_factory.mktemp("world"))
    for name in ("cogvit", "configs", "data_pipeline", "launch", "tools"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def environment() -> dict[str, str]:
    """This process's, with its Python first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": "."}


def start(world: Path, command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=world, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(world: Path, command: Sequence[str], status: int = 0, *, timeout_s: float = 280.0) -> str:
    """Run to the end; the output is in the failure."""
    process = start(world, command)
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == status, f"{' '.join(command)} left with {process.returncode}:\n{output[-3000:]}"
    assert noise_of(output) == [], "lines of a dependency"
    return output


@pytest.fixture(scope="module")
def stage1(world: Path) -> Path:
    """An undisturbed stage-1 run at tp=2 with Ray teachers."""
    output = run(world, [*STAGE1, "--schedule.steps", "8", "--out", "runs/straight"])
    assert "step 8/8 loss" in output and "img/s" in output and "tok/s" in output
    return world / "runs" / "straight"


@pytest.mark.timeout(600)
def test_a_stopped_run_resumes_as_if_nothing_happened(world: Path, stage1: Path) -> None:
    out = world / "runs" / "stopped"
    command = [*STAGE1, "--schedule.steps", "8", "--out", str(out)]
    process = start(world, command)
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    checkpoint = latest(folder_of(out))
    assert checkpoint is not None and 3 <= read_state(checkpoint).step < 8
    run(world, command)
    straight, resumed = (read_metrics(path / "metrics.jsonl") for path in (stage1, out))
    assert [line["step"] for line in resumed] == list(range(1, 9))
    for name in ("loss", "loss_siglip2", "loss_dinov3", "grad_norm", "lr"):
        assert [line[name] for line in resumed] == [line[name] for line in straight]
    final = [weights(folder_of(path) / "step_00000008", "") for path in (stage1, out)]
    assert final[0].keys() == final[1].keys() and "vision.blocks.3.mlp.fc2.weight" in final[0]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_stage_1_trains_on_a_stream_with_crops_and_colors(world: Path) -> None:
    """No index, and the teachers' actors see what the student sees: the images travel with the requests."""
    (world / "streams").mkdir()
    (world / "streams" / "numbers-00000.tar").symlink_to(world / "shards" / "numbers-00000.tar")
    flags = ["--data.order", "sequential", "--data.shards", "streams", "--data.crop", "0.5", "--data.color", "0.3"]
    run(world, [*STAGE1, *flags, "--schedule.steps", "3", "--out", "runs/stream"])
    lines = read_metrics(world / "runs" / "stream" / "metrics.jsonl")
    assert [line["images"] for line in lines] == [16.0] * 3 and all(0 < line["loss"] < 10 for line in lines)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_features_from_a_store_or_part_of_one_train_as_the_actors_do(world: Path, stage1: Path) -> None:
    """Held-out and training shards share the store under one name; without the training shard's the actors step in."""
    flags = [*TEACHERS, *SMALL, "--data.shards", "shards", "--data.eval-shards", "heldout", "--eval.every-steps", "4"]
    run(world, ["python", "-m", "tools.precompute_features", "demo_stage1", *flags, "--out", "features"])
    assert len(list((world / "features" / "siglip2").glob("numbers-00000.tar.*.safetensors"))) == 2
    online = read_metrics(stage1 / "metrics.jsonl")[:4]
    files = (world / "features" / "siglip2").glob("*.safetensors")
    training = max(files, key=lambda path: path.stat().st_size).name.split(".")[-2]
    for source in ("store", "store_then_online"):
        command = [*STAGE1, *flags, "--schedule.steps", "4", "--teachers.source", source]
        run(world, [*command, "--teachers.store", "features", "--out", f"runs/{source}"])
        lines = read_metrics(world / "runs" / source / "metrics.jsonl")
        for name in ("loss", "loss_siglip2", "loss_dinov3"):
            # The store's forward batches are others than the actors', so the features may differ in their last bits.
            expected = pytest.approx([line[name] for line in online], rel=0 if source == "store_then_online" else 1e-5)
            assert [line[name] for line in lines] == expected
        assert "eval_loss" in lines[3]
        for path in (world / "features").glob(f"*/numbers-00000.tar.{training}.safetensors"):
            path.unlink()


@pytest.mark.timeout(600)
def test_stage_2_starts_from_stage_1_and_is_evaluated_and_exported(world: Path, stage1: Path) -> None:
    command = ["launch/local.sh", "2", "demo_stage2", "--init", str(stage1), "--data.shards", "shards", *SMALL]
    command += ["--data.eval-shards", "heldout", "--schedule.steps", "3", "--out", "runs/stage2"]
    command += ["--eval.every-steps", "3", "--optim.lr", "0", "--optim.adamw-lr", "0"]
    run(world, command)
    lines = read_metrics(world / "runs" / "stage2" / "metrics.jsonl")
    assert {"loss", "temperature", "bias", "grad_norm_text", "valid_fraction"} <= lines[0].keys()
    assert "eval_loss" in lines[2]
    # With rates of 0 the vision tower is still the one of stage 1.
    before = weights(folder_of(stage1) / "step_00000008", "vision.")
    after = weights(folder_of(world / "runs" / "stage2") / "step_00000003", "vision.")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    run(world, ["python", "-m", "cogvit.evaluate", "runs/stage2", "--out", "eval.json"])
    figures = json.loads((world / "eval.json").read_text())
    assert {"knn_numbers", "linear_numbers", "zeroshot_numbers_en", "zeroshot_numbers_zh"} <= figures.keys()
    assert figures["zeroshot_numbers_en"]["accuracy"]["chance"] == 0.25

"""Both stages as a user starts them, from shards and a store made here: stopped, resumed, and repeated to the bit."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import statistics
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from cogvit.model.mim import TeacherWrapper
from cogvit.stages import read_run
from cogvit.teacher.stream import LocalFeatures
from cogvit.teacher.zoo import load_teacher
from cogvit.train import REQUEUE_STATUS, main
from cogvit.training.checkpoint import folder_of, latest, weights
from cogvit.training.meter import read_metrics
from data_pipeline.index import build_index
from data_pipeline.loader import image_of
from tools.gpu_check.work import Figures, Setting
from tools.precompute_features import plan_job, run_job

_MEMBERS = ("siglip2", "dinov3")
_TEACHER = f"{__name__}:teacher"
_TEACHER_DIM, _TEACHER_PATCH_PX = 48, 8


def teacher() -> TeacherWrapper:
    """Return a teacher that needs no files: random projections of 8 x 8 px."""
    generator = torch.Generator().manual_seed(5)
    projection = nn.Conv2d(3, _TEACHER_DIM, _TEACHER_PATCH_PX, stride=_TEACHER_PATCH_PX)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return TeacherWrapper(
        nn.Sequential(projection, nn.Flatten(2), _ChannelsLast()), _TEACHER_DIM, patch_size=_TEACHER_PATCH_PX
    )


class _ChannelsLast(nn.Module):
    def forward(self, x_BCN: torch.Tensor) -> torch.Tensor:
        return x_BCN.transpose(1, 2)


def stages(setting: Setting) -> Figures:
    """Train 20 steps of each stage from shards, stage 1 from a store; a signal stops them midway, and they resume."""
    num_steps = 4 if setting.small else 20
    with _workshop(setting) as shop:
        found: Figures = {"shards": write_shards(shop / "shards", setting), "store": _fill_store(shop, setting)}
        for number in (1, 2):
            out = shop / f"stage{number}"
            command = trainer_words(number, shop, out, num_steps, setting)
            statuses = [_train(command, setting, stop_after=num_steps // 2), _train(command, setting)]
            found[f"stage{number}"] = _outcome(out, statuses, num_steps)
    return found


def deterministic(setting: Setting) -> Figures:
    """Train stage 2 twice with --deterministic, once without a stop and once resumed: same bits? And at which cost?"""
    num_steps, found = 4 if setting.small else 10, Figures()
    with _workshop(setting) as shop:
        write_shards(shop / "shards", setting)
        outs = [shop / name for name in ("straight", "resumed", "free")]
        commands = [trainer_words(2, shop, out, num_steps, setting) for out in outs]
        found["straight"] = _outcome(outs[0], [_train([*commands[0], "--deterministic"], setting)], num_steps)
        again = [*commands[1], "--deterministic"]
        statuses = [_train(again, setting, stop_after=num_steps // 2), _train(again, setting)]
        found["resumed"] = _outcome(outs[1], statuses, num_steps)
        found["without"] = _outcome(outs[2], [_train(commands[2], setting)], num_steps)
        lines = [[(line["loss"], line["grad_norm"]) for line in read_metrics(out / "metrics.jsonl")] for out in outs]
        found["losses_equal_to_the_bit"] = lines[0] == lines[1]
        found["losses_equal_without_the_flag"] = lines[0] == lines[2]
        one, other = (_weights(out) for out in outs[:2])
        found["weights_that_differ"] = [name for name in one if not torch.equal(one[name], other[name])][:20]
        times = [found[name]["step_ms"] for name in ("straight", "without")]
        found["cost"] = times[0] / times[1] - 1.0
    return found


def write_shards(directory: Path, setting: Setting) -> Figures:
    """Write captioned pictures of many sizes as JPEGs, in two shards with their indexes."""
    count, longest_px = (24, 64) if setting.small else (512, 448)
    directory.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(directory / f"pictures-{shard:05d}.tar", "w") as archive:
            for number in range(count // 2):
                height_px, width_px = draw.integers(longest_px // 2, longest_px + 1, 2).tolist()
                coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                picture = io.BytesIO()
                coarse.resize((width_px, height_px), Image.Resampling.BICUBIC).save(picture, "JPEG", quality=90)
                captions = {"en": [f"picture {shard} {number}"], "zh": [f"图{shard}之{number}"]}
                text = json.dumps({"source": "pictures", "captions": captions}).encode()
                for extension, content in (("jpg", picture.getvalue()), ("json", text)):
                    info = tarfile.TarInfo(f"{number:05d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    for _ in build_index(str(directory)):
        continue
    return {"images": count, "longest_px": longest_px}


def _fill_store(shop: Path, setting: Setting) -> Figures:
    """Compute the teachers' features of all shards in this process, without Ray."""
    start_s = time.monotonic()
    preset, *flags = trainer_words(1, shop, shop / "store", 1, setting)
    config = read_run(preset, flags)
    job = plan_job(config)
    taught = {
        member.name: load_teacher(member.path, config.teachers.precision, device=setting.device)
        for member in config.teachers.members
    }
    run_job(job, LocalFeatures(taught, image_of))
    return {"files": len(list((shop / "store").rglob("*.safetensors"))), "seconds": time.monotonic() - start_s}


def trainer_words(number: int, shop: Path, out: Path, num_steps: int, setting: Setting) -> list[str]:
    """The trainer's words for a stage."""
    if setting.small:
        preset, shape = f"demo_stage{number}", ["--vision.depth", "1", "--data.global-batch-images", "8"]
        shape += ["--data.tokens-per-pack", "256", "--data.images-per-pack", "8"]
    else:
        preset, shape = f"stage{number}_small", ["--size", "large", "--data.global-batch-images", "32"]
        shape += ["--data.tokens-per-pack", "8192", "--data.images-per-pack", "32", "--data.max-patches", "1024"]
    words = [preset, "--data.shards", str(shop / "shards"), "--data.held-out", "0", *shape]
    words += ["--eval.every-steps", "0", "--log.wandb", "off", "--checkpoint.every-steps", "0"]
    words += ["--schedule.steps", str(num_steps), "--schedule.warmup-steps", "2", "--precision", "bf16"]
    words += ["--device", setting.device.type, "--out", str(out)]
    if number == 1:
        words += [word for name in _MEMBERS for word in (f"--teachers.members.{name}.path", _TEACHER)]
        words += ["--teachers.source", "store", "--teachers.store", str(shop / "store")]
    return words


def _train(command: list[str], setting: Setting, *, stop_after: int = 0) -> int:
    """Run the trainer here, which a signal asks to save and leave after so many steps; returns its exit status."""
    done = threading.Event()
    metrics = Path(command[command.index("--out") + 1]) / "metrics.jsonl"

    def ask_to_stop() -> None:
        while not done.wait(0.05):
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= stop_after:
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    watch = threading.Thread(target=ask_to_stop)
    with (setting.out / "runs.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        print(f"$ python -m cogvit.train {' '.join(command)}", flush=True)
        if stop_after:
            watch.start()
        try:
            return main(command)
        finally:
            done.set()
            if stop_after:
                watch.join()
            gc.collect()
            if not setting.small:
                torch.cuda.empty_cache()


def _outcome(out: Path, statuses: list[int], num_steps: int) -> Figures:
    lines = read_metrics(out / "metrics.jsonl")
    losses = [line["loss"] for line in lines]
    quick = lines[len(lines) // 2 + 1 :]  # a start compiles, and fills the allocator
    return {
        "ended": statuses[-1] == 0 and [line["step"] for line in lines] == list(range(1, num_steps + 1)),
        "stopped": len(statuses) == 1 or statuses[0] == REQUEUE_STATUS,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "step_ms": 1e3 * statistics.median(line["seconds"] for line in quick),
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in quick),
    }


def _weights(out: Path) -> dict[str, torch.Tensor]:
    newest = latest(folder_of(out))
    assert newest is not None
    return weights(newest, "")


@contextmanager
def _workshop(setting: Setting) -> Iterator[Path]:
    """A directory for one section, gone after it."""
    shop = setting.out / "work"
    shutil.rmtree(shop, ignore_errors=True)
    shop.mkdir(parents=True)
    try:
        yield shop
    finally:
        shutil.rmtree(shop, ignore_errors=True)

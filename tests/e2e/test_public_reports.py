"""What others have reported of programs like this one, with inputs of our own."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cogvit.model.tokenizer import load_tokenizer
from cogvit.train import main
from cogvit.training.claim import _rates_agree
from cogvit.training.meter import read_metrics
from data_pipeline.index import build_index, load_index
from tests.data.corpus import picture
from tests.e2e.corpus import write_shards
from tests.e2e.test_same_run import SMALL

ROOT = Path(__file__).parents[2]


def write_tar(path: Path, entries: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_apart_in_folders_and_with_long_names(tmp_path: Path, tar_format: int) -> None:
    """webdataset#407 (members not adjacent), #428 and #144 (long names, formats), #11 (one name in folders)."""
    long = "k" * (60 if tar_format == tarfile.USTAR_FORMAT else 180)
    images = [(f"{folder}/{long}{n}.png", picture(16, 16, seed=n)) for folder in "xy" for n in range(3)]
    texts = [(name.replace(".png", ".txt"), b"a caption") for name, _ in images]
    write_tar(tmp_path / "s.tar", images + texts, tar_format)
    assert [report.problems for report in build_index(str(tmp_path))] == [{}]
    assert len(load_index(str(tmp_path)).captioned()) == 6


def test_names_with_a_second_dot_are_told(tmp_path: Path) -> None:
    """open_clip#480: a writer's own members, whose training stood still without a word."""
    image = picture(16, 16, seed=0)
    write_tar(tmp_path / "s.tar", [("a.input.jpg", image), ("a.outputs.txt", b"x"), ("b.png", image)])
    (report,) = build_index(str(tmp_path))
    assert "an image with a second dot in its name (keys end at the first one)" in report.problems


def test_shards_of_classes_alone_are_refused_for_stage_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """open_clip#569: shards of images and classes, on which training froze."""
    write_tar(tmp_path / "s.tar", [("a.png", picture(16, 16, seed=0)), ("a.cls", b"3")])
    list(build_index(str(tmp_path)))
    argv = ["demo_stage2", "--data.shards", str(tmp_path), "--eval.every-steps", "0", "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    assert "none of the 1 samples has a caption" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    """DeepSpeed#3916, pytorch#73320: address already in use."""
    write_shards(tmp_path / "shards", "numbers-00000", 16)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "cogvit.train", "demo_stage2", "--data.shards", str(tmp_path / "shards")]
        command += ["--eval.every-steps", "0", "--out", str(tmp_path / "run")]
        env = os.environ | place | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: MASTER_ADDR=127.0.0.1 MASTER_PORT={port} is in use")
    assert "Traceback" not in done.stderr


def test_a_long_caption_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """sentence-transformers#3210 and many others: what is cut anyway is no reason for a warning."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_max_length=8).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), 10).encode("red " * 50, 16).cut
    assert not caplog.records


def test_an_earlier_step_can_be_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusion-pipe#263: is it safe to take the newest checkpoint away and go on from the one before?"""
    write_shards(tmp_path / "shards", "numbers-00000", 16)
    argv = ["demo_stage2", "--data.shards", str(tmp_path / "shards"), "--out", str(tmp_path / "run")]
    argv += ["--schedule.steps", "4", *SMALL]
    assert main(argv) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    capsys.readouterr()
    assert main(argv) == 0
    assert "resumes after step 2 of 4" in capsys.readouterr().out
    assert [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == losses


def test_a_late_step_is_gone_on_from_at_once() -> None:
    """openpifpaf#363: a schedule that is walked step by step took minutes to resume. Ours is asked once a step."""
    from cogvit.config import RunConfig, ScheduleConfig

    run = RunConfig(schedule=ScheduleConfig(steps=50_000, kind="constant"))
    longer = RunConfig(schedule=ScheduleConfig(steps=60_000, kind="constant"))
    assert _rates_agree(run, longer, 50_000)
    assert not _rates_agree(run, RunConfig(schedule=ScheduleConfig(steps=50_000, kind="cosine")), 50_000)


def test_any_json_of_a_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mmdetection#6572 and its kin: a run directory that another program or version has written to."""
    write_shards(tmp_path / "shards", "numbers-00000", 16)
    argv = ["demo_stage2", "--data.shards", str(tmp_path / "shards"), "--eval.every-steps", "0"]
    for number, value in enumerate(([], 3, {"vision": []}, {"data": {"mixture": [[1]]}}, {"optim": {"lr": "x"}})):
        out = tmp_path / f"run{number}"
        out.mkdir()
        (out / "config.json").write_text(json.dumps(value))
        assert main([*argv, "--out", str(out)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

"""`python -m cogvit.generate` on an export."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cogvit import VisionLanguageModel
from cogvit.config.arguments import run_command
from cogvit.generate import Arguments, generate
from cogvit.model.config import VideoConfig
from cogvit.model.video import VideoReader, shown_parts
from tests.clips import clip, sound
from tests.language import QUESTION, conversation, picture, tiny_vlm


def run(*argv: str) -> int:
    return run_command(list(argv), "usage", Arguments, generate)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    tiny_vlm(eos_ids=(0,)).save_pretrained(tmp_path / "export")
    for number, size_px in enumerate([(16, 24), (40, 24)]):
        picture(*size_px, seed=number).save(tmp_path / f"{number}.png")
    return tmp_path / "export"


def test_a_name_may_hold_commas(export: Path) -> None:
    (export.parent / "0.png").rename(export.parent / "a, b.png")
    assert run(str(export), "--prompt", "a", "--image", str(export.parent / "a, b.png"), "--max-new-tokens=1") == 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_it_prints_the_models_answer(export: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    files = [str(export.parent / f"{number}.png") for number in range(count)]
    flags = ["--image", ",".join(files)] if files else []
    assert run(str(export), "--prompt", QUESTION, *flags, "--max-new-tokens", "12") == 0
    pictures = [picture(16, 24, seed=0), picture(40, 24, seed=1)][:count]
    assert (
        capsys.readouterr().out
        == VisionLanguageModel.from_pretrained(export).generate(conversation(*pictures), max_new_tokens=12) + "\n"
    )


def test_a_video_is_asked_about_as_frames_with_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_vlm(eos_ids=(0,))
    model.video = VideoConfig(frames=2, first_s=0.5)
    model.save_pretrained(tmp_path / "export")
    (tmp_path / "a.mp4").write_bytes(clip(12))
    assert (
        run(str(tmp_path / "export"), "--prompt", "Which?", "--video", str(tmp_path / "a.mp4"), "--max-new-tokens=8")
        == 0
    )
    reader = VideoReader()
    frames = [Image.fromarray(frame) for frame in reader.frames(clip(12), [0, 500], (48, 64))]
    reader.close()
    texts = ("0.0s", "0.5s", "Which?")
    parts = [{"type": "text", "text": text} for text in texts]
    shown = [{"type": "image", "image": frame} for frame in frames]
    content = [parts[0], shown[0], parts[1], shown[1], parts[2]]
    assert capsys.readouterr().out == model.generate([{"role": "user", "content": content}], 8) + "\n"
    (tmp_path / "b.mp4").write_bytes(sound())
    assert run(str(tmp_path / "export"), "--prompt", "a", "--video", str(tmp_path / "b.mp4")) == 2
    told = f"error: the video {tmp_path / 'b.mp4'} cannot be read: a video without a moving picture, sound alone\n"
    assert capsys.readouterr().err == told


def test_a_video_of_wide_pixels_is_shown_as_players_do(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clip(2, aspect=2))
    frames = [part for part in shown_parts({"type": "video", "video": tmp_path / "a.mp4"}, VideoConfig(times=False))]
    assert [frame["image"].size for frame in frames] == [(128, 48)] * 2  # as it is measured for training
    (tmp_path / "b.mp4").write_bytes(clip(1, aspect=2, turned=90))
    (turned,) = shown_parts({"type": "video", "video": tmp_path / "b.mp4"}, VideoConfig(times=False))
    assert turned["image"].size == (24, 64)


def test_a_glm_ocr_of_transformers_is_asked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_vlm(eos_ids=(0,))
    model.save_glm_ocr_full(tmp_path)
    assert run(str(tmp_path), "--prompt", QUESTION, "--max-new-tokens=12", "--temperature=2", "--seed=5") == 0
    assert capsys.readouterr().out == model.generate(conversation(), 12, temperature=2.0, seed=5) + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--prompt TEXT is needed"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens=0 must be at least 1"),
        (["--prompt", "a", "--max-new-tokens", "many"], "--max-new-tokens many must be a number"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature=-1.0 must be 0"),
        (["--prompt", "a", "--image", "none.png"], "the image (none.png) cannot be read: No such file"),
        (["--prompt", "a", "--video", "none.mp4"], "the video none.mp4 cannot be read: No such file"),
        (["--prompt", "a", "--max-new-tokens", "5000"], "exceed the model's max_tokens=512"),
        (["--prompt", "<|image|>"], "1 <|image|> for 0 images"),
        (["--prompt", "a\udcff"], "it holds half a surrogate pair"),
        (["--prompt", "a", "--history", '[{"role": "user", "content": 5}]'], "its content text or parts"),
        (["--prompt", "a", "--history", '[{"role": "user", "content": null}]'], "its content text or parts"),
        (["--prompt", "a", "--history", '[{"role": ["user"], "content": "a"}]'], "its role must be text"),
        (["--prompt", "a", "--history", '[{"role": "user", "content": "\\ud800"}]'], "half a surrogate pair"),
    ],
)
def test_mistakes_are_one_line(
    export: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    if "--history" in flags:
        file = export.parent / "history.json"
        file.write_text(flags[-1])
        flags = [*flags[:-1], str(file)]
    assert run(str(export), *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_what_is_no_export_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path), "--prompt", "a") == 2
    assert "config.json does not exist; is" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"objective": "language"}')
    assert run(str(tmp_path), "--prompt", "a") == 2
    assert "is a run; python -m tools.export" in capsys.readouterr().err

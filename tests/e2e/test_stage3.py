"""Stage 3 trains, is killed, resumes on other layouts, keeps what is frozen, and gives a model that answers."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvit import VisionLanguageModel
from cogvit.config import ModuleConfig, ParallelConfig, RunConfig
from cogvit.errors import CheckpointError
from cogvit.generate import Arguments, generate
from cogvit.model.layouts.causal_lm import read_causal_lm
from cogvit.train import main
from cogvit.training.checkpoint import folder_of, latest, stored_shapes, weights
from cogvit.training.joint import load_joint
from cogvit.training.meter import read_metrics
from tests.conversations import indexed, preset, stage3, write_language_model, write_talks
from tests.e2e.test_own_shards import refusal, train_on_rank
from tests.language import picture
from tests.pool import Pool
from tools.export import Arguments as ExportArguments
from tools.export import export


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose shards and language model are there."""
    directory = tmp_path_factory.mktemp("stage3")
    indexed(write_talks(directory / "shards"))
    return stage3(directory / "shards", write_language_model(directory / "language"))


@pytest.fixture(scope="module")
def straight(base: RunConfig, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process."""
    return run(pool, 1, base, tmp_path_factory.mktemp("straight") / "run")


def run(pool: Pool, world: int, config: RunConfig, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    argv = [preset(out.parent, config), "--out", str(out)]
    assert pool.run(train_on_rank, world, (argv,), timeout_s=150.0) == [0] * world
    return out


def losses(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(out / "metrics.jsonl") if name in line]


def digests(out: Path) -> dict[str, str]:
    checkpoint = latest(folder_of(out))
    assert checkpoint is not None
    return {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in weights(checkpoint, "").items()}


def test_metrics_say_what_was_read_and_what_images_are_worth(straight: Path) -> None:
    lines = read_metrics(straight / "metrics.jsonl")
    assert [line["step"] for line in lines if "image_effect" in line] == [4, 6]
    assert all({"eval_loss", "eval_answer_tokens"} <= line.keys() for line in (lines[3], lines[5]))
    assert all(0 < line["answer_tokens"] < line["tokens"] <= 12 * 72 for line in lines)
    assert losses(straight)[-1] < losses(straight)[0]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, ParallelConfig(tp=2, sequence=True), id="sp2", marks=pytest.mark.long),
        pytest.param(2, ParallelConfig(pp=2), id="pp2"),
        pytest.param(2, ParallelConfig(), id="dp2", marks=pytest.mark.long),
    ],
)
def test_every_layout_has_the_same_losses(
    base: RunConfig, straight: Path, pool: Pool, tmp_path: Path, world: int, parallel: ParallelConfig
) -> None:
    out = run(pool, world, replace(base, parallel=parallel), tmp_path / "run")
    for name in ("loss", "eval_loss"):
        assert losses(out, name) == pytest.approx(losses(straight, name), rel=1e-5)
    # Other images are those of the same pack, and packs differ between numbers of ranks.
    if parallel.tp > 1:
        assert losses(out, "image_effect") == pytest.approx(losses(straight, "image_effect"), abs=1e-5)


def train_until_killed(rank: int, world: int, argv: list[str], metrics: str, step: int) -> int:
    """Train; rank 0 kills itself once a step is recorded."""

    def watch() -> None:
        while not os.path.exists(metrics) or f'"step": {step},' not in Path(metrics).read_text():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        threading.Thread(target=watch, daemon=True).start()
    return main(argv)


def test_a_killed_run_ends_with_the_same_bits(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    argv = [preset(tmp_path, base), "--out", str(out := tmp_path / "run")]
    with pytest.raises(ChildProcessError, match="-9"):
        pool.run(train_until_killed, 1, (argv, str(out / "metrics.jsonl"), 5), timeout_s=150.0)
    assert pool.run(train_on_rank, 1, (argv,), timeout_s=150.0) == [0]
    assert losses(out) == losses(straight) and digests(out) == digests(straight)


def test_four_ranks_go_on_as_two(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    out = run(pool, 4, base, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    run(pool, 2, replace(base, parallel=ParallelConfig(tp=2)), out)
    assert losses(out) == pytest.approx(losses(straight), rel=1e-6)


def test_what_is_frozen_is_not_stored_and_stays(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    still = ModuleConfig(lr_mult=0.0)
    language = Path(shutil.copytree(base.language.path, tmp_path / "language"))
    config = replace(
        base,
        language=replace(base.language, path=str(language)),
        optim=replace(base.optim, vision=still, language=still),
    )
    exported = tmp_path / "exported"
    assert export(ExportArguments(str(straight), str(exported))) == 0
    out = run(pool, 2, replace(config, init=str(exported), parallel=ParallelConfig(pp=2)), tmp_path / "run")
    checkpoint = latest(folder_of(out))
    assert checkpoint is not None
    assert {name.partition("/")[2].partition(".")[0] for name in stored_shapes(checkpoint)} == {"adapter"}
    model, trained = load_joint(out), load_joint(straight)
    _, source = read_causal_lm(language)
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.language.state_dict().items())
    for name, tensor in model.vision.state_dict().items():
        assert torch.equal(tensor, trained.vision.state_dict()[name])
    assert not torch.equal(model.adapter.fc2.weight, trained.adapter.fc2.weight)
    _change(language / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"was frozen and lies in --language.path .* which is another one now"):
        load_joint(out)


def _change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def asked(path: Path, image: Path) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert generate(Arguments(str(path), prompt="What?", image=str(image), max_new_tokens="6")) == 0
    return printed.getvalue()


def test_run_and_exports_answer_alike(straight: Path, tmp_path: Path) -> None:
    picture(30, 41).save(image := tmp_path / "image.png")
    answers = {asked(straight, image)}
    for layout in ("vlm", "glm_ocr_full"):
        assert export(ExportArguments(str(straight), str(tmp_path / layout), layout)) == 0
        answers.add(asked(tmp_path / layout, image))
        there, here = VisionLanguageModel.from_pretrained(tmp_path / layout), load_joint(straight)
        assert there.limits == here.limits
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--language.path", "/nowhere"], "--language.path /nowhere does not exist; pass a directory"),
        (["--language.max-tokens", "500"], "does not fit data.text_tokens_per_pack=160"),
        (["--language.max-patches", "500"], "--language.max-patches 500 must be from 4 to"),
        (["--adapter.spatial-pool", "3"], "stage 3 needs --data.sizing glm and --data.grid-multiple 3"),
        (["--data.sizing", "naflex"], "stage 3 needs --data.sizing glm"),
        (["--data.flip", "true"], "--data.flip and --data.crop change what stage 3's answers say"),
        (["--data.crop", "0.5"], "--data.flip and --data.crop change what stage 3's answers say"),
        (["--adapter.kind", "linear"], "--adapter.kind linear: must be one of mlp, glm, swiglu, conv"),
        (["--contrast.loss", "ring"], "--contrast.loss is of Stage 2"),
        (
            [word for part in ("vision", "adapter", "language") for word in (f"--optim.{part}.lr-mult", "0")],
            "are all 0: nothing is trained",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(
    base: RunConfig, pool: Pool, tmp_path: Path, flags: list[str], message: str
) -> None:
    argv = [preset(tmp_path, base), "--out", str(tmp_path / "run"), *flags]
    ((status, printed),) = pool.run(refusal, 1, (argv,))
    assert status == 2 and message in printed and printed.count("\n") == 1


def test_an_adapter_of_another_width_is_refused_in_a_line(
    base: RunConfig, straight: Path, pool: Pool, tmp_path: Path
) -> None:
    argv = [
        preset(tmp_path, base),
        "--out",
        str(tmp_path / "run"),
        "--init",
        str(straight),
        "--adapter.hidden-dim",
        "9",
    ]
    ((status, printed),) = pool.run(refusal, 1, (argv,))
    assert status == 2 and "has adapter.fc1.weight of (" in printed and printed.count("error: ") == 1


def test_a_language_model_that_does_not_fit_is_refused_in_a_line(base: RunConfig, pool: Pool, tmp_path: Path) -> None:
    config = Path(shutil.copytree(base.language.path, tmp_path / "other")) / "config.json"
    good = config.read_text()
    argv = [preset(tmp_path, base), "--out", str(tmp_path / "run"), "--language.path", str(config.parent)]
    for before, after, message in (
        ('"glm4"', '"t5"', "'t5', which is no causal language model of transformers"),
        ('"vocab_size": 288', '"vocab_size": 100', "has a tokenizer with ids to 264, and its vocab_size is 100"),
    ):
        config.write_text(good.replace(before, after))
        ((status, printed),) = pool.run(refusal, 1, (argv,))
        assert status == 2 and message in printed and printed.count("\n") == 1
    config.write_text(good)
    ((status, printed),) = pool.run(refusal, 1, ([*argv, "--parallel.tp", "4", "--dry-run"],))
    assert status == 2 and printed.count("\n") == 1


@pytest.mark.long
def test_a_language_model_of_another_family_lies_whole_on_the_last_stage(
    base: RunConfig, pool: Pool, tmp_path: Path
) -> None:
    """Two ranks as a pipeline, then as replicas from half way; run and export answer alike, and tensor ranks refuse."""
    path = write_language_model(tmp_path / "gpt_neox", "gpt_neox")
    config = replace(base, language=replace(base.language, path=str(path)))
    out = run(pool, 2, replace(config, parallel=ParallelConfig(pp=2)), tmp_path / "run")
    whole = losses(out)
    assert whole[-1] < whole[0] and len(losses(out, "image_effect")) == 2
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    run(pool, 2, config, out)
    assert losses(out) == pytest.approx(whole, rel=1e-5)
    picture(30, 41).save(image := tmp_path / "image.png")
    assert export(ExportArguments(str(out), str(tmp_path / "vlm"), "vlm")) == 0
    assert asked(out, image) == asked(tmp_path / "vlm", image)
    argv = [preset(tmp_path, config), "--out", str(tmp_path / "refused")]
    for world, flags, message in (
        (2, ["--parallel.tp", "2"], "--parallel.tp 2 cannot split a language model of family gpt_neox"),
        (1, ["--mmtp.depths", "1"], "--mmtp.depths 1: heads are of llama, glm, glm4, qwen3"),
        (1, ["--memory.language.recompute", "full"], "is a gpt_neox and keeps its activations"),
    ):
        (status, printed), *_ = pool.run(refusal, world, ([*argv, *flags],))
        assert status == 2 and message in printed and printed.count("\n") == 1

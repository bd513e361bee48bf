"""Stage 3 with heads for more tokens: trained on layouts, resumed, exported, and at work as drafts."""

from __future__ import annotations

import io
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from cogvit import VisionLanguageModel
from cogvit.config import ParallelConfig, RunConfig
from cogvit.generate import Arguments, generate
from cogvit.model.config import MmtpConfig
from cogvit.training.joint import load_joint
from tests.conversations import indexed, preset, stage3, write_language_model, write_talks
from tests.e2e.test_own_shards import refusal
from tests.e2e.test_stage3 import losses, run
from tests.language import picture
from tests.pool import Pool
from tools.export import Arguments as ExportArguments
from tools.export import export

HEADS = ("loss", "loss_mtp_1", "loss_mtp_2", "eval_loss_mtp_2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two heads, whose shards and language model are there."""
    directory = tmp_path_factory.mktemp("mmtp")
    indexed(write_talks(directory / "shards"))
    config = stage3(directory / "shards", write_language_model(directory / "language"))
    return replace(config, mmtp=MmtpConfig(2))


@pytest.fixture(scope="module")
def straight(base: RunConfig, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process."""
    return run(pool, 1, base, tmp_path_factory.mktemp("straight") / "run")


def test_every_depth_is_measured_and_learns(straight: Path) -> None:
    for name in HEADS[:3]:
        assert len(losses(straight, name)) == 6 and losses(straight, name)[-1] < losses(straight, name)[0], name
    assert len(losses(straight, "eval_loss_mtp_2")) == 2


@pytest.mark.long
def test_a_run_goes_on_in_another_layout(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    out = run(pool, 2, replace(base, parallel=ParallelConfig(pp=2)), tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    run(pool, 2, replace(base, parallel=ParallelConfig(tp=2, sequence=True)), out)
    for name in HEADS:
        assert losses(out, name) == pytest.approx(losses(straight, name), rel=1e-5), name


def asked(path: Path, image: Path, draft: str) -> tuple[str, str]:
    printed, said = io.StringIO(), io.StringIO()
    arguments = Arguments(str(path), prompt="What?", image=str(image), max_new_tokens="12", draft=draft)
    with redirect_stdout(printed), redirect_stderr(said):
        assert generate(arguments) == 0
    return printed.getvalue(), said.getvalue()


def test_the_run_and_its_exports_draft(straight: Path, tmp_path: Path) -> None:
    picture(30, 41).save(image := tmp_path / "image.png")
    alone, _ = asked(straight, image, "none")
    for layout in ("", "vlm", "glm_ocr_full"):
        path = tmp_path / layout if layout else straight
        assert not layout or export(ExportArguments(str(straight), str(path), layout)) == 0
        answer, said = asked(path, image, "mtp")
        assert answer == alone and said.startswith("accepted length "), layout
    heads = load_joint(straight).language.state_dict()
    again = VisionLanguageModel.from_pretrained(tmp_path / "glm_ocr_full").language.state_dict()
    assert {name for name in heads if name.startswith("mtp.")} <= again.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mmtp.depths", "80"], "--mmtp.depths 80 must be below --language.max-tokens"),
        (["--mmtp.depths", "-1"], "mmtp.depths=-1 must be at least 0"),
        (["--mmtp.images", "some"], "--mmtp.images some: must be one of embeddings, masked, token, token_path, tokens"),
        (["--optim.language.lr-mult", "0"], "the heads learn with the language model"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused_in_a_line(
    base: RunConfig, pool: Pool, tmp_path: Path, flags: list[str], message: str
) -> None:
    argv = [preset(tmp_path, base), "--out", str(tmp_path / "run"), *flags]
    ((status, printed),) = pool.run(refusal, 1, (argv,))
    assert status == 2 and message in printed and printed.count("\n") == 1


def test_sequences_that_tensor_ranks_do_not_divide_are_refused_in_a_line(
    base: RunConfig, pool: Pool, tmp_path: Path
) -> None:
    argv = [preset(tmp_path, base), "--out", str(tmp_path / "run"), "--mmtp.images", "embeddings"]
    argv += ["--parallel.tp", "2", "--parallel.sequence", "true", "--data.text-tokens-per-pack", "161"]
    (status, printed), *_ = pool.run(refusal, 2, (argv,))
    assert status == 2 and "text_tokens_per_pack: 161 tokens over tp=2 do not divide" in printed

"""A cross module trains beside a language model that stays as it is, goes on in another layout, and comes back out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvit import VisionLanguageModel
from cogvit.config import ModuleConfig, ParallelConfig, RunConfig
from cogvit.errors import CheckpointError
from cogvit.model.config import AdapterConfig, CogViTConfig, CrossModuleConfig, ExpertConfig
from cogvit.model.expert import is_grown
from cogvit.model.language import CausalLM
from cogvit.training.checkpoint import folder_of, latest, stored_shapes
from cogvit.training.joint import load_joint
from tests.conversations import PATCH_PX, indexed, preset, stage3, write_language_model, write_talks
from tests.e2e.test_expert import losses, refusals, run
from tests.language import conversation, picture
from tests.pool import Pool
from tools.export import Arguments as ExportArguments
from tools.export import export

CROSS = CrossModuleConfig(32, PATCH_PX, 64, 2, 1, 48, 32)  # with heads of 64, as released


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of CogAgent's make: CogVLM's, and a second encoder that sees twice as many patches a side."""
    directory = tmp_path_factory.mktemp("cross")
    indexed(write_talks(directory / "shards"))
    language = write_language_model(directory / "language", "llama", num_key_value_heads=4)
    config = stage3(directory / "shards", language, max_patches=16, min_patches=0)
    vision = CogViTConfig(
        image_size=16, patch_size=PATCH_PX, embed_dim=32, depth=2, num_heads=2, use_qk_norm=False, norm_after=True
    )
    return replace(
        config,
        vision=vision,
        data=replace(config.data, sizing="square", grid_multiple=1),
        adapter=AdapterConfig("swiglu", spatial_pool=1),
        expert=ExpertConfig(1),
        cross=CROSS,
        optim=replace(config.optim, language=ModuleConfig(lr_mult=0.0)),
    )


@pytest.fixture(scope="module")
def straight(base: RunConfig, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process."""
    return run(pool, 1, base, tmp_path_factory.mktemp("straight") / "run")


def test_a_run_goes_on_in_another_layout(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    run(pool, 2, replace(base, parallel=ParallelConfig(tp=2, sequence=True)), out)
    for name in ("loss", "eval_loss"):
        assert losses(out, name) == pytest.approx(losses(straight, name), rel=1e-5)
    assert len(losses(out)) == 6 and losses(straight)[-1] < losses(straight)[0]


@pytest.mark.long
def test_a_pipeline_trains_alike(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    out = run(pool, 2, replace(base, parallel=ParallelConfig(pp=2)), tmp_path / "run")
    for name in ("loss", "eval_loss"):
        assert losses(out, name) == pytest.approx(losses(straight, name), rel=1e-5)


def test_what_grew_is_stored_and_text_is_the_language_models(base: RunConfig, straight: Path) -> None:
    checkpoint = latest(folder_of(straight))
    assert checkpoint is not None
    names = {name.partition("/")[2] for name in stored_shapes(checkpoint)}
    assert {name.split(".")[0] for name in names} == {"vision", "adapter", "frame", "language", "cross"}
    assert all(is_grown(name) for name in names if name.startswith("language."))
    model, before = load_joint(straight), CausalLM.from_pretrained(base.language.path)
    assert all(block.cross.proj.weight.any() for block in model.causal.blocks)
    ids = torch.arange(9, 25).unsqueeze(0)
    assert torch.equal(model.language(ids), before(ids))


def test_a_run_becomes_a_released_directory(straight: Path, tmp_path: Path) -> None:
    assert export(ExportArguments(str(straight), str(tmp_path / "cogagent"), "cogagent")) == 0
    one, other = load_joint(straight), VisionLanguageModel.from_pretrained(tmp_path / "cogagent")
    ids, images = one.prompt(conversation(picture(30, 41)))
    seen = one(ids[None], [images])
    torch.testing.assert_close(seen, other(ids[None], [images]), rtol=1e-5, atol=1e-5)
    assert other.cross is not None and other.cross.cfg.image_size == CROSS.image_size
    with torch.no_grad():
        for block in one.causal.blocks:
            block.cross.proj.weight.zero_()
    assert not torch.equal(seen, one(ids[None], [images]))
    other.save_pretrained(tmp_path / "again", layout="cogagent")
    written, read = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("cogagent", "again"))
    assert written == read
    with pytest.raises(CheckpointError, match="layout cogvlm cannot hold this model, whose layout is cogagent"):
        export(ExportArguments(str(straight), str(tmp_path / "other"), "cogvlm"))


def test_what_cannot_be_is_refused_in_a_line(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    cases = {
        "--cross.image-size 0": "cross.image_size: 32 -> 0",
        "--cross.image-size 48": "cross.image_size: 32 -> 48",
        "--cross.image-size 30": "cross.patch_size=4 does not divide cross.image_size=30",
        "--cross.dim 30": "--cross.dim 30 must be a multiple of the 4 heads",
        "--optim.cross.lr-mult 0": "pass an optim.cross.lr_mult above 0",
    }
    before = sorted(path.name for path in (straight / "checkpoints").iterdir())
    commands = [[preset(tmp_path, base), "--out", str(straight), *flags.split()] for flags in cases]
    without = tmp_path / "without"
    without.mkdir()
    argv = [preset(without, replace(base, cross=CrossModuleConfig(), init=str(straight)))]
    commands.append([*argv, "--out", str(tmp_path / "other")])
    messages = [*cases.values(), "has a cross module, and not this one: image_size is 32 there and 0 here"]
    for message, (status, printed) in zip(messages, pool.run(refusals, 1, (commands,))[0], strict=True):
        assert status == 2 and message in printed and printed.count("\n") == 1, printed
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == before

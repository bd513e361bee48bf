"""Visual experts train beside a language model that stays as it is, in every layout, and come back out of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvit import VisionLanguageModel
from cogvit.config import ModuleConfig, ParallelConfig, RunConfig
from cogvit.errors import CheckpointError
from cogvit.model.config import AdapterConfig, CogViTConfig, ExpertConfig
from cogvit.model.expert import beginning_of, is_expert
from cogvit.model.language import CausalLM
from cogvit.training.checkpoint import folder_of, latest, stored_shapes
from cogvit.training.identity import identity_of
from cogvit.training.joint import load_joint
from cogvit.training.meter import read_metrics
from tests.conversations import PATCH_PX, indexed, preset, stage3, write_language_model, write_talks
from tests.e2e.test_own_shards import refusal, train_on_rank
from tests.language import conversation, picture
from tests.pool import Pool
from tools.export import Arguments as ExportArguments
from tools.export import export


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with experts in every second block of a GLM-4."""
    directory = tmp_path_factory.mktemp("expert")
    indexed(write_talks(directory / "shards"))
    config = stage3(directory / "shards", write_language_model(directory / "language"))
    still = replace(config.optim, language=ModuleConfig(lr_mult=0.0))
    return replace(config, adapter=AdapterConfig("conv"), expert=ExpertConfig(2, qkv_bias=True), optim=still)


def run(pool: Pool, world: int, config: RunConfig, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    argv = [preset(out.parent, config), "--out", str(out)]
    assert pool.run(train_on_rank, world, (argv,), timeout_s=150.0) == [0] * world
    return out


@pytest.fixture(scope="module")
def straight(base: RunConfig, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process."""
    return run(pool, 1, base, tmp_path_factory.mktemp("straight") / "run")


def losses(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(out / "metrics.jsonl") if name in line]


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(tp=2, sequence=True), id="sp2", marks=pytest.mark.long),
        pytest.param(ParallelConfig(pp=2), id="pp2"),
    ],
)
def test_every_layout_trains_alike(
    base: RunConfig, straight: Path, pool: Pool, tmp_path: Path, parallel: ParallelConfig
) -> None:
    out = run(pool, 2, replace(base, parallel=parallel), tmp_path / "run")
    for name in ("loss", "eval_loss"):
        assert losses(out, name) == pytest.approx(losses(straight, name), rel=1e-5)
    assert losses(straight)[-1] < losses(straight)[0]


def test_the_language_model_stays_and_its_experts_are_stored(base: RunConfig, straight: Path) -> None:
    checkpoint = latest(folder_of(straight))
    assert checkpoint is not None
    names = {name.partition("/")[2] for name in stored_shapes(checkpoint)}
    assert {name.split(".")[0] for name in names} == {"vision", "adapter", "frame", "language"}
    assert all(is_expert(name) for name in names if name.startswith("language."))
    model, before = load_joint(straight), CausalLM.from_pretrained(base.language.path)
    weights = model.language.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in before.state_dict().items())
    for name in filter(is_expert, weights):
        began = before.state_dict().get(beginning_of(name))
        assert began is None or not torch.equal(weights[name], began), name
    ids = torch.arange(9, 25).unsqueeze(0)
    assert torch.equal(model.language(ids), before(ids))
    assert identity_of(base, "")["language.path"] in (straight / "identity.json").read_text()


def test_a_run_and_its_export_answer_alike(straight: Path, tmp_path: Path) -> None:
    assert export(ExportArguments(str(straight), str(tmp_path / "vlm"), "vlm")) == 0
    one, other = load_joint(straight), VisionLanguageModel.from_pretrained(tmp_path / "vlm")
    asked = conversation(picture(30, 41))
    assert one.generate(asked, 6) == other.generate(asked, 6)
    ids, images = one.prompt(asked)
    torch.testing.assert_close(one(ids[None], [images]), other(ids[None], [images]), rtol=0, atol=0)


@pytest.fixture(scope="module")
def released(base: RunConfig, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of a model of CogVLM2's make: its encoder's blocks, squares of one size, a Llama of its rotation."""
    directory = tmp_path_factory.mktemp("released")
    rotation = {"rope_type": "default", "rope_theta": 500000.0}
    language = write_language_model(directory / "language", "llama", rope_parameters=rotation)
    vision = CogViTConfig(
        image_size=16, patch_size=PATCH_PX, embed_dim=32, depth=2, num_heads=2, use_qk_norm=False, norm_after=True
    )
    config = replace(
        base,
        vision=vision,
        language=replace(base.language, path=str(language)),
        expert=ExpertConfig(1, qkv_bias=True),
        data=replace(base.data, sizing="square", max_patches=16, min_patches=0),
        schedule=replace(base.schedule, steps=1),
    )
    return run(pool, 1, config, directory / "run")


def test_a_run_of_the_released_make_becomes_a_released_directory(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(ExportArguments(str(released), str(tmp_path / "cogvlm2"), "cogvlm2")) == 0
    assert "in the words of cogvlm2, and not by the chat template that it was trained with" in capsys.readouterr().out
    one, other = load_joint(released), VisionLanguageModel.from_pretrained(tmp_path / "cogvlm2")
    ids, images = one.prompt(conversation(picture(30, 41)))
    torch.testing.assert_close(one(ids[None], [images]), other(ids[None], [images]), rtol=1e-5, atol=1e-5)
    assert isinstance(other.generate(conversation(picture(30, 41)), 4), str)
    again = tmp_path / "again"
    other.save_pretrained(again, layout="cogvlm2")
    written, read = ((place / "model.safetensors").read_bytes() for place in (tmp_path / "cogvlm2", again))
    assert written == read


@pytest.mark.parametrize(
    ("layout", "made", "message"),
    [
        ("cogvlm2", "straight", "norms behind its branches (--vision.norm-after true); --vision.norm layernorm"),
        ("cogvlm", "released", "layout cogvlm cannot hold this model, whose layout is cogvlm2"),
        ("cogagent", "released", "layout cogagent cannot hold this model, whose layout is cogvlm2"),
    ],
)
def test_a_run_of_another_make_is_refused_by_what_differs(
    request: pytest.FixtureRequest, tmp_path: Path, layout: str, made: str, message: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        export(ExportArguments(str(request.getfixturevalue(made)), str(tmp_path / "out"), layout))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def refusals(rank: int, world: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    return [refusal(rank, world, argv) for argv in commands]


def test_what_cannot_be_is_refused_in_a_line(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    cases = {
        "--expert.every 0": "expert.every: 2 -> 0",
        "--optim.language.lr-mult 1": "pass --optim.language.lr-mult 0",
        "--optim.expert.lr-mult 0": "an optim.expert.lr_mult above 0",
        "--expert.every -1": "expert.every=-1 must be 0 (none) or above",
        "--mmtp.depths 1": "the heads learn with the language model",
        "--data.sizing square --language.max-patches 12": "squares of vision.image_size=16 px have 4 x 4 patches",
    }
    before = sorted(path.name for path in (straight / "checkpoints").iterdir())
    start = [preset(tmp_path, base), "--out", str(straight)]
    found = pool.run(refusals, 1, ([[*start, *flags.split()] for flags in cases],))[0]
    for (flags, message), (status, printed) in zip(cases.items(), found, strict=True):
        assert status == 2 and message in printed and printed.count("\n") == 1, flags
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == before


def test_a_run_goes_on_from_experts_alone_with_experts(
    base: RunConfig, straight: Path, pool: Pool, tmp_path: Path
) -> None:
    config = replace(base, schedule=replace(base.schedule, steps=1), init=str(straight))
    out = run(pool, 1, config, tmp_path / "run")
    assert losses(out)[0] < losses(straight)[0]
    argv = [preset(tmp_path, replace(config, expert=ExpertConfig())), "--out", str(tmp_path / "other")]
    ((status, printed),) = pool.run(refusal, 1, (argv,))
    assert status == 2 and "has visual experts in every 2th block" in printed and printed.count("\n") == 1

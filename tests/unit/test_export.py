"""Exports load elsewhere with the same features; the tools around checkpoints tell what is there and what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextVisionModel

from cogvit import CogViT, evaluate
from cogvit.config import DataConfig, RunConfig, TextEncoderConfig
from cogvit.config.arguments import run_command
from cogvit.errors import CheckpointError
from cogvit.evaluation.features import embed_images, embed_texts, image_features
from cogvit.evaluation.results import read_evaluation
from cogvit.evaluation.subject import load_subject
from cogvit.model.packing import pack_images
from cogvit.stages import contrast, distill
from cogvit.training.restore import initial_towers
from tests.runs_on_disk import TEXT, VISION, contrast_run, write_run, write_shards
from tools import checkpoint, export

FILES = {"config.json", "model.safetensors", "modeling_cogvit.py", "preprocessor_config.json"}


def run_export(*argv: str) -> int:
    return run_command(list(argv), "usage", export.Arguments, export.export)


def run_checkpoint(*argv: str) -> int:
    return run_command(list(argv), "usage", checkpoint.Arguments, checkpoint.inspect)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contrast_run(tmp_path_factory.mktemp("run") / "stage2", DataConfig())


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake."""
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and captured.out == ""
    return line


def test_export_has_the_features_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shards(tmp_path / "data")
    run = contrast_run(tmp_path / "run", data)
    assert run_export(str(run), "--out", str(tmp_path / "deep" / "export")) == 0
    assert "from_pretrained" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "deep" / "export").iterdir()} == FILES
    trained, exported = load_subject(run), load_subject(tmp_path / "deep" / "export", data.eval_shards)
    assert exported.towers.text is None and exported.config is None
    for samples in trained.samples:
        expected = image_features(trained.towers.vision, samples, trained.sizing)
        assert torch.equal(expected, image_features(exported.towers.vision, samples, exported.sizing))
    vision = CogViT.from_pretrained(tmp_path / "deep" / "export").eval()
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(vision(image)["patch_tokens"], trained.towers.vision(image)["patch_tokens"])


def test_export_of_both_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_shards(tmp_path / "data"), tmp_path / "export"
    run = contrast_run(tmp_path / "run", data)
    assert run_export(str(run), "--out", str(out), "--layout", "two_towers") == 0
    assert {path.name for path in out.iterdir()} == {*FILES, "text_side"}
    trained, exported = load_subject(run), load_subject(out, data.eval_shards)
    assert torch.equal(CogViT.from_pretrained(out).norm.weight, trained.towers.vision.norm.weight)
    captions, features = ["a red picture", "\u56fe1", "x" * 99], torch.randn(3, VISION.embed_dim)
    assert torch.equal(embed_texts(exported, captions), embed_texts(trained, captions))
    assert torch.equal(embed_images(exported, features), embed_images(trained, features))
    argv = ["--data", data.eval_shards, "--tasks", "zeroshot,retrieval", "--resolution", "native", "--out"]
    for subject, file in ((run, "run.json"), (out, "export.json")):
        assert run_command([str(subject), *argv, str(tmp_path / file)], "", evaluate.Arguments, evaluate.evaluate) == 0
    found = read_evaluation(tmp_path / "run.json")
    beside = ("_color", "captions_of_training_images")  # an export does not say what it was trained on
    without = {
        task: {name: score for name, score in scores.items() if not name.endswith(beside)}
        for task, scores in found.items()
    }
    assert without != found and without == read_evaluation(tmp_path / "export.json")
    stage1 = write_run(tmp_path / "stage1", RunConfig(vision=VISION), {"vision": CogViT(VISION)})
    capsys.readouterr()
    assert run_export(str(stage1), "--out", str(tmp_path / "x"), "--layout", "two_towers") == 2
    assert "no text tower" in error_of(capsys)


def test_export_for_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = replace(VISION, norm="rmsnorm", mlp="swiglu", position="rotary", use_cls_token=False)
    trained = CogViT(cfg)
    run = write_run(tmp_path / "run", RunConfig(vision=cfg), {"vision": trained})
    out = tmp_path / "export"
    assert run_export(str(run), "--out", str(out), "--layout", "glm_ocr") == 0
    assert "GlmOcrVisionModel.from_pretrained" in capsys.readouterr().out
    exported = CogViT.from_pretrained(out)
    image = torch.rand(1, 3, 16, 8)
    assert torch.equal(exported(image)["patch_tokens"], trained(image)["patch_tokens"])
    started = initial_towers(RunConfig(vision=replace(cfg, image_size=64), init=str(out)))  # rotary: of any size
    assert torch.equal(started["vision.norm.weight"], trained.norm.weight)
    with pytest.raises(CheckpointError, match=r"another vision tower \(mlp_dim: 128 there, 64 here\)"):
        initial_towers(RunConfig(vision=replace(cfg, mlp_ratio=2.0), init=str(out)))


def test_a_learned_table_starts_a_run_of_another_image_size(tmp_path: Path) -> None:
    trained = CogViT(VISION)
    run = write_run(tmp_path / "run", RunConfig(vision=VISION), {"vision": trained})
    larger = CogViT(replace(VISION, image_size=2 * VISION.image_size))
    started = initial_towers(RunConfig(vision=larger.cfg, init=str(run)))
    larger.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in started.items()})
    # On the larger image's own grid the first tower resizes its table; the second one's has that size.
    image = torch.rand(1, 3, larger.cfg.image_size, larger.cfg.image_size)
    with torch.no_grad():
        torch.testing.assert_close(larger(image)["patch_tokens"], trained(image)["patch_tokens"])
    assert not torch.equal(larger.pos_embed.embed[..., :4, :4], trained.pos_embed.embed)


def test_a_run_starts_from_another_text_tower_of_the_same_shape_alone(run: Path) -> None:
    config = RunConfig(objective="contrast", vision=VISION, text=TEXT, proj_dim=8, init=str(run))
    assert "text.blocks.0.attn.qkv.weight" in contrast.started_from(config)
    with pytest.raises(CheckpointError, match=r"another text tower \(num_heads: 2 there, 4 here\); export it"):
        contrast.started_from(replace(config, text=replace(TEXT, num_heads=4)))
    with pytest.raises(CheckpointError, match="one is of transformers, one of our own"):
        contrast.started_from(replace(config, text_encoder=TextEncoderConfig("some/encoder")))
    assert not any(name.startswith("text.") for name in distill.started_from(RunConfig(vision=VISION, init=str(run))))


def test_export_for_glm_5_next(tmp_path: Path) -> None:
    cfg = replace(VISION, norm="rmsnorm", mlp="swiglu", position="rotary", use_cls_token=False)
    trained = CogViT(cfg).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(3.0)  # its clamp at 10 would show
    run = write_run(tmp_path / "run", RunConfig(vision=cfg), {"vision": trained})
    assert run_export(str(run), "--out", str(tmp_path / "export"), "--layout", "glm5_next") == 0
    model, found = Glm5NextVisionModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert all(name.startswith(("downsample.", "merger.")) for name in found["missing_keys"])
    patches = torch.rand(4 * 6, 3, 4, 4) * 2 - 1  # rows 4, columns 6 in 2 x 2 groups
    order = torch.arange(24).view(2, 2, 3, 2).transpose(1, 2).flatten()
    seen: list[torch.Tensor] = []
    model.eval().post_layernorm.register_forward_hook(lambda module, given, output: seen.append(output))
    for limit in (None, 10.0):  # as exported, then transformers' default, which such weights would feel
        for block in model.blocks:
            block.mlp.swiglu_limit = limit or block.mlp.swiglu_limit
        model(patches[order].unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1), torch.tensor([[1, 4, 6]]))
    with torch.no_grad():
        expected = trained.forward_packed(pack_images([patches.flatten(1)], [(4, 6)])).patch_TD[order]
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)
    assert (seen[1] - expected).abs().max() > 0.1


def test_export_overwrites_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert run_export(str(run), "--out", str(tmp_path / "taken")) == 2
    assert "choose a new directory" in error_of(capsys)
    assert run_export(str(run), "--out", str(run)) == 2
    assert "choose a new directory" in error_of(capsys)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["RUN"], "--out DIR is needed"),
        (["RUN/checkpoints", "--out", "x"], "not a run"),
        (["--out", "x"], "RUN is missing"),
        (
            ["RUN", "--out", "x", "--layout", "timm"],
            "'timm' is unknown; expected one of cogvit, two_towers, glm_ocr, glm5_next, vlm, glm_ocr_full, onnx",
        ),
        (["RUN", "--out", "x", "--layout", "onnx", "--size", "17x16"], "--size 17x16 must be HxW, both multiples of"),
        (["RUN", "--out", "x", "--size", "16x16"], "cogvit takes images of any size"),
        (["RUN", "--out", "x", "--layout", "glm_ocr"], "norm='layernorm', expected 'rmsnorm'"),
    ],
)
def test_mistakes_of_export(run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], expected: str) -> None:
    assert run_export(*(word.replace("RUN", str(run)) for word in argv)) == 2
    assert expected in error_of(capsys)


def test_run_with_damaged_checkpoints_only_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = contrast_run(tmp_path / "run", DataConfig())
    damage(run)
    assert run_export(str(run), "--out", str(tmp_path / "export")) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def damage(run: Path) -> None:
    """Flip a byte of the only checkpoint."""
    (file,) = run.glob("checkpoints/*/*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_list_and_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_checkpoint("list", str(run)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step_00000003 ") and "30 images and 270 tokens" in line
    assert run_checkpoint("show", str(run)) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["text_proj", "master", "2", str(32 * 8 + 8)] in rows


def test_verify_says_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = contrast_run(tmp_path / "run", DataConfig())
    assert run_checkpoint("verify", str(run)) == 0
    assert capsys.readouterr().out.split() == ["step_00000003", "good"]
    damage(run)
    assert run_checkpoint("verify", str(run)) == 1
    assert "DAMAGED" in capsys.readouterr().out
    (run / "checkpoints" / "step_00000003" / "state.json").write_text("{")
    assert run_checkpoint("list", str(run)) == 0
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["ls", "RUN"], "actions are list, verify, show"),
        (["list", "RUN/x"], "has no checkpoint"),
        (["show"], "RUN is missing"),
    ],
)
def test_mistakes_of_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], expected: str) -> None:
    assert run_checkpoint(*(word.replace("RUN", str(run)) for word in argv)) == 2
    assert expected in error_of(capsys)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_explains(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["list", flag], export.__doc__ or "", export.Arguments, export.export) == 0
    assert "--out DIR" in capsys.readouterr().out
    assert run_command([], "usage of it", export.Arguments, export.export) == 2

"""GLM-OCR's vision tower in transformers and ours give the same numbers from the same weights, in both directions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GlmOcrConfig, GlmOcrModel, GlmOcrVisionModel
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.glm_ocr.configuration_glm_ocr import GlmOcrVisionConfig

from cogvit import CogViT, CogViTConfig, GlmAdapter, naflex_pack, save_glm_ocr
from cogvit.errors import CheckpointError
from cogvit.model.packing import patchify
from tests.plain_vit import scramble

PATCH_PX, WIDTH, LLM_WIDTH = 4, 48, 24
ANY_SIZE = {"shortest_edge": 1, "longest_edge": 10**6}  # px of an image
EXACT = {"atol": 1e-5, "rtol": 0.0}


def vision_config(merge: int = 2, frames: int = 2) -> GlmOcrVisionConfig:
    return GlmOcrVisionConfig(
        depth=2,
        hidden_size=WIDTH,
        num_heads=3,
        intermediate_size=56,
        out_hidden_size=LLM_WIDTH,
        patch_size=PATCH_PX,
        image_size=16,
        spatial_merge_size=merge,
        temporal_patch_size=frames,
    )


def theirs(merge: int = 2, frames: int = 2) -> GlmOcrVisionModel:
    """A tiny random GLM-OCR tower."""
    model = GlmOcrVisionModel(vision_config(merge, frames)).eval()
    scramble(model)
    return model


def ours(merge: int = 2) -> tuple[CogViT, GlmAdapter]:
    """A tiny random encoder of the family, with its adapter."""
    cfg = CogViTConfig(
        image_size=16,
        patch_size=PATCH_PX,
        embed_dim=WIDTH,
        depth=2,
        num_heads=3,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        use_cls_token=False,
        eps=1e-5,
        mlp_ratio=56 / 48,
    )
    vision, adapter = CogViT(cfg).eval(), GlmAdapter(WIDTH, LLM_WIDTH, spatial_pool=merge)
    scramble(vision)
    scramble(adapter, seed=1)
    return vision, adapter


def run_theirs(model: GlmOcrVisionModel, image: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features in raster order and merged embeddings of one image [C, H, W]."""
    merge, frames = model.config.spatial_merge_size, model.config.temporal_patch_size
    rows, columns = image.shape[1] // PATCH_PX, image.shape[2] // PATCH_PX
    raster = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    blocks = raster.transpose(1, 2).flatten()  # their order: one merged group after another
    patches = patchify(image, PATCH_PX)[blocks].view(-1, 3, 1, PATCH_PX, PATCH_PX)
    normed: list[Tensor] = []
    handle = model.post_layernorm.register_forward_hook(lambda module, args, output: normed.append(output))
    with torch.no_grad():
        out = model(patches.expand(-1, -1, frames, -1, -1).flatten(1), torch.tensor([[1, rows, columns]]))
    handle.remove()
    return normed[0][blocks.argsort()], out.pooler_output


def assert_same(model: GlmOcrVisionModel, vision: CogViT, adapter: GlmAdapter, size_px: tuple[int, int]) -> None:
    image = torch.randn(3, *size_px, generator=torch.Generator().manual_seed(size_px[0]))
    patch_tokens, merged = run_theirs(model, image)
    with torch.no_grad():
        out = vision.eval()(image[None])
        embeds = adapter(out["patch_tokens"], out["grid"])
    torch.testing.assert_close(out["patch_tokens"][0], patch_tokens, **EXACT)
    torch.testing.assert_close(embeds[0], merged, **EXACT)


SIZES = [(2, (16, 24)), (2, (8, 40)), (1, (20, 12)), (1, (4, 28))]  # odd grids need their merge of 1


@pytest.mark.parametrize(("merge", "size_px"), SIZES)
def test_import_has_their_outputs(tmp_path: Path, merge: int, size_px: tuple[int, int]) -> None:
    model = theirs(merge)
    model.save_pretrained(tmp_path)
    assert_same(model, CogViT.from_pretrained(tmp_path), GlmAdapter.from_pretrained(tmp_path), size_px)


@pytest.mark.parametrize(("merge", "size_px"), SIZES)
def test_export_has_our_outputs(tmp_path: Path, merge: int, size_px: tuple[int, int]) -> None:
    vision, adapter = ours(merge)
    save_glm_ocr(tmp_path, vision, adapter)
    model, found = GlmOcrVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert_same(model.eval(), vision, adapter, size_px)


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_are_folded(tmp_path: Path, frames: int) -> None:
    model = theirs(frames=frames)
    model.save_pretrained(tmp_path)
    assert_same(model, CogViT.from_pretrained(tmp_path), GlmAdapter.from_pretrained(tmp_path), (8, 16))


def test_round_trip_is_exact_but_for_the_mask_token(tmp_path: Path) -> None:
    vision, adapter = ours()
    save_glm_ocr(tmp_path, vision, adapter)
    back, merger = CogViT.from_pretrained(tmp_path), GlmAdapter.from_pretrained(tmp_path)
    kept = vision.state_dict()
    changed = [name for name, weight in back.state_dict().items() if not torch.equal(weight, kept[name])]
    assert changed == ["mask_token"]
    assert back.mask_token.abs().max() > 0
    assert all(torch.equal(weight, adapter.state_dict()[name]) for name, weight in merger.state_dict().items())
    assert back.cfg == vision.cfg


def test_without_an_adapter_only_the_merger_is_missing(tmp_path: Path) -> None:
    save_glm_ocr(tmp_path, ours()[0])
    _, found = GlmOcrVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert found["missing_keys"] and all(name.startswith(("merger.", "downsample.")) for name in found["missing_keys"])
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    with pytest.raises(CheckpointError, match=r"downsample\.weight is missing.*merger\.down_proj\.weight is missing"):
        GlmAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("split", [False, True])
def test_a_whole_glm_ocr_is_read_by_path(tmp_path: Path, split: bool) -> None:
    text = {
        "vocab_size": 32,
        "hidden_size": LLM_WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    whole = GlmOcrModel(GlmOcrConfig(vision_config=vision_config().to_dict(), text_config=text)).eval()
    scramble(whole)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(parameter.half())
    copy.deepcopy(whole).half().save_pretrained(tmp_path, max_shard_size="20KB" if split else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == split
    weights = {k: v for f in tmp_path.glob("*.safetensors") for k, v in load_file(f).items()}
    if not split:  # as the published checkpoint names them
        renamed = {f"model.{k.removeprefix('model.')}": v for k, v in weights.items()}
        save_file(renamed, tmp_path / "model.safetensors")
    vision, adapter = CogViT.from_pretrained(tmp_path), GlmAdapter.from_pretrained(tmp_path)
    assert {p.dtype for p in (*vision.parameters(), *adapter.parameters())} == {torch.float32}
    assert_same(whole.visual, vision, adapter, (16, 24))


def test_their_normalization_is_folded(tmp_path: Path) -> None:
    model, processor = theirs(), Glm46VImageProcessorPil(patch_size=PATCH_PX, size=ANY_SIZE)
    model.save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    inputs = processor(pixels, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    with torch.no_grad():
        expected = model(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        for nested in (False, True):
            (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
            described = json.loads(processor.to_json_string())
            name = "processor_config.json" if nested else "preprocessor_config.json"
            (tmp_path / name).write_text(json.dumps({"image_processor": described} if nested else described))
            vision, adapter = CogViT.from_pretrained(tmp_path).eval(), GlmAdapter.from_pretrained(tmp_path)
            features = vision.forward_packed(naflex_pack([pixels], PATCH_PX, 24))
            embeds = adapter(features.patch_TD[None], (4, 6))[0]
            torch.testing.assert_close(embeds, expected, **EXACT)


def test_our_normalization_is_written(tmp_path: Path) -> None:
    vision, adapter = ours()
    save_glm_ocr(tmp_path, vision, adapter)
    processor = Glm46VImageProcessorPil.from_pretrained(tmp_path, size=ANY_SIZE)
    pixels = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    inputs = processor(pixels, return_tensors="pt")
    with torch.no_grad():
        merged = GlmOcrVisionModel.from_pretrained(tmp_path)(inputs["pixel_values"], inputs["image_grid_thw"])
        features = vision.forward_packed(naflex_pack([pixels], PATCH_PX, 24))
        torch.testing.assert_close(adapter(features.patch_TD[None], (4, 6))[0], merged.pooler_output, **EXACT)


def test_every_wrong_weight_is_named_as_theirs(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["blocks.1.mlp.up_proj.bias"]
    weights["blocks.7.extra"] = torch.zeros(2)
    weights["post_layernorm.weight"] = torch.zeros(5)
    weights["merger.proj.weight"] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        CogViT.from_pretrained(tmp_path)
    message = str(error.value)
    assert "blocks.1.mlp.up_proj.bias is missing" in message
    assert "blocks.7.extra is unknown" in message
    assert f"post_layernorm.weight has shape (5,), expected ({WIDTH},)" in message
    assert "merger" not in message
    with pytest.raises(CheckpointError, match=r"merger\.proj\.weight has shape \(3, 3\), expected \(24, 24\)"):
        GlmAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' of this GLM-OCR is not supported; expected 'silu'"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 5.0}}, r"rope_theta=5\.0"),
        ({"patch_size": [4, 8]}, r"patch_size=\[4, 8\]"),
        ({"num_heads": 5}, "num_heads=5 does not divide"),
        ({"depth": "two"}, r"config\.json: "),
        ({"model_type": "glm_ocr"}, "has no vision_config"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        CogViT.from_pretrained(tmp_path)


def test_fields_left_out_have_their_defaults(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("rms_norm_eps", "spatial_merge_size", "temporal_patch_size", "in_channels", "rope_parameters"):
        del values[name]
    path.write_text(json.dumps({**values, "patch_size": [4, 4]}))
    assert CogViT.from_pretrained(tmp_path).cfg.eps == 1e-5


def test_encoders_that_do_not_fit(tmp_path: Path) -> None:
    with torch.device("meta"):
        reference = CogViT(CogViTConfig(depth=1))
    with pytest.raises(CheckpointError, match=r"norm='layernorm', expected 'rmsnorm'.*use_cls_token=True"):
        save_glm_ocr(tmp_path, reference)
    with pytest.raises(CheckpointError, match=r"merger\.down_proj\.weight has shape \(24, 40\), expected \(24, 72\)"):
        save_glm_ocr(tmp_path, ours()[0], GlmAdapter(WIDTH, LLM_WIDTH, hidden_dim=40))
    assert not any(tmp_path.iterdir())
    ours()[0].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no merger"):
        GlmAdapter.from_pretrained(tmp_path)

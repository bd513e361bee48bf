"""The released CogVLM family: the logits of the released code, files both ways, and what is wrong with a directory."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvit import VisionLanguageModel
from cogvit.errors import CheckpointError
from cogvit.model.adapter import make_adapter
from cogvit.model.eva import EvaEncoder
from cogvit.model.frame import ImageFrame
from cogvit.model.generation import Sampling
from cogvit.model.image_input import SquareImages
from cogvit.model.language import CausalLM
from cogvit.model.layouts import released
from cogvit.model.layouts.parts import flat
from cogvit.model.layouts.released import LAYOUTS, Layout
from cogvit.model.vlm_files import VlmParts
from tests.cog import GOLDEN, cog_directory, cog_picture, cog_tensors

A, B = cog_picture(50, 70), cog_picture(56, 56, seed=1)
_VISION_19B = {
    "hidden_size": 1792,
    "num_heads": 16,
    "intermediate_size": 15360,
    "num_hidden_layers": 63,
    "image_size": 1344,
    "patch_size": 14,
    "num_positions": 9217,
}
_COGVLM2_19B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_multi_query_heads": 8,
    "vision_config": _VISION_19B,
}
_COGVLM_17B = {
    **_COGVLM2_19B,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "vision_config": {**_VISION_19B, "image_size": 490, "num_positions": 1226},
}
_COGAGENT_18B = {
    **_COGVLM_17B,
    "cross_image_size": 1120,
    "vision_config": {**_VISION_19B, "image_size": 224, "num_positions": 257},
}
_GLM4V_9B: dict[str, Any] = {
    **{name: GOLDEN["glm4v_9b"]["config"][name] for name in ("add_qkv_bias", "multi_query_attention", "original_rope")},
    **{name: GOLDEN["glm4v_9b"]["config"][name] for name in ("rmsnorm", "post_layer_norm", "add_bias_linear")},
    "apply_residual_connection_post_layernorm": False,
    "padded_vocab_size": 151552,
    "hidden_size": 4096,
    "num_layers": 40,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "ffn_hidden_size": 13696,
    "seq_length": 8192,
    "vision_config": {**_VISION_19B, "image_size": 1120, "num_positions": 6401, "scaling_factor": 8},
}
_EVA_L = "model.cross_vision.vit.model."
_CROSS_18B = {
    f"{_EVA_L}patch_embed.proj.weight": (1024, 3, 14, 14),
    f"{_EVA_L}blocks.0.mlp.w1.weight": (2730, 1024),
    f"{_EVA_L}blocks.23.norm1.weight": (1024,),
    "model.cross_vision.pos_embed": (6400, 1024),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_are_those_of_the_released_code(tmp_path: Path, layout: Layout) -> None:
    golden, model = GOLDEN[layout], VisionLanguageModel.from_pretrained(cog_directory(layout, tmp_path))
    images = [A, B] if layout == "cogvlm2" else [A]
    assert golden["ids"].count(model.image_token_id) == sum(model.num_visual_tokens(image) for image in images)
    assert len(cog_tensors(layout)) == golden["tensors"]
    logits = model(torch.tensor([golden["ids"]]), [images])[0]
    torch.testing.assert_close(logits, torch.tensor(golden["logits"]), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_answers_of_a_cache_are_those_of_whole_rows(tmp_path: Path, layout: Layout) -> None:
    model = VisionLanguageModel.from_pretrained(cog_directory(layout, tmp_path))
    prompt = torch.tensor([3, *[0] * model.num_visual_tokens(A), 5, 17])
    read = model.embedded([prompt, torch.tensor([4, 5, 6])], [[A], []])
    given = torch.stack(
        [*model.language.stream(read.x_SD, read.position_3S, read.segments, Sampling(5), read.expert, read.cross)], 1
    )
    for row, images, answer in zip((prompt, torch.tensor([4, 5, 6])), ([A], []), given, strict=True):
        for token in answer:
            assert int(model(row[None], [images])[0, -1].argmax()) == token
            row = torch.cat([row, token[None]])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_rows_of_a_batch_are_what_they_are_alone(tmp_path: Path, layout: Layout) -> None:
    model = VisionLanguageModel.from_pretrained(cog_directory(layout, tmp_path))
    image = [0] * model.num_visual_tokens(A)
    rows = [[3, *image, 5, *image], [4, *image, *image, 6], [*range(3, 5 + 2 * len(image))]]
    rows[2] = [token % 28 + 1 for token in rows[2]]
    shown = [[A, B], [B, A], []]
    together = model(torch.tensor(rows), shown)
    for row, images, logits in zip(rows, shown, together, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row]), [images])[0], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(together[2], model.language(torch.tensor(rows[2:]))[0], atol=1e-5, rtol=0.0)
    text = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(text), model.language(text)) and torch.equal(model(text, [[]]), model.language(text))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_gives_the_same_bytes(tmp_path: Path, layout: Layout) -> None:
    source = cog_directory(layout, tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, source / file, metadata={"format": "pt"})
    index = {name: file for file, own in halves.items() for name in own}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    model = VisionLanguageModel.from_pretrained(source)
    assert model.language.cfg.eos_ids == (2, 9)
    model.save_pretrained(tmp_path / "back", layout=layout)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"eos_token_id": [2, 9]}
    for file in halves:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    back = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert back["weight_map"] == index and back["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    half = VisionLanguageModel.from_pretrained(source, dtype="bf16")
    half.save_pretrained(tmp_path / "half")
    assert all((tmp_path / "half" / file).read_bytes() == (source / file).read_bytes() for file in halves)


def test_the_released_cogvlm2_has_1221_tensors() -> None:
    shape = released.read_shape("cogvlm2", _COGVLM2_19B, {})
    sizes = flat(released.parts("cogvlm2", shape)) | released.carried("cogvlm2", shape, {})
    names = "\n".join(sorted(sizes))
    assert hashlib.sha256(names.encode()).hexdigest() == (  # of the index that was released
        "8cfd7f37388c0b1b30f5e11ccb4bdd61a0f1325a8f7be4b837848c7183a22b0b"
    )
    assert len(sizes) == 1221 and 2 * sum(map(math.prod, sizes.values())) == 39_006_214_656


@pytest.mark.parametrize(
    ("layout", "values", "tensors", "parameters"),
    [
        ("cogvlm", _COGVLM_17B, 1187, 17_639_687_424),
        ("cogvlm2", _COGVLM2_19B, 1221, 19_503_107_328),
        ("cogagent", _COGAGENT_18B, 1831, 18_291_854_528),
        ("glm4v_9b", _GLM4V_9B, 1054, 13_906_320_928),
    ],
)  # fmt: skip
def test_released_shapes_are_those_of_our_modules(
    layout: Layout, values: dict[str, Any], tensors: int, parameters: int
) -> None:
    shape = released.read_shape(layout, values, _CROSS_18B)
    where = released.parts(layout, shape)
    sizes = flat(where) | released.carried(layout, shape, {})
    assert len(sizes) == tensors and sum(map(math.prod, sizes.values())) == parameters
    with torch.device("meta"):
        parts = VlmParts(
            EvaEncoder(shape.vision),
            make_adapter(shape.adapter, shape.vision.embed_dim, shape.language.embed_dim),
            CausalLM(shape.language),
            shape.image_token_id,
            SquareImages(14, shape.vision.image_size),
            frame=ImageFrame(shape.language.embed_dim),
            cross=None if shape.cross is None else EvaEncoder(shape.cross),
        )
    state = parts.modules().state_dict()
    assert set(state) == set(where)
    for name, theirs in where.items():
        assert state[name].numel() == sum(map(math.prod, theirs.values())), name


def test_groups_of_heads_are_those_of_the_released_code_where_nobody_says_them(tmp_path: Path) -> None:
    directory = cog_directory("cogvlm2", tmp_path / "a", num_attention_heads=8, num_multi_query_heads=8)
    values = json.loads((directory / "config.json").read_text())
    del values["num_multi_query_heads"]
    (directory / "config.json").write_text(json.dumps(values))
    model = VisionLanguageModel.from_pretrained(directory)
    assert model.language.cfg.num_kv_heads == 8
    model.save_pretrained(tmp_path / "b", layout="cogvlm2")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_was_never_released_is_written_and_read(tmp_path: Path, layout: Layout) -> None:
    model = VisionLanguageModel.from_pretrained(cog_directory(layout, tmp_path / "source", torch.float32))
    model.released = None
    model.save_pretrained(tmp_path / "new", layout=layout)
    written, given = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "source"))
    assert set(written) == set(given)
    back = VisionLanguageModel.from_pretrained(tmp_path / "new")
    assert back.language.cfg == model.language.cfg
    row = torch.tensor([GOLDEN[layout]["ids"]])
    images = [[A, B]] if layout == "cogvlm2" else [[A]]
    with torch.no_grad():
        assert torch.equal(back(row, images), model(row, images))


def changed(directory: Path, change: Any) -> None:
    """Rewrite the weights of a directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("cogvlm2", lambda t: t.pop("model.vision.conv.bias"), r"model\.vision\.conv\.bias is missing"),
        ("cogvlm", lambda t: t.update(extra=torch.zeros(1)), "extra is unknown"),
        ("cogvlm", lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), r"lm_head\.weight has shape \(2, 2\)"),
        ("cogagent", lambda t: t.pop(f"{_EVA_L}blocks.2.mlp.w3.bias"), r"blocks\.2\.mlp\.w3\.bias is missing"),
        ("cogagent", lambda t: t.pop(f"{_EVA_L}patch_embed.proj.weight"), "is no encoder of 128 channels"),
        ("cogagent", lambda t: t.update({"model.cross_vision.pos_embed": torch.ones(())}), r"pos_embed has shape \(\)"),
        ("cogvlm", lambda t: t["lm_head.weight"].fill_(math.nan), r"NaN or infinite values in lm_head\.weight"),
        ("cogvlm", lambda t: t.update({"lm_head.weight": torch.zeros(32, 64, dtype=torch.int8)}), "is I8, no float"),
        ("cogvlm", lambda t: t["model.layers.1.self_attn.rotary_emb.inv_freq"].mul_(2), "differs between blocks"),
    ],
)  # fmt: skip
def test_bad_weights_are_named_in_one_line(tmp_path: Path, layout: Layout, change: Any, message: str) -> None:
    changed(cog_directory(layout, tmp_path), change)
    with pytest.raises(CheckpointError, match=message) as error:
        VisionLanguageModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_bias_linear": True}, "add_bias_linear=True; expected as released"),
        ({"original_rope": False}, "original_rope=False; expected as released"),
        ({"vision_config": {"scaling_factor": 3}}, "scaling_factor=3 must be a power of 2"),
        ({"num_layers": 0}, "num_layers must be whole numbers of 1 or more"),
    ],
)
def test_another_glm_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    directory = cog_directory("glm4v_9b", tmp_path)
    values = json.loads((directory / "config.json").read_text())
    values |= {**change, "vision_config": values["vision_config"] | change.get("vision_config", {})}
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        VisionLanguageModel.from_pretrained(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size must be whole numbers"),
        ({"num_attention_heads": 5}, "has shape"),
        ({"template_version": "poem"}, "template='poem' must be one of base, chat, vqa"),
        ({"vision_config": {"patch_size": 14}}, "vision_config.hidden_size, vision_config.num_hidden_layers"),
        ({"hidden_act": "relu"}, "hidden_act must be 'silu'"),
        ({"pad_token_id": 40}, "image_token_id=40 must be in the vocabulary, 0 to 31"),
        ({"pad_token_id": [1]}, r"pad_token_id=\[1\] must be a whole number"),
        ({"pad_token_id": True}, "pad_token_id=True must be a whole number"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id='x' must be a whole number"),
        ({"bos_token_id": 1.5}, "bos_token_id=1.5 must be a whole number"),
    ],
)
def test_bad_configurations_are_named_in_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    cog_directory("cogvlm", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(CheckpointError, match=message) as error:
        VisionLanguageModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (cog_directory("cogvlm", tmp_path) / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "b.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match=r"b\.safetensors does not exist; is .* whole"):
        VisionLanguageModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"00000000 no tensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        VisionLanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"weight_map": ["a"]}, "weight_map must say in which file each weight is"),
        ({"weight_map": {}}, "weight_map must say in which file each weight is"),
        ({}, "weight_map must say in which file each weight is"),
        ({"weight_map": {"a": 5}}, "5 is no file beside it"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, "'../other/model.safetensors' is no file beside it"),
    ],
)
def test_an_index_names_files_beside_it_alone(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    """One elsewhere would be written over by an export of what was read."""
    cog_directory("cogvlm", tmp_path / "other")
    source = cog_directory("cogvlm", tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(json.dumps(said))
    for read in (VisionLanguageModel.from_pretrained, CausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message) as error:
            read(source)
        assert "\n" not in str(error.value)


def test_layouts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = VisionLanguageModel.from_pretrained(cog_directory("cogvlm", tmp_path / "a"))
    with pytest.raises(CheckpointError, match="layout cogvlm2 cannot hold this model, whose layout is cogvlm"):
        model.save_pretrained(tmp_path / "b", layout="cogvlm2")
    with pytest.raises(CheckpointError, match="the layout of GLM-OCR cannot hold a EvaEncoder"):
        model.save_glm_ocr_full(tmp_path / "b")

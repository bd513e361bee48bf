"""Text encoders of transformers on packed captions: each caption as transformers encodes it alone."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvit.batch import DataPosition, PackedText, StepBatch, pad_step
from cogvit.config import RunConfig, TextEncoderConfig
from cogvit.errors import ConfigError
from cogvit.model.pretrained import (
    PretrainedTextTower,
    inspect_text_encoder,
    load_text_encoder,
    new_text_encoder,
    with_encoder_shape,
)
from tests import text_encoders
from tests.packs import random_batch, random_images, random_text
from tests.text_encoders import MAX_TOKENS, SHAPE, SIGLIP_TOKENS, VOCAB, write_encoder

Pooling = Literal["mean", "first", "last", "own"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("encoders")
    builds = (text_encoders.bert, text_encoders.siglip2, text_encoders.t5)
    return {build.__name__: write_encoder(directory, build) for build in builds}


def load(path: Path, pooling: Pooling = "mean", pad_id: int = 0) -> PretrainedTextTower:
    return load_text_encoder(TextEncoderConfig(str(path), pooling), 16, pad_id)


def captions() -> tuple[list[Tensor], PackedText]:
    """Captions of 3 to 11 tokens, one by one and as a pack with absent slots."""
    text = random_text(3, random_images(3))
    bounds = text.cu_seqlens.tolist()
    return [text.ids[start:stop] for start, stop in pairwise(bounds[:-1])], text


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "own"])
def test_packed_captions_are_encoded_as_transformers_does_alone(encoders: dict[str, Path], pooling: Pooling) -> None:
    tower = load(encoders["bert"], pooling).train()
    direct = transformers.BertModel.from_pretrained(encoders["bert"]).eval()
    alone, text = captions()
    packed = tower.pool_packed(text)
    expected = []
    for ids in alone:
        if not len(ids):
            expected.append(torch.zeros(32))
            continue
        output = direct(ids.unsqueeze(0))
        x_LD = output.last_hidden_state[0]
        expected.append(
            {"mean": x_LD.mean(0), "first": x_LD[0], "last": x_LD[-1], "own": output.pooler_output[0]}[pooling]
        )
    assert not packed[-1].any() and len(packed) == len(expected)
    torch.testing.assert_close(packed, torch.stack(expected), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(packed)
    (packed * weight).sum().backward()
    (torch.stack(expected) * weight).sum().backward()
    gradients = dict(direct.named_parameters())
    for name, parameter in tower.encoder.named_parameters():
        assert parameter.grad is not None, f"{name} is not trained and should not be there"
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_pack_without_captions_is_zeros(encoders: dict[str, Path]) -> None:
    empty = pad_step(StepBatch((random_batch(1, {}),), DataPosition("", 1)), 2).micro[1].text
    assert empty is not None
    pooled = load(encoders["bert"]).pool_packed(empty)
    assert pooled.shape == (8, 32) and not pooled.any()


def test_siglips_own_pooling_sees_the_padding_it_was_trained_with(encoders: dict[str, Path]) -> None:
    tower = load(encoders["siglip2"], "own", pad_id=7)
    direct = transformers.Siglip2Model.from_pretrained(encoders["siglip2"]).eval()
    ids = torch.randint(8, VOCAB, (1, 5))
    padded = torch.nn.functional.pad(ids, (0, SIGLIP_TOKENS - 5), value=7)
    expected = direct.text_model(input_ids=padded).pooler_output
    assert tower.dim == 28 and expected.shape == (1, 28)
    torch.testing.assert_close(tower(ids, torch.ones_like(ids)), expected)
    batch = torch.cat([ids, torch.full((1, 5), 3)])
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3])
    torch.testing.assert_close(tower(batch, mask)[:1], expected)
    changed = batch.clone()
    changed[1, 2:] = 5
    assert torch.equal(tower(changed, mask), tower(batch, mask))


def test_an_encoder_of_an_encoder_decoder(encoders: dict[str, Path]) -> None:
    tower = load(encoders["t5"])
    direct = transformers.T5EncoderModel.from_pretrained(encoders["t5"]).eval()
    ids = torch.randint(3, VOCAB, (2, 6))
    torch.testing.assert_close(tower(ids, torch.ones_like(ids)), direct(ids).last_hidden_state.mean(1))
    assert not any("decoder" in name for name, _ in tower.named_parameters())


def test_training_has_no_dropout(encoders: dict[str, Path]) -> None:
    tower, ids = load(encoders["bert"]), torch.randint(3, VOCAB, (2, 6))
    alone = tower.eval()(ids, torch.ones_like(ids))
    assert tower.train().training and torch.equal(tower(ids, torch.ones_like(ids)), alone)


def test_the_run_takes_the_encoders_shape(encoders: dict[str, Path]) -> None:
    run = RunConfig(objective="contrast", text_encoder=TextEncoderConfig(str(encoders["bert"])))
    text = with_encoder_shape(run).text
    assert (text.vocab_size, text.embed_dim, text.depth, text.mlp_dim) == (VOCAB, 32, 2, SHAPE["intermediate_size"])
    assert text.max_tokens == run.text.max_tokens
    assert with_encoder_shape(RunConfig(objective="contrast")) == RunConfig(objective="contrast")


def refusal(path: Path | str, max_tokens: int = 16, pooling: Pooling = "mean") -> str:
    with pytest.raises(ConfigError) as caught:
        load_text_encoder(TextEncoderConfig(str(path), pooling), max_tokens, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_text_encoder_is_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is no text encoder of transformers" in refusal(tmp_path / "empty")
    config = transformers.DINOv3ViTConfig(**SHAPE, patch_size=8, image_size=32)
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "dinov3")
    assert "its type is 'dinov3_vit'" in refusal(tmp_path / "dinov3")
    assert "pooling own" in refusal(encoders["t5"], pooling="own")
    assert f"--text.max-tokens {MAX_TOKENS + 1}" in refusal(encoders["bert"], MAX_TOKENS + 1)
    assert f"above the {SIGLIP_TOKENS}" in refusal(encoders["siglip2"], SIGLIP_TOKENS + 1, "own")


def test_weights_are_complete_and_in_safetensors(encoders: dict[str, Path], tmp_path: Path) -> None:
    cut = shutil.copytree(encoders["bert"], tmp_path / "cut")
    weights = load_file(cut / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of a BertModel, encoder.layer.1.output.dense.weight first" in refusal(cut)
    pickled = shutil.copytree(encoders["bert"], tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "other formats can run code and are refused" in refusal(pickled)
    damaged = shutil.copytree(encoders["bert"], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    assert "is no text encoder of transformers" in refusal(damaged)


def test_code_in_a_checkpoint_does_not_run(encoders: dict[str, Path], tmp_path: Path) -> None:
    foreign = shutil.copytree(encoders["bert"], tmp_path / "foreign")
    values = json.loads((foreign / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (foreign / "config.json").write_text(json.dumps(values))
    (foreign / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "is no text encoder of transformers" in refusal(foreign)
    assert not (tmp_path / "ran").exists()


def test_weights_of_a_run_need_the_configuration_alone(encoders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(encoders["bert"], tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors"))
    config = TextEncoderConfig(str(tmp_path / "bert"))
    assert inspect_text_encoder(config).full_length == 0
    names = [name for name, _ in new_text_encoder(config, 0).named_parameters()]
    assert names == [name for name, _ in load(encoders["bert"]).named_parameters()]

"""Language models of transformers and ours give the same numbers and the same text from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GlmOcrConfig, GlmOcrForConditionalGeneration, PreTrainedModel

from cogvit import CausalLM, LanguageConfig
from cogvit.model.attention import Segments
from cogvit.model.layouts.causal_lm import causal_lm_parts, read_causal_lm
from cogvit.model.layouts.causal_lm_file import CausalLMFile
from cogvit.model.layouts.parts import split
from tests.language import LANGUAGE_MODELS, tiny_language, token_ids
from tests.plain_vit import scramble

EXACT = {"atol": 1e-6, "rtol": 1e-6}


def both(directory: Path, name: str, **options: Any) -> tuple[PreTrainedModel, CausalLM]:
    """A model of transformers and ours, read from its files."""
    theirs = tiny_language(name, **options)
    theirs.save_pretrained(directory)
    return theirs, CausalLM.from_pretrained(directory)


def greedy(model: PreTrainedModel, ids: Tensor, count: int, **options: Any) -> Tensor:
    """What `generate` of transformers returns without sampling."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True, **options
    )


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    theirs, ours = both(tmp_path, name)
    ids = token_ids(2, 33)
    expected, actual = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(actual, expected, **EXACT)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    wanted = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    found = split({key: g for key, g in gradients.items() if g is not None}, causal_lm_parts(ours.cfg))
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert gradient is not None
        assert (found[key] - gradient).abs().max() <= 5e-6 * gradient.abs().max(), key  # measured: 1.1e-6


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_greedy_text_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    theirs, ours = both(tmp_path, name)
    ids = token_ids(3, 9, seed=2)
    assert torch.equal(ours.generate(ids, max_new_tokens=24), greedy(theirs, ids, 24))


def test_rows_end_at_their_own_eos(tmp_path: Path) -> None:
    ids = token_ids(3, 9, seed=2)
    free = greedy(tiny_language("llama"), ids, 24)
    eos = [int(free[0, 12]), int(free[1, 20])]
    theirs, ours = both(tmp_path, "llama", eos_token_id=eos)
    assert ours.cfg.eos_ids == tuple(eos)
    expected = greedy(theirs, ids, 24)
    assert (expected[0, 13:] == 0).all(), "the row has ended, and 0 is the padding"
    assert torch.equal(ours.generate(ids, max_new_tokens=24), expected)
    shortest = ours.generate(ids[:1], max_new_tokens=24)
    assert torch.equal(shortest, expected[:1, : shortest.shape[1]]) and shortest[0, -1] in eos


@pytest.mark.parametrize("name", ["llama", "glm4", "qwen3"])
def test_the_cache_changes_nothing(tmp_path: Path, name: str) -> None:
    ours = both(tmp_path, name)[1]
    ids = token_ids(2, 5)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, ours(ids)[:, -1:].argmax(2)], dim=1)
    assert torch.equal(ours.generate(ids[:, :5], max_new_tokens=12), ids)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_round_trip_is_exact_for_transformers_and_for_us(tmp_path: Path, name: str) -> None:
    theirs, ours = both(tmp_path / "theirs", name, eos_token_id=[3, 5])
    ours.save_pretrained(tmp_path / "ours")
    back, found = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found.values()), found
    assert type(back) is type(theirs) and back.generation_config.eos_token_id == [3, 5]
    ids = token_ids(1, 17)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, theirs(ids).logits)
    again = CausalLM.from_pretrained(tmp_path / "ours")
    assert again.cfg == ours.cfg
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in ours.state_dict().items())


def test_checkpoints_in_parts_and_in_bf16_are_read(tmp_path: Path) -> None:
    tiny_language("llama").bfloat16().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = CausalLM.from_pretrained(tmp_path)
    assert {weight.dtype for weight in ours.state_dict().values()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = token_ids(1, 17)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, **EXACT)


def test_a_config_of_the_old_form_is_read(tmp_path: Path) -> None:
    """rope_theta and rope_scaling beside the others, no head_dim, and frequencies among the weights."""
    theirs = tiny_language("llama_tied_llama3")
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    for name in ("head_dim", "attention_bias", "mlp_bias"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids = token_ids(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(CausalLM.from_pretrained(tmp_path)(ids), theirs(ids).logits, **EXACT)


def test_positions_of_images_turn_as_in_glm_ocr() -> None:
    cfg = LanguageConfig(
        "glm4", 97, 64, 2, 4, 2, 16, 96, eps=1e-5, rotary_fraction=0.5, mrope_section=(1, 1, 2), max_tokens=256
    )
    ours = CausalLM(cfg)
    scramble(ours)
    text = {
        **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256},
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 64}
    theirs = GlmOcrForConditionalGeneration(GlmOcrConfig(text_config=text, vision_config=vision)).eval()
    weights = split(ours.state_dict(), causal_lm_parts(cfg, "model.language_model."))
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    position_31S = torch.randint(0, 50, (3, 1, 20), generator=torch.Generator().manual_seed(0))
    ids = token_ids(1, 20)
    with torch.no_grad():
        expected = theirs(input_ids=ids, position_ids=position_31S).logits[0]
        segments = Segments(torch.tensor([0, 20, 20], dtype=torch.int32), (20, 0), 1)
        actual = ours.logits(ours.hidden(ours.embed(ids[0]), position_31S[:, 0], segments))
    torch.testing.assert_close(actual, expected, **EXACT)


def test_files_hold_what_the_key_map_says(tmp_path: Path) -> None:
    both(tmp_path, "glm4")[1].save_pretrained(tmp_path / "ours")
    names = load_file(tmp_path / "ours/model.safetensors")
    assert "model.layers.2.mlp.gate_up_proj.weight" in names and "model.layers.0.self_attn.k_proj.weight" in names


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_weights_read_one_by_one_are_those_read_at_once(name: str, tmp_path: Path) -> None:
    tiny_language(name).save_pretrained(tmp_path, max_shard_size="60KB")
    _, whole = read_causal_lm(tmp_path)
    lazy = CausalLMFile(tmp_path, "language.")
    assert {f"language.{one}" for one in whole} == set(lazy) and len(lazy) == len(whole)
    assert all(torch.equal(lazy[f"language.{one}"], weight) for one, weight in whole.items())
    assert "language.nothing" not in lazy and "embed.weight" not in lazy

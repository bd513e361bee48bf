"""Packs, generation, sampling and bad input of the plain language model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvit import CausalLM, LanguageConfig
from cogvit.batch import PackedSequence
from cogvit.errors import CheckpointError
from cogvit.model.attention import segments_of
from cogvit.model.generation import Sampling, next_tokens
from cogvit.model.language_config import Family
from tests.plain_vit import scramble

LENGTHS, PADDING = [5, 9, 1, 12], 3


def tiny(family: Family = "llama", **options: Any) -> CausalLM:
    """A tiny model with scrambled weights, in fp64."""
    cfg = LanguageConfig(family, 53, 32, 2, 4, 2, 8, 48, rotary_fraction=0.5 if family == "glm4" else 1.0)
    model = CausalLM(replace(cfg, **options)).double()
    scramble(model)
    return model


def pack(lengths: list[int], padding: int, visual_row: Tensor | None = None) -> PackedSequence:
    """Random text, each sample with positions of its own."""
    g = torch.Generator().manual_seed(0)
    size = sum(lengths) + padding
    place = torch.cat([torch.arange(n) for n in [*lengths, padding]])
    return PackedSequence(
        ids=torch.randint(0, 53, (size,), generator=g),
        position=place.to(torch.int32).expand(3, -1),
        cu_seqlens=torch.tensor([0, *lengths, padding]).cumsum(0).to(torch.int32),
        visual_row=torch.full((size,), -1) if visual_row is None else visual_row,
        labels=torch.zeros(size, dtype=torch.int64),
        weight=torch.ones(size),
        key=torch.zeros(len(lengths), dtype=torch.int64),
    )


@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_pack_is_its_samples_one_by_one(family: Family, recompute: bool) -> None:
    model, sequence = tiny(family), pack(LENGTHS, PADDING)
    model.recompute = recompute
    hidden_SD = model.forward_packed(sequence)[: sum(LENGTHS)]
    alone = torch.cat([model(ids[None])[0] for ids in sequence.ids[: sum(LENGTHS)].split(LENGTHS)])
    torch.testing.assert_close(model.logits(hidden_SD), alone)
    packed = torch.autograd.grad(model.logits(hidden_SD).square().sum(), [*model.parameters()])
    single = torch.autograd.grad(alone.square().sum(), [*model.parameters()])
    for ours, theirs in zip(packed, single, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tokens_see_nothing_behind_them() -> None:
    model, ids = tiny(), torch.arange(20)[None]
    changed = ids.clone()
    changed[0, 13] = 40
    difference = (model(ids) - model(changed)).abs().amax((0, 2))
    assert not difference[:13].any() and difference[13:].all()


def test_visual_rows_stand_where_the_pack_says_and_get_gradients() -> None:
    model = tiny()
    row = torch.full((sum(LENGTHS) + PADDING,), -1)
    row[6:9], row[20] = torch.tensor([2, 0, 1]), 3
    visual = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    sequence = pack(LENGTHS, PADDING, row)
    text = model.embed(sequence.ids).detach()
    text[6:9], text[20] = visual.detach()[[2, 0, 1]], visual.detach()[3]
    expected = model.hidden(text, sequence.position, segments_of(sequence.cu_seqlens))
    hidden = model.forward_packed(sequence, visual)
    assert torch.equal(hidden, expected)
    hidden[: sum(LENGTHS)].sum().backward()
    assert visual.grad is not None and visual.grad.abs().sum(1).all()
    no_image = pack(LENGTHS, PADDING)
    assert torch.equal(model.forward_packed(no_image, visual), model.forward_packed(no_image))


def test_a_pack_of_padding_gives_zero_gradients_to_every_parameter() -> None:
    model, sequence = tiny("qwen3"), pack([0, 0], 6)
    (model.logits(model.forward_packed(sequence)) * 0.0).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3"])
def test_autocast_computes_in_bf16_and_keeps_fp32_hidden_states(family: Family) -> None:
    model, sequence = tiny(family).float(), pack(LENGTHS, PADDING)
    exact = model.forward_packed(sequence)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.forward_packed(sequence)
        assert model.logits(hidden).dtype == torch.bfloat16
    assert hidden.dtype == torch.float32
    assert 0.0 < (hidden - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_prompts_of_any_length_are_answered_as_if_alone(family: Family) -> None:
    model, sequence = tiny(family, eos_ids=(7, 11), pad_id=1), pack(LENGTHS, 0)
    sampling = Sampling(max_new_tokens=15)
    segments = segments_of(sequence.cu_seqlens)
    together = torch.stack(list(model.stream(model.embed(sequence.ids), sequence.position, segments, sampling)), 1)
    for ids, answer in zip(sequence.ids.split(LENGTHS), together, strict=True):
        alone = model.generate(ids[None], max_new_tokens=15)[0, len(ids) :]
        assert answer[: len(alone)].tolist() == alone.tolist()
        assert (answer[len(alone) :] == 1).all()


def test_draws_follow_the_probabilities_and_the_seed_alone() -> None:
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probability.log().expand(4000, -1)
    drawn = next_tokens(logits, Sampling(1, temperature=1.0), step=0)
    share = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, probability, atol=0.03, rtol=0.0)
    assert torch.equal(drawn, next_tokens(logits, Sampling(1, temperature=1.0), step=0))
    assert not torch.equal(drawn, next_tokens(logits, Sampling(1, temperature=1.0, seed=1), step=0))
    later = next_tokens(logits[:-1], Sampling(1, temperature=1.0, seed=31), step=0)
    same = next_tokens(logits[:-1], Sampling(1, temperature=1.0), step=0, first_row=1)
    assert not torch.equal(later, same)  # nor is another seed the draws of the rows behind
    assert not torch.equal(drawn, next_tokens(logits, Sampling(1, temperature=1.0), step=1))
    among_two = next_tokens(logits, Sampling(1, temperature=1.0, top_p=0.79), step=0).bincount(minlength=4) / 4000
    torch.testing.assert_close(among_two, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0.0)
    assert not next_tokens(logits, Sampling(1, temperature=1.0, top_p=1e-6), step=0).any()


def test_cold_draws_are_greedy() -> None:
    model, ids = tiny(), torch.arange(8)[None]
    assert torch.equal(model.generate(ids, 10, temperature=1e-4), model.generate(ids, 10))
    assert not torch.equal(model.generate(ids, 10, temperature=5.0), model.generate(ids, 10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[0, 53]])), "token ids are 0 to 53; expected 0 to 52"),
        (lambda m: m(torch.tensor([0, 5])), r"input_ids have shape \(2,\)"),
        (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.int64), 3), r"input_ids have shape \(1, 0\)"),
        (lambda m: m.generate(torch.tensor([[5]]), 0), "max_new_tokens=0 must be at least 1"),
        (lambda m: m.generate(torch.tensor([[5]]), 2048), "a prompt of 1 tokens and an answer of 2048 exceed"),
        (lambda m: m.generate(torch.tensor([[5]]), 3, temperature=-1.0), "temperature=-1.0 must be 0"),
        (lambda m: m.generate(torch.tensor([[5]]), 3, temperature=math.nan), "temperature=nan must be 0"),
        (lambda m: m.generate(torch.tensor([[5]]), 3, top_p=0.0), "top_p=0.0 must be in"),
    ],
)
def test_bad_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; a CausalLM is one of llama, glm, glm4, qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "hidden_size must be whole numbers"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"vocab_size": 60}, r"model\.embed_tokens\.weight has shape \(53, 32\), expected \(60, 32\)"),
    ],
)
def test_bad_configurations(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        CausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_bad_weights(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = load_file(path)

    def refusal(weights: dict[str, Tensor]) -> str:
        save_file(weights, path)
        with pytest.raises(CheckpointError) as error:
            CausalLM.from_pretrained(tmp_path)
        return str(error.value)

    name = "model.layers.1.mlp.up_proj.weight"
    assert f"{name} is missing" in refusal({key: weight for key, weight in good.items() if key != name})
    assert "model.extra is unknown" in refusal({**good, "model.extra": torch.ones(2)})
    assert f"NaN or infinite values in {name};" in refusal({**good, name: torch.full_like(good[name], math.nan)})
    assert f"{name} is torch.int8" in refusal({**good, name: torch.ones(48, 32, dtype=torch.int8)})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is damaged"):
        CausalLM.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "mamba"}, "family='mamba' must be one of llama, glm, glm4, qwen3"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"rotary_fraction": 0.4}, "rotary_fraction=0.4 of head_dim=8 must be whole pairs"),
        ({"mrope_section": (1, 1, 1)}, r"mrope_section=\(1, 1, 1\) must add up to 4 pairs"),
        ({"eps": math.nan}, "eps=nan"),
    ],
)
def test_bad_shapes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options) if "family" in options else tiny("llama", **options)

"""Visual experts and cross attention of the plain language model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogvit import AdapterConfig, CausalLM, LanguageConfig, PackedSequence, VisionLanguageModel
from cogvit.errors import CheckpointError
from cogvit.model.config import CrossModuleConfig, ExpertConfig, MmtpConfig
from cogvit.model.cross import CrossRows
from cogvit.model.eva import EvaEncoder, second_encoder
from cogvit.model.expert import expert_rows, is_expert
from cogvit.model.image_input import pack_shown
from cogvit.model.language import rows_of
from cogvit.model.language_config import CrossConfig, Family, cross_of
from cogvit.model.packing import pack_images
from cogvit.model.sequence import expert_tokens, part_positions, parts_of_row
from tests.language import IMAGE_ID, conversation, picture, tiny_vlm
from tests.plain_vit import scramble

SHAPE = LanguageConfig("llama", 97, 64, 4, 4, 2, 16, 96)
IDS = torch.arange(20).view(2, 10)


def grown_vlm(every: int = 1, family: Family = "llama", **options: Any) -> VisionLanguageModel:
    """A tiny model with experts that are not the language model's copies any more."""
    small = tiny_vlm(family, **options)
    adapter = AdapterConfig("conv", None, 2)
    expert = ExpertConfig(every, qkv_bias=True)
    parts = (small.vision, small.language, small.tokenizer, adapter, 256, 1600)
    model = VisionLanguageModel.joined(*parts, expert).eval()
    for name, block in model.language.blocks.named_children():
        if block.expert is not None:
            scramble(block.expert, seed=int(name))
    return model


def digest(model: CausalLM) -> str:
    """Of the weights that are not the experts'."""
    weights = (weight.detach().numpy().tobytes() for name, weight in model.named_parameters() if not is_expert(name))
    return hashlib.sha256(b"".join(weights)).hexdigest()


def test_routing_and_positions_are_those_of_the_released_code() -> None:
    parts = parts_of_row([False, *[True] * 6, False, False], [(2, 2)], framed=True)
    assert part_positions(parts, by_place=False, framed=True)[0].tolist() == [0, 1, 2, 2, 2, 2, 3, 4, 5]
    assert expert_tokens(parts, framed=True).tolist() == [False, *[True] * 5, False, False, False]
    side_by_side = parts_of_row([True] * 10, [(2, 2), (1, 2)], framed=True)
    assert part_positions(side_by_side, by_place=False, framed=True)[0].tolist() == [0, 1, 1, 1, 1, 2, 3, 4, 4, 5]
    assert expert_tokens(side_by_side, framed=True).tolist() == [*[True] * 5, False, *[True] * 3, False]
    assert expert_tokens([2, (1, 2)]).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match=r"images of \[6\] tokens"):
        parts_of_row([True] * 4, [(2, 2)], framed=True)


@pytest.mark.parametrize("every", [1, 3])
@torch.no_grad()
def test_new_experts_are_copies_and_change_nothing(every: int) -> None:
    model = CausalLM(SHAPE)
    grown = model.with_experts(ExpertConfig(every, qkv_bias=True))
    assert [block.expert is not None for block in grown.blocks] == [layer % every == 0 for layer in range(4)]
    assert torch.equal(grown(IDS), model(IDS)) and digest(grown) == digest(model)
    mask_S = torch.rand(20, generator=torch.Generator().manual_seed(0)) < 0.5
    x_SD, position_3S = grown.embed(IDS.flatten()), torch.arange(10).repeat(2).expand(3, -1)
    segments = rows_of(IDS.shape, torch.device("cpu"))
    with_rows = grown.hidden(x_SD, position_3S, segments, expert=expert_rows(mask_S))
    torch.testing.assert_close(with_rows, model.hidden(x_SD, position_3S, segments), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="has visual experts in every"):
        grown.with_experts(ExpertConfig(1))


@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3"])
@torch.no_grad()
def test_text_is_the_frozen_language_models_to_the_bit(family: Family) -> None:
    small, model = tiny_vlm(family), grown_vlm(2, family)
    ids = torch.arange(10, 30).view(2, 10)
    assert torch.equal(model(ids), small.language(ids))
    image, other = picture(16, 16), picture(16, 16, seed=9)
    row = torch.tensor([[30, *[IMAGE_ID] * model.num_visual_tokens(image), 31, 32]])
    assert not torch.equal(model(row, [[image]]), model(row, [[other]]))
    copies = VisionLanguageModel(
        model.vision, model.adapter, small.language.with_experts(model.language.cfg.expert), IMAGE_ID, model.limits
    )
    copies.frame = model.frame
    assert not torch.equal(model(row, [[image]])[0, -1], copies(row, [[image]])[0, -1])


def test_only_experts_are_trained() -> None:
    model = grown_vlm().train()
    before = digest(model.language)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    image = picture(16, 16)
    row = torch.tensor([[30, *[IMAGE_ID] * model.num_visual_tokens(image), 31, 32]])
    model(row, [[image]]).square().mean().backward()
    trained = {name for name, weight in model.language.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.language.named_parameters() if is_expert(name)}
    assert all(
        weight.grad.any() for name, weight in model.named_parameters() if is_expert(name) and weight.grad is not None
    )
    optimizer.step()
    assert digest(model.language) == before


def test_a_pack_gives_its_samples_features_and_text_alone_reaches_every_expert() -> None:
    model, image = grown_vlm(), picture(16, 24)
    count = model.num_visual_tokens(image)
    row = torch.tensor([30, *[IMAGE_ID] * count, 31, 32])
    parts = parts_of_row((row == IMAGE_ID).tolist(), [model.token_grid(image)], framed=True)
    padding = 3
    ids = torch.cat([row, torch.tensor([33, 34]), torch.zeros(padding, dtype=torch.int64)])
    places = [part_positions(own, by_place=False, framed=True) for own in (parts, [2], [padding])]
    visual = torch.where(ids == IMAGE_ID, (ids == IMAGE_ID).cumsum(0) - 1, -1)
    expert = torch.cat([expert_tokens(parts, framed=True), torch.zeros(2 + padding, dtype=torch.bool)])
    bounds = torch.tensor([0, len(row), 2, padding]).cumsum(0).to(torch.int32)
    zeros = torch.zeros(len(ids))
    sequence = PackedSequence(
        ids, torch.cat(places, 1).int(), bounds, visual, zeros.long(), zeros, torch.zeros(2).long(), expert=expert
    )
    images = pack_shown([image], model.limits, 4, torch.device("cpu"))
    hidden = model.forward_packed(images, sequence)
    logits = model.language.logits(hidden)
    torch.testing.assert_close(logits[: len(row)], model(row[None], [[image]])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits[len(row) : -padding], model(ids[None, len(row) : -padding])[0], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="the pack must say which tokens go through them"):
        model.forward_packed(images, replace(sequence, expert=None))
    model.zero_grad()
    text = replace(sequence, visual_row=torch.full_like(visual, -1), expert=torch.zeros_like(expert))
    model.forward_packed(pack_images([torch.zeros(0, 48)], [(0, 0)], tokens_per_pack=6), text).sum().backward()
    for name, parameter in model.named_parameters():
        if is_expert(name) or name.startswith("frame."):
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_an_expert_costs_a_token_what_the_language_model_does() -> None:
    model = CausalLM(SHAPE).with_experts(ExpertConfig(1, qkv_bias=True))
    x_SD, position_3S = torch.randn(40, 64), torch.arange(40).expand(3, -1)
    segments, flops = rows_of(torch.Size((1, 40)), torch.device("cpu")), []
    for rows in (None, expert_rows(torch.arange(40) % 3 > 0)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.hidden(x_SD, position_3S, segments, expert=rows)
        flops.append(counter.get_total_flops())
    assert flops[1] == flops[0]


def test_drafts_give_the_same_answer() -> None:
    model = grown_vlm(mmtp=MmtpConfig(depths=1))
    assert model.language.mtp is not None and not any(
        is_expert(name) for name, _ in model.language.mtp.named_parameters()
    )
    question = conversation(picture(16, 24))
    assert model.generate(question, 6, draft="mtp") == model.generate(question, 6)


@torch.no_grad()
def test_cross_attention_begins_as_the_identity_and_adds_nothing_without_images() -> None:
    torch.manual_seed(0)
    model = CausalLM(replace(SHAPE, cross=CrossConfig(24, 32)))
    x_SD, position_3S = torch.randn(20, 64), torch.arange(10).repeat(2).expand(3, -1)
    segments = rows_of(torch.Size((2, 10)), torch.device("cpu"))
    rows = CrossRows(torch.randn(7, 24), (7, 0))
    plain = model.hidden(x_SD, position_3S, segments)
    assert torch.equal(model.hidden(x_SD, position_3S, segments, cross=rows), plain)
    for block in model.blocks:
        block.cross.proj.weight.normal_()
    seen = model.hidden(x_SD, position_3S, segments, cross=rows)
    assert torch.equal(seen[10:], plain[10:])
    assert ((seen - plain)[:10].abs().amax(1) > 1e-3).all()
    assert torch.equal(model.hidden(x_SD, position_3S, segments, cross=CrossRows(torch.zeros(0, 24), (0, 0))), plain)


def test_cross_attention_without_images_still_has_gradients() -> None:
    model = CausalLM(replace(SHAPE, cross=CrossConfig(24, 32)))
    rows, x_SD = CrossRows(torch.zeros(0, 24), (0,)), torch.randn(5, 64)
    segments = rows_of(torch.Size((1, 5)), torch.device("cpu"))
    model.hidden(x_SD, torch.arange(5).expand(3, -1), segments, cross=rows).sum().backward()
    for name, parameter in model.blocks.named_parameters():
        assert parameter.grad is not None, name
        assert ".cross." not in name or not parameter.grad.any()


@pytest.mark.parametrize("every", [1, 2])
def test_a_directory_of_ours_holds_experts_beside_the_language_model(tmp_path: Path, every: int) -> None:
    model = grown_vlm(every)
    model.save_pretrained(tmp_path)
    back = VisionLanguageModel.from_pretrained(tmp_path)
    assert back.language.cfg == model.language.cfg
    question = conversation(picture(16, 24))
    assert back.generate(question, 8) == model.generate(question, 8)
    alone = CausalLM.from_pretrained(tmp_path / "language")
    assert not alone.cfg.expert.every and digest(alone) == digest(model.language)
    with pytest.raises(CheckpointError, match="holds no visual experts"):
        model.language.save_pretrained(tmp_path / "other")
    (tmp_path / "expert" / "config.json").write_text('{"every": 3, "qkv_bias": true, "framed": true}')
    with pytest.raises(CheckpointError, match="expert: the weights do not fit the model") as error:
        VisionLanguageModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_directory_of_ours_holds_a_cross_module(tmp_path: Path) -> None:
    small, module = tiny_vlm("llama"), CrossModuleConfig(32, 4, 24, 2, 2, 32, 32)
    language = CausalLM(replace(small.language.cfg, cross=cross_of(module)))
    cross = EvaEncoder(second_encoder(module))
    for part in (language, cross):
        scramble(part)
    parts = (small.vision, small.adapter, language, IMAGE_ID, small.limits, small.tokenizer)
    model = VisionLanguageModel(*parts, cross=cross).eval()
    model.save_pretrained(tmp_path)
    back = VisionLanguageModel.from_pretrained(tmp_path)
    assert back.language.cfg == language.cfg and back.cross is not None and back.cross.cfg == cross.cfg
    ids, images = model.prompt(conversation(picture(16, 24)))
    seen = model(ids[None], [images])
    assert torch.equal(back(ids[None], [images]), seen)
    alone = CausalLM.from_pretrained(tmp_path / "language")
    assert not alone.cfg.cross.dim and torch.equal(alone.head.weight, language.head.weight)
    (tmp_path / "expert" / "config.json").write_text('{"every": 0, "framed": false, "cross": {"image_size": 30}}')
    with pytest.raises(CheckpointError, match="does not divide cross"):
        VisionLanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertConfig(-1), "expert.every=-1 must be 0"),
        (lambda: CrossConfig(5, 0), "must both be 0, or above"),
        (lambda: CrossModuleConfig(30, 4), "cross.patch_size=4 does not divide cross.image_size=30"),
        (lambda: CrossModuleConfig(32, 4, num_heads=3), "cross.num_heads=3 must divide cross.embed_dim=1024"),
        (lambda: CrossModuleConfig(-1), "cross.image_size=-1 must be 0"),
        (lambda: replace(SHAPE, cross=CrossConfig(8, 30)), "num_heads=4 does not divide cross.dim=30"),
        (lambda: replace(SHAPE, rope_frequencies=(1.0,)), "rope_frequencies are 1; expected 8"),
    ],
)  # fmt: skip
def test_bad_options(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]

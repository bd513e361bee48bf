"""Heads that predict more tokens: against a loop over samples and places, and drafts against the model alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvit import CausalLM, VisionLanguageModel
from cogvit.batch import PackedSequence
from cogvit.errors import CheckpointError
from cogvit.model.attention import segments_of
from cogvit.model.config import SEEN_AT_IMAGES, MmtpConfig, SeenAtImages
from cogvit.model.decoder import CausalLayout, rotary_1d
from cogvit.model.drafting import Drafted, Prompt
from cogvit.model.generation import Sampling, next_tokens
from cogvit.model.language import place_visual
from cogvit.model.language_config import Family, LanguageConfig
from cogvit.model.sequence import tokens_ahead
from tests.language import conversation, picture, tiny_vlm
from tests.plain_vit import scramble

LENGTHS, PADDING, IMAGE = [7, 12, 2, 1], 3, 52
VISUAL = {1: (4, "first"), 9: (6, "second")}  # place in the pack -> tokens of the image there
IMAGE_TOKENS = (4, 6)


def tiny(images: SeenAtImages, family: Family = "llama", **options: Any) -> CausalLM:
    cfg = LanguageConfig(family, 53, 32, 2, 4, 2, 8, 64, rotary_fraction=0.5 if family == "glm4" else 1.0)
    mmtp = MmtpConfig(**{"depths": 3, "images": images, "tokens": 2, **options})
    model = CausalLM(replace(cfg, mmtp=mmtp)).double()
    scramble(model)
    return model


def pack() -> PackedSequence:
    g = torch.Generator().manual_seed(0)
    size = sum(LENGTHS) + PADDING
    ids, visual_row, row = torch.randint(0, 52, (size,), generator=g), torch.full((size,), -1, dtype=torch.int32), 0
    for place, (tokens, _) in VISUAL.items():
        ids[place : place + tokens] = IMAGE
        visual_row[place : place + tokens] = torch.arange(row, row + tokens)
        row += tokens
    weight = (torch.rand(size, generator=g) < 0.7).float()
    weight[sum(LENGTHS) :] = 0.0
    return PackedSequence(
        ids=ids,
        position=torch.cat([torch.arange(n) for n in [*LENGTHS, PADDING]]).to(torch.int32).expand(3, -1),
        cu_seqlens=torch.tensor([0, *LENGTHS, PADDING]).cumsum(0).to(torch.int32),
        visual_row=visual_row,
        labels=torch.randint(0, 52, (size,), generator=g),
        weight=weight,
        key=torch.zeros(len(LENGTHS), dtype=torch.int64),
    )


def losses(model: CausalLM, sequence: PackedSequence, visual: Tensor) -> list[Tensor]:
    """Sums over the pack, the next token's first."""
    ahead = tokens_ahead(sequence, model.cfg.mmtp, IMAGE_TOKENS)
    hidden = model.forward_packed(sequence, visual)
    sums = [(F.cross_entropy(model.logits(hidden), sequence.labels, reduction="none") * sequence.weight).sum()]
    deep = model.forward_ahead(hidden, sequence, ahead, visual)
    for hidden, source, weight in zip(deep, ahead.source.long(), ahead.weight, strict=True):
        each = F.cross_entropy(model.logits(hidden), sequence.labels[source], reduction="none")
        sums.append((each * weight).sum())
    return sums


def plainly(model: CausalLM, sequence: PackedSequence, visual: Tensor) -> list[Tensor]:
    """The same, sample by sample and place by place, as the report describes it."""
    mmtp, heads = model.cfg.mmtp, model.mtp
    assert heads is not None
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(mmtp.depths + 1)]
    slots = {place + i: i * mmtp.tokens // tokens for place, (tokens, _) in VISUAL.items() for i in range(tokens)}
    start = 0
    for length in LENGTHS:
        places = range(start, start + length)
        is_image = [int(sequence.visual_row[i]) >= 0 for i in places]
        text = model.embed(sequence.ids[start : start + length])
        x = torch.stack(
            [
                visual[sequence.visual_row[i]] if image else text[i - start]
                for i, image in zip(places, is_image, strict=True)
            ]
        )
        position = sequence.position[:, start : start + length]
        hidden = model.hidden(x, position, segments_of(torch.tensor([0, length, length])))
        seen = x if mmtp.images == "embeddings" else text
        if mmtp.images == "tokens":
            seen = torch.stack([heads.image_token[slots[i]] if i in slots else text[i - start] for i in places])
        label, weight = sequence.labels[start : start + length], sequence.weight[start : start + length]
        for i in range(length):
            sums[0] = sums[0] + weight[i] * F.cross_entropy(model.logits(hidden[i]), label[i])
        for depth in range(1, mmtp.depths + 1):
            layer, rows = heads.layers[0 if mmtp.share else depth - 1], []
            kept = [i for i in range(length - depth) if mmtp.images != "masked" or not is_image[i + depth]]
            if kept:
                here, there = torch.tensor(kept), torch.tensor(kept) + depth
                joined = layer.eh_proj(torch.cat([layer.enorm(seen[there]), layer.hnorm(hidden[here])], dim=1))
                segments = segments_of(torch.tensor([0, len(kept), len(kept)]))
                layout = CausalLayout(segments, *rotary_1d(position[:, there], model.cfg))
                rows = list(layer.norm(layer.blocks[0](joined, layout)))
            deep = dict(zip(kept, rows, strict=True))
            hidden = torch.stack([deep.get(i, hidden[i]) for i in range(length)])
            for i in kept:
                crosses = any(is_image[i + 1 : i + depth + 1])
                if not (mmtp.images == "token_path" and crosses):
                    loss = F.cross_entropy(model.logits(hidden[i]), label[i + depth])
                    sums[depth] = sums[depth] + weight[i + depth] * loss
        start += length
    return sums


@pytest.mark.parametrize("images", SEEN_AT_IMAGES)
@pytest.mark.parametrize("share", [True, False])
def test_every_depth_is_that_of_a_loop_over_places(images: SeenAtImages, share: bool) -> None:
    model, sequence = tiny(images, "glm4" if share else "qwen3", share=share), pack()
    visual = torch.randn(10, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ours, theirs = losses(model, sequence, visual), plainly(model, sequence, visual)
    for mine, loss in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, loss)
    everything = [visual, *model.parameters()]
    gradients = torch.autograd.grad(sum(ours), everything)  # type: ignore[arg-type]
    expected = torch.autograd.grad(sum(theirs), everything)  # type: ignore[arg-type]
    for mine, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, gradient)


def test_a_stopped_gradient_ends_before_the_blocks() -> None:
    model, sequence, visual = tiny("tokens", trunk_gradient=False), pack(), torch.zeros(10, 32, dtype=torch.float64)
    sum(losses(model, sequence, visual)[1:]).backward()  # type: ignore[union-attr]
    assert model.blocks[0].attn.qkv.weight.grad is None  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in model.mtp.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("images", SEEN_AT_IMAGES)
def test_a_pack_of_padding_still_reaches_every_parameter(images: SeenAtImages) -> None:
    model, one = tiny(images), pack()
    blank = torch.zeros_like
    empty = replace(
        one,
        ids=blank(one.ids),
        visual_row=blank(one.visual_row) - 1,
        labels=blank(one.labels),
        weight=blank(one.weight),
    )
    empty.cu_seqlens[:-1] = 0
    ahead = tokens_ahead(empty, model.cfg.mmtp, ())
    hidden = model.forward_packed(empty)
    assert not ahead.weight.any()
    sum((model.logits(x) * 0.0).sum() for x in [hidden, *model.forward_ahead(hidden, empty, ahead)]).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def with_image(model: CausalLM, ids: Tensor) -> tuple[Prompt, PackedSequence, Tensor]:
    """A prompt with an image of four tokens at its third place, for drafts and as a pack."""
    length = len(ids)
    visual = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    row, ids = torch.full((length,), -1), ids.clone()
    row[2:6], ids[2:6] = torch.arange(4), IMAGE
    place = torch.arange(length).expand(3, -1)
    nothing = torch.zeros(length)
    bounds = torch.tensor([0, length, length])
    sequence = PackedSequence(ids, place, bounds, row, nothing.long(), nothing, torch.zeros(1, dtype=torch.int64))
    embedded = model.embed(ids).detach()
    slot = tokens_ahead(sequence, model.cfg.mmtp, (4,)).slot
    return Prompt(place_visual(embedded, visual, row), embedded, slot, place), sequence, visual


def learned(images: SeenAtImages, *, share: bool) -> CausalLM:
    """A model that has learned to count round a circle, so that many drafts are right, and many wrong."""
    model = tiny(images, share=share)
    torch.manual_seed(0)
    start = CausalLM(model.cfg)
    model.load_state_dict(start.state_dict())
    ids = 3 + torch.arange(40) % 7
    _, sequence, visual = with_image(model, ids)
    sequence = replace(sequence, labels=ids.roll(-1), weight=torch.ones(40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        ahead = tokens_ahead(sequence, model.cfg.mmtp, (4,))
        hidden = model.forward_packed(sequence, visual)
        loss = F.cross_entropy(model.logits(hidden)[:-1], sequence.labels[:-1])
        for deep, source, weight in zip(
            model.forward_ahead(hidden, sequence, ahead, visual), ahead.source.long(), ahead.weight, strict=True
        ):
            each = F.cross_entropy(model.logits(deep), sequence.labels[source], reduction="none")
            loss = loss + (each * weight)[:-4].mean()
        loss.backward()
        optimizer.step()
    return model


def drafted_slowly(model: CausalLM, ids: Tensor, sampling: Sampling) -> tuple[list[int], int]:
    """The answer and the number of passes when every round begins from nothing."""
    answer: list[int] = []
    drafts: list[int] = []
    passes = 0

    def chosen(hidden: Tensor, step: int) -> int:
        return int(next_tokens(model.logits(hidden)[None], sampling, step))

    while True:
        known = torch.cat([ids, torch.tensor([*answer, *drafts], dtype=torch.int64)])
        _, sequence, visual = with_image(model, known)
        hidden = model.forward_packed(sequence, visual)
        for place in range(len(drafts) + 1):
            answer.append(chosen(hidden[len(known) - len(drafts) - 1 + place], len(answer)))
            if len(answer) == sampling.max_new_tokens:
                return answer, passes
            if place < len(drafts) and answer[-1] != drafts[place]:
                break
        drafts, passes = [], passes + 1
        for depth in range(min(model.cfg.mmtp.depths, sampling.max_new_tokens - len(answer) - 1)):
            known = torch.cat([ids, torch.tensor([*answer, *drafts], dtype=torch.int64)])
            _, sequence, visual = with_image(model, known)
            hidden = model.forward_packed(sequence, visual)
            ahead = tokens_ahead(sequence, model.cfg.mmtp, (4,))
            deep = model.forward_ahead(hidden, sequence, ahead, visual)[depth]
            drafts.append(chosen(deep[len(ids) + len(answer) - 2], len(answer) + depth))


@torch.no_grad()
@pytest.mark.parametrize("images", SEEN_AT_IMAGES)
def test_drafts_are_those_of_the_heads_over_the_whole_text(images: SeenAtImages) -> None:
    with torch.enable_grad():
        model = learned(images, share=images != "token")
    lengths = []
    for seed, temperature in enumerate([0.0, 0.7, 0.7, 1.5]):
        ids, sampling = 3 + torch.arange(seed, seed + 8 + seed) % 7, Sampling(26, temperature, seed=seed)
        prompt, sequence, _ = with_image(model, ids)
        drafted = Drafted()
        answer = torch.cat([*model.stream_drafted(prompt, sampling, drafted)]).tolist()
        segments = segments_of(sequence.cu_seqlens)
        alone = torch.cat([*model.stream(prompt.x_SD, prompt.position_3S, segments, sampling)]).tolist()
        assert answer == alone
        assert (answer, drafted.passes) == drafted_slowly(model, ids, sampling)
        assert drafted.tokens == 25
        lengths.append(drafted.accepted_length)
    assert max(lengths) > 2.0 and min(lengths) < max(lengths)


@torch.no_grad()
@pytest.mark.parametrize("images", SEEN_AT_IMAGES)
@pytest.mark.parametrize("most", [1, 2, 9])
def test_a_prompt_may_end_with_its_image_and_an_answer_inside_a_draft(images: SeenAtImages, most: int) -> None:
    model = tiny(images)
    prompt, sequence, _ = with_image(model, torch.arange(3, 9))
    lone = model.text_prompt(model.embed_ids(torch.tensor([5])), 0)
    for asked, bounds in ((prompt, sequence.cu_seqlens), (lone, torch.tensor([0, 1, 1]))):
        alone = [*model.stream(asked.x_SD, asked.position_3S, segments_of(bounds), Sampling(most))]
        drafted = Drafted()
        assert torch.equal(torch.cat([*model.stream_drafted(asked, Sampling(most), drafted)]), torch.cat(alone))
        assert drafted.tokens == most - 1 and drafted.accepted_length >= 1.0


def test_an_answer_ends_where_it_ends_without_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("token")
    model.cfg = replace(model.cfg, eos_ids=(3, 11), pad_id=1)
    for seed, temperature in enumerate([0.0, 0.7, 2.0]):
        ids = torch.randint(0, 52, (3, 4 + seed), generator=torch.Generator().manual_seed(seed))
        alone = model.generate(ids, 24, temperature=temperature, seed=seed)
        assert torch.equal(model.generate(ids, 24, temperature=temperature, seed=seed, draft="mtp"), alone)
        assert capsys.readouterr().err.startswith("accepted length 1.")


def test_a_model_without_heads_does_not_draft() -> None:
    with pytest.raises(ValueError, match="no heads"):
        tiny("token", depths=0).generate(torch.zeros(1, 3, dtype=torch.int64), 5, draft="mtp")


def described(model: VisionLanguageModel, *shown: Image.Image) -> tuple[str, str]:
    """The same answer twice, the second with drafts."""
    question = conversation(*shown)
    return model.generate(question, 16), model.generate(question, 16, draft="mtp")


@pytest.mark.parametrize("images", SEEN_AT_IMAGES)
@pytest.mark.parametrize("share", [True, False])
def test_heads_travel_with_a_vision_language_model(tmp_path: Path, images: SeenAtImages, share: bool) -> None:
    model = tiny_vlm(eos_ids=(0,), mmtp=MmtpConfig(2, share, images, tokens=3))
    model.save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.language.cfg == model.language.cfg
    for name, weight in model.language.state_dict().items():
        assert torch.equal(again.language.state_dict()[name], weight), name
    shown = [picture(16, 24, seed=0), picture(40, 24, seed=1)]
    assert described(again, *shown)[0] == described(again, *shown)[1] == described(model, *shown)[1]


def test_one_shared_head_lies_where_glm_ocr_has_it(tmp_path: Path) -> None:
    model = tiny_vlm(eos_ids=(0,), mmtp=MmtpConfig(3))
    model.save_glm_ocr_full(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    there = "model.language_model.layers.3."
    names = {name.removeprefix(there) for name in weights if name.startswith(there)}
    block = {
        name.removeprefix("model.language_model.layers.2.") for name in weights if "language_model.layers.2." in name
    }
    assert names == block | {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.language.cfg.mmtp == MmtpConfig(3)
    assert len(set(described(again, picture(16, 24)) + described(model, picture(16, 24)))) == 1
    copies = {f"{there}embed_tokens.weight": weights["model.language_model.embed_tokens.weight"].clone()}
    save_file(weights | copies, tmp_path / "model.safetensors", {"format": "pt"})  # as the released files have them
    assert len(set(described(VisionLanguageModel.from_pretrained(tmp_path), picture(16, 24)))) == 1


def test_transformers_reads_the_model_and_leaves_the_head(tmp_path: Path) -> None:
    """5.23 cannot draft with it: what it looks for behind the last layer is not what its own GLM-OCR files hold."""
    transformers = pytest.importorskip("transformers")
    model = tiny_vlm(eos_ids=(0,), mmtp=MmtpConfig(3))
    model.save_glm_ocr_full(tmp_path)
    theirs = transformers.GlmOcrForConditionalGeneration.from_pretrained(tmp_path).double()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(theirs(ids).logits, model.double().language(ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match=r"mtp|MTP|layers"):
        theirs.generate(ids, max_new_tokens=8, use_mtp=True)


@pytest.mark.parametrize("mmtp", [MmtpConfig(2, share=False), MmtpConfig(2, images="tokens")])
def test_what_glm_ocr_cannot_hold_is_said(tmp_path: Path, mmtp: MmtpConfig) -> None:
    with pytest.raises(CheckpointError, match="expected one shared layer"):
        tiny_vlm(eos_ids=(0,), mmtp=mmtp).save_glm_ocr_full(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": -1}, "mmtp.depths=-1"),
        ({"images": "all"}, "mmtp.images='all' must be one of embeddings"),
        ({"tokens": 0}, "mmtp.tokens=0"),
        ({"weight": float("nan")}, "mmtp.weight=nan"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MmtpConfig(**options)

"""Images and text in one sequence: where images stand, what a pack is, files, and bad input."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.glm46v.image_processing_pil_glm46v import smart_resize

from cogvit import AdapterConfig, CausalLM, CogViT, ImageLimits, VisionLanguageModel
from cogvit.batch import PackedSequence
from cogvit.errors import CheckpointError, DataError
from cogvit.model.adapter import make_adapter
from cogvit.model.config import AdapterKind
from cogvit.model.generation import Sampling
from cogvit.model.image_input import pack_shown, rgb_image
from cogvit.model.language_config import Family
from cogvit.model.packing import pack_images
from cogvit.model.sequence import part_positions, parts_of_row
from tests.language import IMAGE_ID, PLAIN, STRUCTURED, conversation, picture, tiny_tokenizer, tiny_vlm

KINDS: list[tuple[AdapterKind, int]] = [("mlp", 2), ("glm", 2), ("swiglu", 1), ("conv", 2)]
A, B, C = picture(16, 16), picture(24, 32, seed=1), picture(40, 24, seed=2)


def ids_of(model: VisionLanguageModel, *parts: int | Image.Image) -> torch.Tensor:
    """Token ids [1, T]: numbers as they are, images as runs."""
    runs = [[part] if isinstance(part, int) else [IMAGE_ID] * model.num_visual_tokens(part) for part in parts]
    return torch.tensor([[token for run in runs for token in run]])


@pytest.mark.parametrize(("kind", "pool"), KINDS)
def test_adapters_take_a_pack_as_its_images_one_by_one(kind: AdapterKind, pool: int) -> None:
    adapter = make_adapter(AdapterConfig(kind, 20, pool), 6, 10)
    grids, absent = [(2, 4), (3, 5), (2, 2)], (0, 0)
    images = [torch.randn(rows * columns, 6) for rows, columns in grids]
    packed = adapter.forward_packed(torch.cat([*images, torch.randn(3, 6)]), [grids[0], absent, *grids[1:]])
    alone = torch.cat([adapter(image[None], grid)[0] for image, grid in zip(images, grids, strict=True)])
    torch.testing.assert_close(packed, alone)
    assert adapter.forward_packed(torch.randn(3, 6), [absent]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"patch tokens have shape \(3, 6\); expected \(8 or more, 6\)"):
        adapter.forward_packed(torch.randn(3, 6), [(2, 4)])


@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3"])
@torch.no_grad()
def test_text_alone_has_the_language_models_logits_to_the_bit(family: Family) -> None:
    model, ids = tiny_vlm(family), torch.arange(10, 30).view(2, 10)
    assert torch.equal(model(ids), model.language(ids))
    assert torch.equal(model(ids, [[], []]), model.language(ids))


@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3"])
@torch.no_grad()
def test_rows_with_images_anywhere_are_what_they_are_alone(family: Family) -> None:
    model = tiny_vlm(family)
    rows: list[tuple[int | Image.Image, ...]] = [(A, 30, 31, B), (40, C, A, 41), (50, 51, B, B)]
    ids = [ids_of(model, *row) for row in rows]
    longest = max(row.shape[1] for row in ids)
    ids = [torch.cat([row, torch.full((1, longest - row.shape[1]), 60)], dim=1) for row in ids]
    text = torch.arange(100, 100 + longest)[None]
    images = [[part for part in row if not isinstance(part, int)] for row in rows]
    together = model(torch.cat([*ids, text]), [*images, []])
    for row, own, logits in zip([*ids, text], [*images, []], together, strict=True):
        torch.testing.assert_close(logits, model(row, [own])[0], atol=1e-5, rtol=0.0)
    other = model(torch.cat([*ids, text]), [[A, C.resize(B.size)], *images[1:], []])
    assert not torch.equal(other[0], together[0])
    torch.testing.assert_close(other[1:], together[1:], atol=1e-5, rtol=0.0)


def test_a_pack_gives_its_samples_features_and_gradients() -> None:
    model = tiny_vlm().double()
    rows = [ids_of(model, 30, A, 31, C), ids_of(model, 32, 33, 34), ids_of(model, B)]
    shown = [[A, C], [], [B]]
    grids = [[model.token_grid(image) for image in own] for own in shown]
    ids = torch.cat([*(row[0] for row in rows), torch.zeros(4, dtype=torch.int64)])
    spans = [parts_of_row((row[0] == IMAGE_ID).tolist(), own) for row, own in zip(rows, grids, strict=True)]
    position = torch.cat([*(part_positions(parts, by_place=True) for parts in spans), torch.zeros(3, 4)], dim=1)
    visual = torch.where(ids == IMAGE_ID, (ids == IMAGE_ID).cumsum(0) - 1, -1)
    zeros = torch.zeros(len(ids))
    bounds = torch.tensor([0, *(row.shape[1] for row in rows), 4]).cumsum(0).to(torch.int32)
    sequence = PackedSequence(ids, position.int(), bounds, visual, zeros.long(), zeros, torch.zeros(3).long())
    images = pack_shown([A, C, B], model.limits, 4, torch.device("cpu"))
    packed = model.language.logits(model.forward_packed(images, sequence))[: int(bounds[-2])]
    alone = torch.cat([model(row, [own])[0] for row, own in zip(rows, shown, strict=True)])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-6)
    trained = [parameter for name, parameter in model.named_parameters() if "mask_token" not in name]
    ours, theirs = torch.autograd.grad(packed.sum(), trained), torch.autograd.grad(alone.sum(), trained)
    assert all(gradient.any() for gradient in ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_pack_without_images_still_reaches_every_weight() -> None:
    model = tiny_vlm()
    size = torch.tensor([0, 5, 8], dtype=torch.int32)
    ids, zeros = torch.arange(10, 18), torch.zeros(8)
    sequence = PackedSequence(
        ids, torch.arange(8).expand(3, -1), size, torch.full((8,), -1), ids, zeros, torch.zeros(1).long()
    )
    padding = pack_images([torch.zeros(0, 48)], [(0, 0)], tokens_per_pack=6)
    hidden = model.forward_packed(padding, sequence)
    assert torch.equal(hidden, model.language.forward_packed(sequence))
    hidden.sum().backward()
    for name, parameter in model.named_parameters():
        untouched = name.startswith(("vision.", "adapter."))
        if name not in ("vision.mask_token", "language.head.weight"):
            assert parameter.grad is not None and (not parameter.grad.any()) == untouched, name


def test_positions_go_by_place_or_one_by_one() -> None:
    parts = parts_of_row([False, *[True] * 6, *[True] * 2, False, False], [(2, 3), (1, 2)])
    assert parts == [1, (2, 3), (1, 2), 2]
    assert part_positions(parts, by_place=False)[1].tolist() == list(range(11))
    time, row, column = part_positions(parts, by_place=True).tolist()
    assert time == [0, 1, 1, 1, 1, 1, 1, 4, 4, 6, 7]
    assert row == [0, 1, 1, 1, 2, 2, 2, 4, 4, 6, 7]
    assert column == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7]


@given(
    sides=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    unit=st.sampled_from([8, 28, 32]),
    low=st.integers(1, 40),
    high=st.integers(0, 400),
)
def test_sizes_are_those_of_transformers(sides: tuple[int, int], unit: int, low: int, high: int) -> None:
    limits = ImageLimits(unit, low * unit**2, (low + high) * unit**2)
    try:
        expected = smart_resize(
            2, *sides, factor=unit, min_pixels=2 * low * unit**2, max_pixels=2 * (low + high) * unit**2
        )
    except ValueError:
        with pytest.raises(DataError, match="too thin"):
            limits.size_px(*sides)
    else:
        assert limits.size_px(*sides) == expected


@torch.no_grad()
def test_an_image_is_the_same_in_every_form(tmp_path: Path) -> None:
    model = tiny_vlm()
    B.save(tmp_path / "b.png")
    url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'b.png').read_bytes()).decode()}"
    pixels = torch.tensor(list(B.tobytes()), dtype=torch.uint8).view(B.height, B.width, 3).permute(2, 0, 1)
    ids = ids_of(model, 30, B, 31)
    expected = model(ids, [[B]])
    for form in (pixels, tmp_path / "b.png", str(tmp_path / "b.png"), url, B.convert("RGBA")):
        assert torch.equal(model(ids, [[form]]), expected)
    asked = [
        {"type": "image", "image": B},
        {"type": "image", "image": str(tmp_path / "b.png")},
        {"type": "image_url", "image_url": str(tmp_path / "b.png")},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    question = {"type": "text", "text": "Who?"}
    answers = {model.generate([{"role": "user", "content": [part, question]}], 12) for part in asked}
    assert len(answers) == 1


def test_answers_depend_on_the_image_and_come_in_pieces() -> None:
    model = tiny_vlm()
    answers = {model.generate(conversation(image), 12) for image in (A, B, C)}
    assert len(answers) == 3
    pieces = list(model.stream(conversation(A, B), Sampling(40)))
    assert len(pieces) > 5 and "".join(pieces) == model.generate(conversation(A, B), 40)
    assert model.generate(conversation(A), 12, temperature=3.0, seed=1) != model.generate(conversation(A), 12)


def test_letters_of_several_tokens_come_whole() -> None:
    model = tiny_vlm("llama")
    said = model.tokenizer("aé中b", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.language.head = torch.nn.Linear(64, 288, bias=False)
        for parameter in model.language.parameters():
            parameter.zero_()
    following = iter(said)

    def next_in_line(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(following)]), 288).float()

    model.language.head.register_forward_hook(next_in_line)
    assert [piece for piece in model.stream(conversation(), Sampling(len(said))) if piece] == ["a", "é", "中", "b"]


@pytest.mark.parametrize("template", [STRUCTURED, PLAIN])
def test_templates_with_and_without_images_give_one_prompt(template: str) -> None:
    model = tiny_vlm(template=template)
    messages = [*conversation(A, B), {"role": "assistant", "content": "A."}, {"role": "user", "content": "And?"}]
    ids, images = model.prompt(messages)
    a, b = (f"<|begin_of_image|>{'<|image|>' * model.num_visual_tokens(image)}<|end_of_image|>" for image in (A, B))
    assert model.tokenizer.decode(ids) == f"<|user|>{a}{b}What is it?<|assistant|>A.<|user|>And?<|assistant|>"
    assert images == [A, B]


@pytest.mark.parametrize(("kind", "pool"), KINDS)
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_a_directory_is_read_back_and_its_parts_load_alone(
    tmp_path: Path, family: Family, kind: AdapterKind, pool: int
) -> None:
    model = tiny_vlm(family, AdapterConfig(kind, None, pool), eos_ids=(0,))
    model.save_pretrained(tmp_path)
    back = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert back.language.cfg == model.language.cfg and back.limits == model.limits
    assert back.generate(conversation(B), 12) == model.generate(conversation(B), 12)
    CogViT.from_pretrained(tmp_path / "vision")
    CausalLM.from_pretrained(tmp_path / "language")
    ids = torch.arange(10, 30)[None]
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    torch.testing.assert_close(alone(ids).logits, model(ids), atol=1e-6, rtol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "language").chat_template == STRUCTURED


def bad_png() -> str:
    """A data URL of an image whose end is missing."""
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()[:60]).decode()}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(ids_of(m, 30, A), [[]]), "row 0: 4 image tokens stand for images of"),
        (lambda m: m(ids_of(m, 30, A)), "row 0: 4 image tokens stand for images of"),
        (lambda m: m(ids_of(m, 30, A, 31), [[B]]), r"4 image tokens stand for images of \[12\] tokens"),
        (lambda m: m(ids_of(m, IMAGE_ID, 30, IMAGE_ID, IMAGE_ID, IMAGE_ID), [[A]]), r"images of \[4\] tokens"),
        (lambda m: m(torch.tensor([[30]]), [[A]]), "0 image tokens"),
        (lambda m: m(torch.tensor([[30]]), [[], []]), "images of 2 rows; expected"),
        (lambda m: m(torch.tensor([[300]])), "token ids are 300 to 300"),
        (lambda m: m.num_visual_tokens(picture(1, 2000)), "1 x 2000 px is too thin"),
        (lambda m: rgb_image("nowhere.png"), r"the image \(nowhere\.png\) cannot be read: No such file"),
        (lambda m: rgb_image("https://example.org/a.png"), "on another machine; save it first"),
        (lambda m: rgb_image(bad_png()), r"the image \(data:image/png;base64.*\.\.\.\) does not decode"),
        (lambda m: rgb_image("data:image/png;base64,@@@"), "is no image: its base64 is damaged"),
        (lambda m: rgb_image(torch.zeros(3, 8, 8)), r"torch.float32 of \(3, 8, 8\); expected torch.uint8"),
        (lambda m: m.generate([{"role": "user"}], 3), "is no message"),
        (lambda m: m.generate([{"role": "user", "content": [{"type": "audio"}]}], 3), "is no part of a message"),
        (lambda m: m.generate([{"role": "user", "content": "<|image|>"}], 3), r"1 <\|image\|> for 0 images"),
        (lambda m: m.generate(conversation(A), 600), "exceed the model's max_tokens=512"),
    ],
)
def test_bad_calls(call: Any, message: str) -> None:
    with pytest.raises((ValueError, DataError), match=message):
        call(tiny_vlm())


def test_bad_parts() -> None:
    model = tiny_vlm()
    other = make_adapter(AdapterConfig("mlp", 8, 2), 40, 64)
    limits, tokenizer = model.limits, tiny_tokenizer()
    with pytest.raises(ValueError, match="the adapter maps 40 to 64 channels; the encoder has 48"):
        VisionLanguageModel(model.vision, other, model.language, 3, limits)
    with pytest.raises(ValueError, match="image_token_id=288 must be in the vocabulary, 0 to 287"):
        VisionLanguageModel(model.vision, model.adapter, model.language, 288, limits)
    with pytest.raises(ValueError, match="unit_px=16 must be the patch times spatial_pool, 8"):
        VisionLanguageModel(model.vision, model.adapter, model.language, 3, replace(limits, unit_px=16))
    tokenizer.add_tokens([f"word{n}" for n in range(40)])
    with pytest.raises(ValueError, match="the tokenizer has ids to 304; the language model's vocab_size is 288"):
        VisionLanguageModel(model.vision, model.adapter, model.language, 3, limits, tokenizer)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        VisionLanguageModel(model.vision, model.adapter, model.language, 3, limits).generate(conversation(), 3)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        tiny_vlm(template="").generate(conversation(), 3)
    with pytest.raises(ValueError, match="leave room for one group of 8 x 8 px"):
        ImageLimits(8, 10, 30)


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|image|>", "<|picture|>"))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = tiny_vlm()
    with pytest.raises(DataError, match=r"the tokenizer has no <\|image\|>; add it"):
        VisionLanguageModel.joined(model.vision, model.language, tokenizer, AdapterConfig(), 64, 640)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "cogvit"}, "is not of a vision-language model: model_type is 'cogvit'"),
        ("config.json", {"objective": "contrast"}, "is a run; python -m tools.export"),
        ("config.json", {"max_pixels": "many"}, "max_pixels='many' must be a number"),
        ("config.json", {"max_pixels": 3}, "min_pixels=256 and max_pixels=3 must be in this order"),
        ("config.json", {"image_token_id": 999}, "image_token_id=999 must be in the vocabulary"),
        ("adapter/config.json", {"kind": "qformer"}, "adapter/config.json: kind='qformer'"),
        ("adapter/config.json", {"hidden_dim": 9}, "its adapter: .*fc1.weight has shape"),
        ("language/config.json", {"model_type": "gpt2"}, "weights of a GPT2LMHeadModel"),
    ],
)
def test_bad_directories(tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    tiny_vlm().save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        VisionLanguageModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_weights_of_the_adapter(tmp_path: Path) -> None:
    model = tiny_vlm()
    with torch.no_grad():
        model.adapter.fc2.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in fc2\.weight"):
        VisionLanguageModel.from_pretrained(tmp_path)

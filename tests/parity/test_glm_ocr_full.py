"""Our vision-language model in stock transformers: one directory, the same logits and the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GlmOcrForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor

from cogvit import AdapterConfig, VisionLanguageModel
from cogvit.errors import CheckpointError
from tests.language import PLAIN, conversation, picture, tiny_vlm

SIZES_PX = [(16, 16), (24, 40), (61, 35)]  # (height, width): as it is shown, and two that are resized or not


@pytest.fixture
def processor_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stock's processor of a directory; its video half needs torchvision, which is not installed and is left out."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)

    def load(directory: Path) -> Glm46VProcessor:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        images = AutoImageProcessor.from_pretrained(directory)
        return Glm46VProcessor(images, tokenizer, None, chat_template=tokenizer.chat_template)

    return load


def stock(directory: Path) -> PreTrainedModel:
    """The exported directory in transformers, nothing missing and nothing left over."""
    model, found = GlmOcrForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def assert_same(ours: VisionLanguageModel, theirs: PreTrainedModel, processor: Any, *images: Image.Image) -> None:
    messages = conversation(*images)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids, shown = ours.prompt(messages)
    assert torch.equal(ids, inputs["input_ids"][0])
    with torch.no_grad():
        expected, actual = theirs(**inputs).logits, ours(ids[None], [shown])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0.0)
    answer = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(ids) :]
    text = processor.decode(answer, skip_special_tokens=True)
    assert ours.generate(messages, max_new_tokens=16) == text


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_has_our_logits_and_our_text(tmp_path: Path, processor_of: Any, tied: bool) -> None:
    ours = tiny_vlm(tied=tied, eos_ids=(0,))
    ours.save_glm_ocr_full(tmp_path)
    theirs, processor = stock(tmp_path), processor_of(tmp_path)
    for size_px in SIZES_PX:
        assert_same(ours, theirs, processor, picture(*size_px))
    assert_same(ours, theirs, processor, picture(20, 30), picture(30, 20, seed=1))
    assert_same(ours, theirs, processor)


def test_their_checkpoint_is_read(tmp_path: Path, processor_of: Any) -> None:
    tiny_vlm(eos_ids=(0,)).save_glm_ocr_full(tmp_path / "ours")
    theirs, processor = stock(tmp_path / "ours"), processor_of(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    processor.image_processor.image_mean = [0.4, 0.5, 0.6]
    processor.image_processor.save_pretrained(tmp_path / "theirs")
    processor.tokenizer.save_pretrained(tmp_path / "theirs")
    ours = VisionLanguageModel.from_pretrained(tmp_path / "theirs").eval()
    assert_same(ours, theirs, processor, picture(24, 40))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"text_config": None}, "has no text_config"),
        ("config.json", {"image_token_id": "x"}, "has no text_config with an image_token_id"),
        ("preprocessor_config.json", {"resample": 2}, "resample=2 of its images is not supported"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize=False of its images is not supported"),
        ("preprocessor_config.json", {"size": {"longest_edge": 3}}, "must be in this order"),
        ("tokenizer.json", {"model": {"type": "none"}}, "the tokenizer of .* does not load"),
    ],
)
def test_bad_directories(tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    tiny_vlm().save_glm_ocr_full(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        VisionLanguageModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    ours = tiny_vlm(eos_ids=(0, 3), max_tokens=300)
    ours.save_glm_ocr_full(tmp_path)
    back = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert (back.language.cfg, back.vision.cfg, back.limits) == (ours.language.cfg, ours.vision.cfg, ours.limits)
    messages = conversation(picture(30, 50))
    assert back.generate(messages, 12) == ours.generate(messages, 12)
    kept = ours.state_dict()
    changed = [name for name, weight in back.state_dict().items() if not torch.equal(weight, kept[name])]
    assert changed == ["vision.mask_token"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_vlm("llama"), "a language model of family llama"),
        (lambda: tiny_vlm(qkv_bias=True), "family glm4 with qkv_bias=True"),
        (lambda: tiny_vlm(mrope_section=None), "mrope_section=None"),
        (lambda: tiny_vlm(adapter=AdapterConfig("mlp")), "an adapter of kind mlp; expected glm"),
        (lambda: tiny_vlm(adapter=AdapterConfig("glm", 40)), r"merger\.down_proj\.weight has shape \(64, 40\)"),
        (lambda: tiny_vlm(template=PLAIN), r"a chat template that does not place <\|image\|>"),
    ],
)
def test_what_glm_ocr_cannot_hold_is_named(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model().save_glm_ocr_full(tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""The demo's language models: the tiny one learns its captions; what SmolLM2 needs is said where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from cogvit import CausalLM, CogViT, CogViTConfig, VisionLanguageModel
from cogvit.config.arguments import run_command
from cogvit.model.config import AdapterConfig
from tools.demo_corpus.sample import Sample, write_shard
from tools.make_demo_language_model import IMAGE_TOKENS, QUESTIONS, Arguments, encode, make, with_rows

CAPTIONS = [("a red apple", "红色苹果"), ("a blue fish", "蓝色鱼"), ("the digit seven", "数字七")]


def run(*argv: str) -> int:
    return run_command(list(argv), "usage", Arguments, make)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    image = Image.new("RGB", (8, 8))
    samples = [Sample(f"{n:04d}", image, "png", "pictograms", *texts) for n, texts in enumerate(CAPTIONS)]
    write_shard(tmp_path / "corpus/train/pictograms-00000.tar", samples)
    return tmp_path / "corpus"


@pytest.mark.timeout(240)
def test_the_tiny_model_answers_with_a_caption(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "language"
    assert run("tiny", "--corpus", str(corpus), "--out", str(out), "--steps", "20") == 0
    ours, theirs = CausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert ours.cfg.depth == 16 and ours.cfg.family == "glm4"
    assert {*IMAGE_TOKENS} <= {*tokenizer.get_vocab()} and len(tokenizer) <= ours.cfg.vocab_size
    en = QUESTIONS["en"], CAPTIONS[0][0]
    spoken = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), en, strict=True)]
    whole = tokenizer.apply_chat_template(spoken, tokenize=False)
    (ids, asked_tokens), *_ = encode(tokenizer, QUESTIONS["en"], [CAPTIONS[0][0]])
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode(ids[asked_tokens:]) == CAPTIONS[0][0] + "<|endoftext|>"
    answers = {}
    for language, question in QUESTIONS.items():
        asked = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        answer = ours.generate(ids, 12)
        assert torch.equal(theirs.generate(ids, max_new_tokens=12, do_sample=False), answer)
        assert int(answer[0, -1]) in ours.cfg.eos_ids
        answers[language] = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert answers["en"] in [en for en, _ in CAPTIONS] and answers["zh"] in [zh for _, zh in CAPTIONS]
    model = VisionLanguageModel.joined(
        CogViT(CogViTConfig(image_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)),
        ours,
        tokenizer,
        AdapterConfig("conv"),
        64,
        1024,
    )
    assert isinstance(model.generate([{"role": "user", "content": QUESTIONS["en"]}], 12), str)


def test_equal_seeds_give_equal_models(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run("tiny", "--corpus", str(corpus), "--out", str(tmp_path / name), "--steps=2", "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_more_rows_change_no_other_logits() -> None:
    from tests.unit.test_model_language import tiny

    model = tiny(tied=True).float()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(with_rows(model, 64)(ids)[..., :53], model(ids))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tiny"], "--out DIR is needed"),
        (["tiny", "--out", "new"], "--corpus DIR is needed"),
        (["tiny", "--out", "."], "--out . exists; choose a new directory"),
        (["tiny", "--out", "new", "--steps", "few"], "--steps few must be a whole number"),
        (["large", "--out", "new"], "'large' is no language model of the demo; expected tiny or smollm2"),
        (["smollm2", "--out", "new", "--file", "no.gguf"], "--file no.gguf does not exist"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

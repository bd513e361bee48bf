"""Conversations as tokens: the loss is on answers and what ends them, by any template that repeats what was said."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cogvit.errors import DataError
from cogvit.model.chat import read_prompt
from cogvit.model.config import VideoConfig
from cogvit.model.dialog import DialogReader, Turn, tokenizer_fingerprint
from tests.language import PLAIN, STRUCTURED, picture, tiny_tokenizer

TALK = (
    Turn("user", (None, "Hi")),
    Turn("assistant", ("Yes",)),
    Turn("user", ("and",)),
    Turn("assistant", ("No",)),
)
ENDED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501


def learned(template: str, eos_ids: tuple[int, ...] = ()) -> list[str]:
    tokenizer = tiny_tokenizer(template)
    dialog = DialogReader(tokenizer, eos_ids).read(TALK)
    return [tokenizer.decode([token]) if one else "." for token, one in zip(dialog.ids, dialog.answer, strict=True)]


def test_answers_and_their_ends_are_learned() -> None:
    user = 1  # which ends an answer of GLM-4
    for template in (STRUCTURED, PLAIN):
        assert "".join(learned(template, (user,))) == "." * 7 + "Yes<|user|>" + "." * 4 + "No<|endoftext|>"
        assert "".join(learned(template)) == "." * 7 + "Yes" + "." * 5 + "No<|endoftext|>"
    assert "".join(learned(ENDED)) == "." * 7 + "Yes<|endoftext|>" + "." * 6 + "No<|endoftext|>" + "."


def test_the_prompt_is_that_of_generation() -> None:
    tokenizer = tiny_tokenizer()
    dialog = DialogReader(tokenizer, ()).read(TALK[:2])
    parts = [{"type": "image", "image": picture(9, 9)}, {"type": "text", "text": "Hi"}]
    prompt = read_prompt(tokenizer, [{"role": "user", "content": parts}], VideoConfig()).ids
    assert dialog.ids.tolist()[: len(prompt)] == prompt and dialog.answer[len(prompt) :].all()


def test_the_vocabulary_is_not_copied_for_each_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fifty thousand tokens that takes 20 ms, and a corpus has millions of conversations."""
    tokenizer, copies = tiny_tokenizer(PLAIN), []
    reader, own = DialogReader(tokenizer, ()), tokenizer.get_vocab
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: copies.append(1) or own())
    assert len(reader.read(TALK).ids) and not copies


def test_a_template_may_refuse_a_conversation() -> None:
    """As many do a system message: jinja2 has errors of its own, and a template may have a mistake."""
    for template, reason in (("{{ raise_exception('no system message') }}", "no system"), ("{{ 1 + 'a' }}", "unsup")):
        tokenizer = tiny_tokenizer(template)
        message = {"role": "system", "content": "Be brief."}
        with pytest.raises(DataError, match=f"the chat template refuses the conversation: {reason}"):
            read_prompt(tokenizer, [message], VideoConfig())
        with pytest.raises(DataError, match=f"the chat template refuses the conversation: {reason}"):
            DialogReader(tokenizer, ()).read(TALK)


def test_a_template_that_forgets_is_refused() -> None:
    with pytest.raises(DataError, match="writes earlier turns of a conversation otherwise"):
        DialogReader(tiny_tokenizer(FORGETFUL), ()).read(TALK)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        DialogReader.of(tmp_path, 288, ())
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "good")
    assert DialogReader.of(tmp_path / "good", 288, ()).image_id == 3
    with pytest.raises(DataError, match="ids to 264, and its vocab_size is 100; give"):
        DialogReader.of(tmp_path / "good", 100, ())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "mute")
    with pytest.raises(DataError, match="mute: the tokenizer has no chat template"):
        DialogReader.of(tmp_path / "mute", 288, ())
    blind = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), eos_token="b")
    blind.chat_template = PLAIN
    blind.save_pretrained(tmp_path / "blind")
    with pytest.raises(DataError, match=r"blind: the tokenizer has no <\|image\|>; add it"):
        DialogReader.of(tmp_path / "blind", 288, ())
    assert tokenizer_fingerprint(tmp_path / "good") != tokenizer_fingerprint(tmp_path / "mute")

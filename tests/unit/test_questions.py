"""How models of the CogVLM family are asked: words as released, history, the command, and writing them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cogvit import VisionLanguageModel
from cogvit.config.arguments import run_command
from cogvit.errors import DataError
from cogvit.generate import Arguments, generate
from cogvit.model.layouts.released import LAYOUTS, Layout
from cogvit.model.questions import Questions, Template
from tests.cog import cog_directory, cog_picture
from tests.language import IMAGE_ID, tiny_tokenizer
from tools.export import Arguments as ExportArguments
from tools.export import export

HISTORY = [("Who?", "A cat."), ("Where?", "Here.")]
TOKENS = {"vocab_size": 300, "pad_token_id": IMAGE_ID}
GLM_TOKENS = {"padded_vocab_size": 300, "boi_token_id": IMAGE_ID}


def cog_export(layout: Layout, directory: Path) -> Path:
    """A released directory with a tokenizer of bytes."""
    options = GLM_TOKENS if layout == "glm4v_9b" else TOKENS
    tiny_tokenizer().save_pretrained(cog_directory(layout, directory, **options))
    return directory


def run(*argv: str) -> int:
    return run_command(list(argv), "usage", Arguments, generate)


@pytest.mark.parametrize(
    ("template", "instruct", "expected"),
    [
        ("base", False, "Why?"),
        ("chat", False, "Question: Who? Answer: A cat.\nQuestion: Where? Answer: Here.\nQuestion: Why? Answer:"),
        (
            "vqa",
            False,
            "Question: Who? Short answer: A cat.\nQuestion: Where? Short answer: Here.\nQuestion: Why? Short answer:",
        ),
        ("base", True, "Why?"),
        ("chat", True, " [INST] Who? [/INST] A cat. [INST] Where? [/INST] Here. [INST] Why? [/INST] "),
        ("vqa", True, "<EOI>Question: Why? Short answer:"),
        (
            "chat_old",
            True,
            "<EOI>Question: Who? Answer: A cat.\nQuestion: Where? Answer: Here.\nQuestion: Why? Answer:",
        ),
    ],
)
def test_words_are_those_of_the_released_code(template: Template, instruct: bool, expected: str) -> None:
    assert Questions(template, instruct=instruct).text(HISTORY, "Why?") == expected


def test_a_prompt_is_images_and_then_the_conversation(tmp_path: Path) -> None:
    model = VisionLanguageModel.from_pretrained(cog_export("cogvlm2", tmp_path))
    image = cog_picture(30, 40)
    shown = {"type": "image", "image": image}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Who?"}, shown]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
    ]
    ids, images = model.prompt(messages)
    count = model.num_visual_tokens(image)
    assert ids[:count].tolist() == [IMAGE_ID] * count == [IMAGE_ID] * 6 and len(images) == 1
    assert model.tokenizer.decode(ids[count:]) == "Question: Who? Answer: A cat.\nQuestion: Why? Answer:"
    assert len(model.generate(messages, 5)) > 0
    for wrong, message in (
        (messages[:2], "ends with a question of the user"),
        ([{"role": "system", "content": "Be brief."}, *messages], "message 0 is of 'system'"),
        ([{"role": "user", "content": "<|image|>"}], f"a text spells token {IMAGE_ID}"),
        ([], "ends with a question of the user"),
    ):
        with pytest.raises(DataError, match=message):
            model.prompt(wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_answers_and_the_export_writes_it_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Layout
) -> None:
    source, picture = cog_export(layout, tmp_path / "source"), cog_picture(30, 40)
    picture.save(tmp_path / "a.png")
    (source / "modeling.py").write_text("# code that lies beside the weights")
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]
    (tmp_path / "history.json").write_text(json.dumps(said))
    flags = ["--image", str(tmp_path / "a.png"), "--history", str(tmp_path / "history.json"), "--max-new-tokens", "8"]
    assert run(str(source), "--prompt", "Why?", *flags) == 0
    answer = capsys.readouterr().out
    parts = [{"type": "image", "image": Image.open(tmp_path / "a.png")}, {"type": "text", "text": "Why?"}]
    model = VisionLanguageModel.from_pretrained(source)
    assert answer == model.generate([*said, {"role": "user", "content": parts}], 8) + "\n"
    assert run(str(source), "--prompt", "Why?", *flags, "--template", "base", "--dtype", "bf16") == 0
    capsys.readouterr()
    out = tmp_path / "out"
    assert run_command([str(source), "--out", str(out), "--layout", layout], "usage", ExportArguments, export) == 0
    assert f"VisionLanguageModel.from_pretrained('{out}')" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} >= {"modeling.py", "tokenizer.json", "config.json"}
    assert run(str(out), "--prompt", "Why?", *flags) == 0
    assert capsys.readouterr().out == answer


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cog_export("cogvlm", tmp_path / "source")
    (tmp_path / "history.json").write_text("{}")
    other = str(tmp_path / "out")
    for argv, message in (
        (["--prompt", "a", "--template", "poem"], "--template poem is unknown; expected one of base, chat"),
        (["--prompt", "a", "--template", "chat_old"], "--template='chat_old' must be one of base, chat, vqa"),
        (["--prompt", "a", "--history", "none.json"], "--history none.json cannot be read"),
        (["--prompt", "a", "--history", str(tmp_path / "history.json")], "must be a list of"),
        (["--prompt", "a", "--dtype", "int8"], "dtype='int8' is unknown"),
    ):
        assert run(str(source), *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    wrong = [str(source), "--out", other, "--layout", "cogvlm2"]
    assert run_command(wrong, "usage", ExportArguments, export) == 2
    error = capsys.readouterr().err
    assert "layout cogvlm2 cannot hold this model, whose layout is cogvlm" in error and error.count("\n") == 1
    assert not Path(other).exists()

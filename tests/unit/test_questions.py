"""How models of the CogVLM family are asked: words as released, history, the command, and writing them back."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from cogvit import VisionLanguageModel
from cogvit.config.arguments import run_command
from cogvit.errors import CheckpointError, DataError
from cogvit.generate import Arguments, generate
from cogvit.model.layouts.released import LAYOUTS, Layout
from cogvit.model.pretrained import load_tokenizer
from cogvit.model.questions import Questions, Template, Words
from tests.cog import cog_directory, cog_picture
from tests.language import IMAGE_ID, tiny_tokenizer
from tools.export import Arguments as ExportArguments
from tools.export import export

HISTORY = [("Who?", "A cat."), ("Where?", "Here.")]
TOKENS = {"vocab_size": 300, "pad_token_id": IMAGE_ID}
RANKS = [*(bytes([byte]) for byte in range(256)), b"an", b"na", b"ban", b"ana", b" an", b"\n\n", "\u00e9".encode()]
_ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant", "observation", "begin_of_image", "end_of_image")]
_NAMES = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_ROLES]  # in the order as released
CONTROL = {name: len(RANKS) + place for place, name in enumerate(_NAMES)}
GLM_TOKENS = {"padded_vocab_size": 300, "boi_token_id": CONTROL["<|begin_of_image|>"]}


def cog_export(layout: Layout, directory: Path) -> Path:
    """A released directory with a tokenizer of bytes."""
    if layout == "glm4v_9b":
        return glm_export(directory)
    tiny_tokenizer().save_pretrained(cog_directory(layout, directory, **TOKENS))
    return directory


def glm_export(directory: Path) -> Path:
    """A released directory of GLM-4V with its own kind of tokenizer, whose code must not run."""
    cog_directory("glm4v_9b", directory, **GLM_TOKENS)
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(RANKS)]
    (directory / "tokenizer.model").write_text("".join(lines))
    (directory / "tokenization_chatglm.py").write_text("raise SystemExit(7)\n")
    said = {
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
        "tokenizer_class": "ChatGLM4Tokenizer",
        "added_tokens_decoder": {str(number): {"content": name, "special": True} for name, number in CONTROL.items()},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(said))
    return directory


def run(*argv: str) -> int:
    return run_command(list(argv), "usage", Arguments, generate)


@pytest.mark.parametrize(
    ("template", "words", "expected"),
    [
        ("base", "cogvlm", "Why?"),
        ("chat", "cogvlm", "Question: Who? Answer: A cat.\nQuestion: Where? Answer: Here.\nQuestion: Why? Answer:"),
        (
            "vqa",
            "cogvlm",
            "Question: Who? Short answer: A cat.\nQuestion: Where? Short answer: Here.\nQuestion: Why? Short answer:",
        ),
        ("base", "cogagent", "Why?"),
        ("base", "glm4v", "Why?"),
        ("chat", "cogagent", " [INST] Who? [/INST] A cat. [INST] Where? [/INST] Here. [INST] Why? [/INST] "),
        ("vqa", "cogagent", "<EOI>Question: Why? Short answer:"),
        (
            "chat_old",
            "cogagent",
            "<EOI>Question: Who? Answer: A cat.\nQuestion: Where? Answer: Here.\nQuestion: Why? Answer:",
        ),
    ],
)
def test_words_are_those_of_the_released_code(template: Template, words: Words, expected: str) -> None:
    assert Questions(template, words).text(HISTORY, "Why?") == expected


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


def least_rank_first(word: bytes) -> list[int]:
    """The ids of a word as its ranks say: the first of the pairs whose token has the least rank is merged."""
    pieces = [bytes([byte]) for byte in word]
    while word not in RANKS:
        known = [(RANKS.index(a + b), place) for place, (a, b) in enumerate(pairwise(pieces)) if a + b in RANKS]
        if not known:
            return [RANKS.index(piece) for piece in pieces]
        _, place = min(known)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return [RANKS.index(word)]


def test_the_tokenizer_of_glm_4v_is_read_without_its_code(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(glm_export(tmp_path))
    assert tokenizer.eos_token_id == CONTROL["<|endoftext|>"]
    for words in (["banana"], ["nab"], [" an", "\n\n", "anana"], ["caf\u00e9", " \U0001f600"], ["1234"[:3], "4"]):
        ids = [token for word in words for token in least_rank_first(word.encode())]
        text = "".join(words)
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    assert tokenizer("<sop>a")["input_ids"] == [CONTROL["<sop>"], ord("a")]
    for change, message in (
        (("tokenizer.model", "IQ== 0\nIQ== 0\n"), "must have a token for each byte"),
        (("tokenizer.model", "not base64\n"), "is no list of tokens in base64"),
        (("tokenizer_config.json", '{"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": []}'), "added_to"),
        (
            (
                "tokenizer_config.json",
                '{"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": {"9": {"content": "<a>"}}}',
            ),
            f"<a> is token 9, and would be {len(RANKS)} there",
        ),
    ):
        file, damaged = change
        kept = (tmp_path / file).read_text()
        (tmp_path / file).write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)
        (tmp_path / file).write_text(kept)


def test_glm_4v_is_asked_in_turns_behind_control_tokens(tmp_path: Path) -> None:
    model, image = VisionLanguageModel.from_pretrained(glm_export(tmp_path)), cog_picture(30, 40)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image", "image": image}]},
        {"role": "assistant", "content": "\nA <sop>."},
        {"role": "user", "content": "Why?"},
    ]
    ids, images = model.prompt(messages)
    run = "<|begin_of_image|>" * model.num_visual_tokens(image)
    said = f"[gMASK]<sop><|system|>\ns<|user|>\n{run}Who?<|assistant|>\nA <sop>.<|user|>\nWhy?<|assistant|>"
    assert model.tokenizer.decode(ids) == said and len(images) == 1
    assert ids.tolist().count(CONTROL["<sop>"]) == 1  # the other is text
    with pytest.raises(DataError, match=r"message 1 is of 'system'.* a system message stands before them"):
        model.prompt([messages[0], *messages])
    model.tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match=r"has no \[gMASK\], by which this model tells turns; template base asks"):
        model.prompt(messages)


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
    files = [path.name for path in source.iterdir()]
    assert sorted(files) == sorted(path.name for path in out.iterdir())
    for name in files:  # whatever code and tokenizer were released with it work as before
        same = (out / name).read_bytes() == (source / name).read_bytes()
        assert same or json.loads((out / name).read_text()) == json.loads((source / name).read_text()), name
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

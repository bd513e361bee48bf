"""Captions: every accepted form, the choice among them, and token ids that equal transformers'."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, GemmaTokenizer, PreTrainedTokenizerFast, Siglip2Tokenizer

from cogvit.errors import DataError
from cogvit.model.tokenizer import ByteTokenizer, load_tokenizer
from data_pipeline.caption import captions_of, choose_captions, not_understood, parse_metadata, source_of, token_bound

BYT5 = ByT5Tokenizer()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"captions": {"en": ["a ", "", "b"], "zh": ["红"]}}, {"en": ("a", "b"), "zh": ("红",)}),
        ({"captions": {"en": "alone"}}, {"en": ("alone",), "zh": ()}),
        ({"caption": "img2dataset"}, {"en": ("img2dataset",), "zh": ()}),
        ({"caption": None}, {"en": (), "zh": ()}),
        ({"captions": {"en": [3, None, "\ud83d", "  "]}}, {"en": (), "zh": ()}),
        ({}, {"en": (), "zh": ()}),
    ],
)
def test_captions_are_read_from_every_accepted_form(metadata, expected):
    assert captions_of(parse_metadata(json.dumps(metadata).encode(), "json")) == expected


def test_txt_counts_as_english():
    assert captions_of(parse_metadata(" a 红 house\n".encode(), "txt")) == {"en": ("a 红 house",), "zh": ()}


@pytest.mark.parametrize(
    ("data", "extension"), [(b"\xff\xfe", "txt"), (b"{", "json"), (b"[1]", "json"), (b"\xff", "json")]
)
def test_bad_bytes_are_a_data_error(data, extension):
    with pytest.raises(DataError):
        parse_metadata(data, extension)


def test_language_follows_the_fraction_and_what_there_is():
    key = np.random.default_rng(0).integers(-(2**63), 2**63, 4000)
    both = choose_captions(np.tile([3, 2], (4000, 1)), key, 0.25)
    assert abs((both.language == 1).mean() - 0.25) < 0.03
    for language, count in ((0, 3), (1, 2)):
        numbers = np.bincount(both.number[both.language == language], minlength=count)
        assert len(numbers) == count
        assert numbers.min() > 0.8 * numbers.mean()
    assert not choose_captions(np.tile([1, 0], (4000, 1)), key, 1.0).language.any()
    assert choose_captions(np.tile([0, 1], (4000, 1)), key, 0.0).language.all()


@given(
    text=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=60),
    limit=st.integers(1, 70),
)
def test_bytes_equal_transformers(text, limit):
    encoded = ByteTokenizer().encode(text, limit)
    expected = BYT5(text, truncation=True, max_length=limit)["input_ids"]
    assert encoded.ids.tolist() == expected
    assert encoded.cut == (len(text.encode()) + 1 > limit)
    assert len(encoded.ids) == token_bound(np.array([len(text.encode())]), limit, "byt5")[0]


def test_a_caption_cannot_end_itself():
    assert 1 not in ByteTokenizer().encode("a</s>b", 64).ids[:-1]


@pytest.fixture
def word_tokenizer(tmp_path):
    """A transformers tokenizer on disk: words, an end-of-sequence token."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2, "house": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    return str(tmp_path)


def test_pretrained_tokenizer_keeps_its_end_when_it_cuts(word_tokenizer):
    tokenizer = load_tokenizer(word_tokenizer, vocab_size=10)
    whole, cut = tokenizer.encode("red house red", 8), tokenizer.encode("red house red", 3)
    assert (whole.ids.tolist(), whole.cut) == ([2, 3, 2, 1], False)
    assert (cut.ids.tolist(), cut.cut) == ([2, 3, 1], True)


def test_a_caption_of_any_length_is_cut_and_costs_what_its_beginning_does(word_tokenizer):
    tokenizer = load_tokenizer(word_tokenizer, vocab_size=10)
    endless = tokenizer.encode("red house " * 10_000, 4)
    assert (endless.ids.tolist(), endless.cut) == ([2, 3, 2, 1], True)
    assert tokenizer.encode("red" + " " * 100_000 + "house", 4).cut


def test_a_caption_that_no_token_spells_has_one_of_padding(tmp_path):
    letters = Tokenizer(models.BPE({"<pad>": 0, "r": 1, "e": 2, "d": 3}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), vocab_size=4)
    assert [tokenizer.encode(text, 8).ids.tolist() for text in ("red", "\u56fe")] == [[1, 2, 3], [0]]


def test_the_plan_reserves_what_short_captions_take(tmp_path):
    """Begin, end and the mark before a word are tokens beside those of the caption's bytes."""
    pieces = {"<s>": 0, "</s>": 1, "<unk>": 2, "\u2581": 3, "a": 4}
    words = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    bound = token_bound(np.array([1]), 16, str(tmp_path))[0]
    encoded = load_tokenizer(str(tmp_path), vocab_size=10).encode("a", int(bound))
    assert (encoded.ids.tolist(), encoded.cut) == ([0, 3, 4, 1], False)


def test_siglip2s_tokenizer_lowers_case_and_says_what_pads(tmp_path):
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "r": 5, "e": 6, "d": 7}
    Siglip2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), vocab_size=8)
    assert tokenizer.encode("Red", 8).ids.tolist() == tokenizer.encode("red", 8).ids.tolist() == [5, 6, 7]
    assert tokenizer.pad_id == 0 and load_tokenizer("byt5", 384).pad_id == 0


def test_tokenizers_that_do_not_fit_are_refused(word_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"has 4 ids and text.vocab_size is 3"):
        load_tokenizer(word_tokenizer, vocab_size=3)
    with pytest.raises(DataError, match="does not load"):
        load_tokenizer(str(tmp_path / "nowhere"), vocab_size=10)


@pytest.mark.parametrize(
    ("metadata", "en", "zh"),
    [
        ({"caption": "x", "captions": {"zh": ["红"]}}, ("x",), ("红",)),
        ({"caption": "ok", "captions": {}}, ("ok",), ()),
        ({"captions": ["a", "b", "a"]}, ("a", "b"), ()),
        ({"captions": "a text"}, ("a text",), ()),
        (
            {"captions": [{"raw": "a dog", "tokens": ["a", "dog"]}, {"caption": "a cat", "id": 3}]},
            ("a dog", "a cat"),
            (),
        ),
        ({"captions": {"raw": "one"}}, ("one",), ()),
        ({"captions": {"en": [{"raw": "a"}], "zh": "红"}}, ("a",), ("红",)),
    ],
)
def test_captions_of_the_big_tools_are_read(metadata, en, zh):
    assert captions_of(metadata) == {"en": en, "zh": zh}
    assert not not_understood(metadata)


def test_a_field_by_name():
    metadata = {"caption": "no", "TEXT": ["yes"], "site": "a.example"}
    assert captions_of(metadata, "TEXT") == {"en": ("yes",), "zh": ()}
    assert source_of(metadata, "site") == "a.example"


@pytest.mark.parametrize("value", [3, [[1]], {"de": "Hund"}, [{"text": "a"}], True])
def test_what_is_not_understood_is_said_so(value):
    assert not_understood({"captions": value}) and not any(captions_of({"captions": value}).values())


@pytest.mark.parametrize("value", [None, "", [], {}, {"en": []}, [" ", None]])
def test_what_is_empty_is_not_a_form(value):
    assert not not_understood({"captions": value})


def test_a_byte_order_mark_is_no_text():
    mark = b"\xef\xbb\xbf"
    assert captions_of(parse_metadata(mark + b"a cat", "txt"))["en"] == ("a cat",)
    assert parse_metadata(mark + b"7\n", "cls") == {"label": 7}
    assert captions_of(parse_metadata(mark + b'{"caption": "a cat"}', "json"))["en"] == ("a cat",)


def test_text_that_spells_a_control_token_stays_text(word_tokenizer):
    tokenizer = load_tokenizer(word_tokenizer, vocab_size=10)
    assert tokenizer.encode("red </s> house", 8).ids.tolist().count(1) == 1
    assert tokenizer.encode("red </s> house", 8).ids[-1] == 1
    assert tokenizer.encode("red </s> house", 3).ids.tolist().count(1) == 1


@pytest.mark.parametrize(("tower", "equal"), [("siglip", True), ("siglip2", True), ("gemma", False)])
def test_captions_of_siglip2_are_lower_case_whatever_its_type_is_called(tmp_path, tower, equal):
    letters = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "r": 4, "R": 5}, []))
    GemmaTokenizer(
        tokenizer_object=letters, vocab={"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "r": 4, "R": 5}, merges=[]
    ).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": tower}))
    tokenizer = load_tokenizer(str(tmp_path), vocab_size=300)
    same = tokenizer.encode("R", 8).ids.tolist() == tokenizer.encode("r", 8).ids.tolist()
    assert same == equal

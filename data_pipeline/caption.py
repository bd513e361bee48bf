"""Captions: what a sample says in each language, which of it one epoch uses, and its token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.draws import mix, name_to_int64, uniform
from cogvit.errors import DataError

LANGUAGES = ("en", "zh")
NO_LABEL = -1
_LANGUAGE_SALT = 0x6C616E67  # "lang"
_NUMBER_SALT = 0x63617074  # "capt"
_CAPTION_FIELDS = ("captions", "caption")  # ours and img2dataset's
_TEXT_KEYS = ("raw", "caption")  # of COCO's entries
_CACHED_CAPTIONS = 1 << 16
_LONGEST_TOKEN = 128  # characters
_MOST_ADDED = 4  # tokens that a tokenizer puts around and before a caption's own

Captions = dict[str, tuple[str, ...]]  # language -> captions, none of them empty


@dataclass(frozen=True, slots=True)
class CaptionChoice:
    """Which caption each of B samples uses: number `number` of those in LANGUAGES[language]."""

    language: NDArray[np.int64]  # [B]
    number: NDArray[np.int64]  # [B]


@dataclass(frozen=True, slots=True)
class CaptionTokens:
    """The token ids of a caption, the end-of-sequence token last, and whether text was lost."""

    ids: NDArray[np.int64]
    cut: bool


def caption_id(tokens: CaptionTokens) -> int:
    """Return a hash of what the text tower sees of a caption: where it sees no difference there is no negative."""
    return name_to_int64(tokens.ids.tobytes().hex())


class Tokenizer(Protocol):
    """Text to token ids."""

    @property
    def num_ids(self) -> int:
        """Rows that the text tower's embedding table needs."""
        ...

    @property
    def pad_id(self) -> int:
        """What fills the rows of shorter captions where a text encoder wants rows of one length."""
        ...

    def encode(self, text: str, max_tokens: int) -> CaptionTokens:
        """Return at most max_tokens ids; a longer caption loses its end, not the end-of-sequence token."""
        ...


def parse_metadata(data: bytes, extension: str) -> dict[str, Any]:
    """Read a sample's `json` member; a `txt` member counts as {"caption": ...}, a `cls` member as {"label": ...}.

    Errors: DataError when the bytes are not UTF-8, not a JSON object or not a whole number; a reason to count by.
    """
    if extension == "cls":
        try:
            return {"label": int(data.decode("utf-8-sig"))}
        except ValueError:
            raise DataError("a cls is no whole number") from None
    if extension != "json":
        try:
            return {"caption": data.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise DataError(f"a caption is not UTF-8: {error.reason}") from None
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("a sample's json does not parse") from None
    if not isinstance(metadata, dict):
        raise DataError(f"a sample's json holds a {type(metadata).__name__}, not an object")
    return metadata


def captions_of(metadata: dict[str, Any], field: str = "") -> Captions:
    """Return the captions in every language of LANGUAGES, stripped, none empty, none twice.

    They lie in the field, or in `captions` and `caption` where none is named: a text, a list of texts, COCO's list of
    {"raw": TEXT} or {"caption": TEXT}, all of which count as English, or any of these by language, {"en": ...,
    "zh": ...}. Anything else is not read (`not_understood`).
    """
    captions: dict[str, dict[str, None]] = {language: {} for language in LANGUAGES}
    for value in _caption_values(metadata, field):
        by_language = value if isinstance(value, dict) and value.keys().isdisjoint(_TEXT_KEYS) else {"en": value}
        for language in LANGUAGES:
            captions[language].update(dict.fromkeys(_texts(by_language.get(language))))
    return {language: tuple(texts) for language, texts in captions.items()}


def not_understood(metadata: dict[str, Any], field: str = "") -> bool:
    """Whether a sample says something where captions lie, and none of it is a caption in a language we have."""
    return not any(captions_of(metadata, field).values()) and any(map(_says_more, _caption_values(metadata, field)))


def source_of(metadata: dict[str, Any], field: str = "source") -> str | None:
    """Return what a sample's json calls its source; None where that is no text that can be written down."""
    source = metadata.get(field)
    return source if isinstance(source, str) and source and _is_encodable(source) else None


def _caption_values(metadata: dict[str, Any], field: str) -> list[Any]:
    return [metadata[name] for name in ((field,) if field else _CAPTION_FIELDS) if name in metadata]


def _texts(value: Any) -> list[str]:
    """Return the captions of one language, whatever a json holds there."""
    found = []
    for one in value if isinstance(value, list) else [value]:
        text = next((one[key] for key in _TEXT_KEYS if key in one), None) if isinstance(one, dict) else one
        if isinstance(text, str) and text.strip() and _is_encodable(text):
            found.append(text.strip())
    return found


def _says_more(value: Any) -> bool:
    """Whether a value is more than an empty place."""
    if isinstance(value, dict):
        return any(map(_says_more, value.values()))
    if isinstance(value, list):
        return any(map(_says_more, value))
    return value is not None and not (isinstance(value, str) and not value.strip())


def label_of(metadata: dict[str, Any]) -> int:
    """Return a sample's class, a whole number from 0 as `label`; NO_LABEL where there is none."""
    label = metadata.get("label")
    return label if type(label) is int and 0 <= label < 2**31 else NO_LABEL


def _is_encodable(text: str) -> bool:
    """Whether UTF-8 can spell it: JSON can hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def choose_captions(num_captions: NDArray[np.int64], key: NDArray[np.int64], zh_fraction: float) -> CaptionChoice:
    """Choose one caption for each sample from its key. num_captions is [B, len(LANGUAGES)].

    A sample with both languages is Chinese in zh_fraction of its epochs; captions of one language are equally likely.
    """
    key_B = torch.from_numpy(key)
    wants_zh = uniform(key_B, _LANGUAGE_SALT).numpy() < zh_fraction
    has_en, has_zh = (num_captions > 0).T
    language = np.where(has_en & has_zh, wants_zh, has_zh).astype(np.int64)
    count = np.take_along_axis(num_captions, language[:, None], axis=1)[:, 0]
    number = mix(key_B, _NUMBER_SALT).numpy() % np.maximum(count, 1)
    return CaptionChoice(language, number)


def token_bound(size_bytes: NDArray[np.int64], max_tokens: int, tokenizer: str) -> NDArray[np.int64]:
    """Return how many tokens captions of so many UTF-8 bytes may take: one a byte and what the tokenizer adds.

    The plan reserves this much, and no caption gets more (`encode` is held to it): exact for byt5, which adds the end.
    Others may mark the beginning of a sequence too, and that of a word.
    """
    return np.minimum(size_bytes + (1 if tokenizer == "byt5" else _MOST_ADDED), max_tokens)


def load_tokenizer(name: str, vocab_size: int) -> Tokenizer:
    """Return `byt5`, or a transformers tokenizer by hub name or directory.

    Errors: DataError when it cannot be loaded or its ids do not fit the text tower's table of vocab_size rows.
    """
    tokenizer: Tokenizer = ByteTokenizer() if name == "byt5" else _load_pretrained(name)
    if tokenizer.num_ids > vocab_size:
        raise DataError(
            f"tokenizer {name} has {tokenizer.num_ids} ids and text.vocab_size is {vocab_size}; raise it to that number"
        )
    return tokenizer


class ByteTokenizer:
    """The ids of transformers' ByT5Tokenizer, computed directly: byte + 3, then 1.

    40 times as fast. Text that spells ByT5's control tokens (`</s>`) stays text here: no caption can end itself.
    """

    num_ids = 259
    pad_id = 0

    def encode(self, text: str, max_tokens: int) -> CaptionTokens:
        """See Tokenizer."""
        data = np.frombuffer(text.encode(), np.uint8)
        ids = np.append(data[: max_tokens - 1].astype(np.int64) + 3, 1)
        return CaptionTokens(ids, cut=len(data) >= max_tokens)


class PretrainedTokenizer:
    """A transformers tokenizer; captions repeat over epochs, so their ids are kept.

    Text that spells a control token (`<eos>`) stays text, as in `ByteTokenizer`. lower: captions become lower case, as
    SigLIP2's text towers were trained.
    """

    def __init__(self, tokenizer: Any, *, lower: bool = False) -> None:
        self.num_ids = len(tokenizer)
        self.pad_id: int = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._tokenizer, self._lower = tokenizer, lower
        self._lock = Lock()  # transformers switches truncation on and off inside the tokenizer
        self._encode = lru_cache(_CACHED_CAPTIONS)(self._encode_anew)

    def encode(self, text: str, max_tokens: int) -> CaptionTokens:
        """See Tokenizer. What no token of a caption can reach is not looked at, nor kept."""
        reached = text[: max_tokens * _LONGEST_TOKEN]
        tokens = self._encode(reached, max_tokens)
        return tokens if len(reached) == len(text) else CaptionTokens(tokens.ids, cut=True)

    def _encode_anew(self, text: str, max_tokens: int) -> CaptionTokens:
        text = text.lower() if self._lower else text
        with self._lock:
            # No caption is without a token.
            ids = self._tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"] or [self.pad_id]
            cut = len(ids) > max_tokens
            if cut:
                shorter = self._tokenizer(text, split_special_tokens=True, truncation=True, max_length=max_tokens)
                ids = shorter["input_ids"]
        return CaptionTokens(np.array(ids, np.int64), cut)


def _load_pretrained(name: str) -> PretrainedTokenizer:
    from transformers import AutoTokenizer, PreTrainedConfig  # here: it takes seconds and `byt5` needs none of it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        try:
            tower = PreTrainedConfig.get_config_dict(name)[0].get("model_type", "")
        except OSError:  # a tokenizer alone
            tower = ""
        # SigLIP2 of a fixed size is called siglip, whose own tokenizer lowers by itself; Gemma's is SigLIP2's.
        lower = tower.startswith("siglip") and type(tokenizer).__name__.startswith("Gemma")
        return PretrainedTokenizer(tokenizer, lower=lower)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"--data.tokenizer {name} does not load: {reason}; pass byt5, a directory or a name") from None

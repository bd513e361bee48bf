"""Captions: what a sample says in each language and which of it one epoch uses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.draws import mix, name_to_int64, uniform
from cogvit.errors import DataError
from cogvit.model.tokenizer import CaptionTokens

LANGUAGES = ("en", "zh")
NO_LABEL = -1
_LANGUAGE_SALT = 0x6C616E67  # "lang"
_NUMBER_SALT = 0x63617074  # "capt"
_CAPTION_FIELDS = ("captions", "caption")  # ours and img2dataset's
_TEXT_KEYS = ("raw", "caption")  # of COCO's entries
_MOST_ADDED = 4  # tokens that a tokenizer puts around and before a caption's own

Captions = dict[str, tuple[str, ...]]  # language -> captions, none of them empty


@dataclass(frozen=True, slots=True)
class CaptionChoice:
    """Which caption each of B samples uses: number `number` of those in LANGUAGES[language]."""

    language: NDArray[np.int64]  # [B]
    number: NDArray[np.int64]  # [B]


def caption_id(tokens: CaptionTokens) -> int:
    """Return a hash of what the text tower sees of a caption: where it sees no difference there is no negative."""
    return name_to_int64(tokens.ids.tobytes().hex())


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
    return source if isinstance(source, str) and source and is_encodable(source) else None


def _caption_values(metadata: dict[str, Any], field: str) -> list[Any]:
    return [metadata[name] for name in ((field,) if field else _CAPTION_FIELDS) if name in metadata]


def _texts(value: Any) -> list[str]:
    """Return the captions of one language, whatever a json holds there."""
    found = []
    for one in value if isinstance(value, list) else [value]:
        text = next((one[key] for key in _TEXT_KEYS if key in one), None) if isinstance(one, dict) else one
        if isinstance(text, str) and text.strip() and is_encodable(text):
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


def is_encodable(text: str) -> bool:
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

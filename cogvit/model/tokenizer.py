"""Captions as token ids: the bytes themselves, or a tokenizer of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cogvit.errors import DataError

if TYPE_CHECKING:  # as in images.py
    from numpy.typing import NDArray

_CACHED_CAPTIONS = 1 << 16
_LONGEST_TOKEN = 128  # characters


@dataclass(frozen=True, slots=True)
class CaptionTokens:
    """The token ids of a caption, the end-of-sequence token last, and whether text was lost."""

    ids: NDArray[np.int64]
    cut: bool


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

    def decode(self, ids: NDArray[np.int64]) -> str:
        """Return what a caption's ids say, for people to read."""
        ...


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

    def decode(self, ids: NDArray[np.int64]) -> str:
        """See Tokenizer."""
        return bytes(int(number) - 3 for number in ids if number >= 3).decode(errors="replace")


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

    def decode(self, ids: NDArray[np.int64]) -> str:
        """See Tokenizer."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

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

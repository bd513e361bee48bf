"""The text side of an export: which text tower it is, how captions become its tokens, and the tower itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogvit.config import TextEncoderConfig
from cogvit.errors import DataError
from cogvit.model.config import TextConfig
from cogvit.model.pretrained import PretrainedTextTower, new_text_encoder
from cogvit.model.text import TextTower
from cogvit.model.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TextSide:
    """How captions become the tokens of a text tower, and which tower that is."""

    tokenizer: str
    text: TextConfig
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    @cached_property
    def loaded(self) -> Tokenizer:
        """The tokenizer. Errors: DataError when it cannot be loaded."""
        return load_tokenizer(self.tokenizer, self.text.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Return it as the config.json of an export's text side."""
        return asdict(self)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and their mask, [B, L] both; longer texts lose their end.

        Errors: DataError when there is no text, or one is no string.
        """
        if isinstance(texts, str):
            raise DataError(f"expected a list of texts, not the one text {texts[:40]!r}; put it into a list")
        if not len(texts):
            raise DataError("the list of texts is empty; expected at least one")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {number} is a {type(text).__name__}; expected a string")
        ids = [torch.from_numpy(self.loaded.encode(text, self.text.max_tokens).ids) for text in texts]
        valid = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        return pad_sequence(ids, batch_first=True), valid


def new_text_tower(side: TextSide) -> TextTower | PretrainedTextTower:
    """Build a text tower; one of transformers is built from the configuration beside its own checkpoint."""
    if not side.text_encoder.path:
        return TextTower(side.text)
    return new_text_encoder(side.text_encoder, side.loaded.pad_id)

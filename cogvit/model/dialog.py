"""Conversations as tokens to train on: which of them are answers, by the chat template of a transformers tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cogvit.errors import DataError
from cogvit.model.chat import IMAGE_TOKEN, check_template, image_token_id, in_plain_parts, rendered
from cogvit.model.pretrained import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

Role = Literal["system", "user", "assistant"]
_KEPT = 1 << 16  # dialogs: captions repeat over epochs
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: texts in order, and None where an image stands."""

    role: Role
    parts: tuple[str | None, ...]


Conversation = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Dialog:
    """A conversation as tokens, one image token where an image stands."""

    ids: NDArray[np.int64]  # [n]
    answer: NDArray[np.bool_]  # [n], the tokens that are learned: of answers, with what ends each

    def __len__(self) -> int:
        return len(self.ids)


class DialogReader:
    """Cuts conversations into tokens. Threads may share it.

    An answer begins behind what the template calls the generation prompt and ends with a token that ends a generation;
    where the template puts none behind the last answer, the tokenizer's follows it.

    Attributes:
        image_id: of the image token.

    Errors: DataError when the tokenizer lacks a template or the image token.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        check_template(tokenizer)
        self.image_id = image_token_id(tokenizer)
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._ends = (*own, *eos_ids)
        self._tokenizer = tokenizer
        self.read = lru_cache(_KEPT)(self._read)

    @classmethod
    def of(cls, directory: Path, vocab_size: int, eos_ids: Sequence[int]) -> DialogReader:
        """Read the tokenizer of a language model.

        Errors: DataError when there is none, it has an id beyond the vocabulary, or as the class.
        """
        tokenizer = load_tokenizer(directory)
        if tokenizer is None:
            raise DataError(f"{directory} has no tokenizer; copy one beside the language model")
        if (most := max(tokenizer.get_vocab().values())) >= vocab_size:
            raise DataError(
                f"{directory} has a tokenizer with ids to {most}, and its vocab_size is {vocab_size}; give the language"
                " model as many rows"
            )
        try:
            return cls(tokenizer, eos_ids)
        except DataError as error:
            raise DataError(f"{directory}: {error}") from None

    def _read(self, conversation: Conversation) -> Dialog:
        """Return a conversation's tokens.

        Errors: DataError when the template refuses a conversation, does not repeat it as it was, or has other images.
        """
        ids: list[int] = []
        answer: list[bool] = []
        open_end = False  # the answer before this segment has no end of its own
        for text, learned in self._segments(conversation):
            own = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            told = [learned] * len(own)
            ended = next((place for place, token in enumerate(own) if token in self._ends), None)
            if learned:
                open_end = ended is None
                told = told if ended is None else [place <= ended for place in range(len(own))]
            elif open_end and ended == 0:
                told[0] = True  # as GLM's next turn ends the answer before it
            ids, answer = ids + own, answer + told
        if open_end and self._ends:
            ids, answer = [*ids, self._ends[0]], [*answer, True]
        last = max((number for number, turn in enumerate(conversation) if turn.role == "assistant"), default=-1)
        images = sum(turn.parts.count(None) for turn in conversation[: last + 1])  # those behind it are not read
        if ids.count(self.image_id) != images:
            raise DataError(f"the chat template gives {ids.count(self.image_id)} {IMAGE_TOKEN} for {images} images")
        return Dialog(np.array(ids, np.int64), np.array(answer, np.bool_))

    def _segments(self, conversation: Conversation) -> Iterator[tuple[str, bool]]:
        """The text of a conversation in turn, and whether it is an answer; nothing behind the last answer."""
        plain = [in_plain_parts(self._tokenizer, turn.role, _typed(turn)) for turn in conversation]
        done = ""
        for number, turn in enumerate(conversation):
            if turn.role == "assistant":
                before = rendered(self._tokenizer, plain[:number], asks=True)
                after = rendered(self._tokenizer, plain[: number + 1], asks=False)
                if not (before.startswith(done) and after.startswith(before)):
                    raise DataError(
                        "the chat template writes earlier turns of a conversation otherwise than the last one; answers"
                        " cannot be told from it"
                    )
                yield before[len(done) :], False
                yield after[len(before) :], True
                done = after


def _typed(turn: Turn) -> list[dict[str, Any]]:
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]


def tokenizer_fingerprint(directory: Path) -> str:
    """Return a hash of a tokenizer's files: of what decides how text is cut into tokens."""
    digest = hashlib.blake2b(digest_size=8)
    for name in _FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + (directory / name).read_bytes())
    return digest.hexdigest()

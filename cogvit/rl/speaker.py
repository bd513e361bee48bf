"""The plain model as a speaker: several answers side by side, with the log-probability of every token.

Shape letters beyond the project's: B answers that still go on, n tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.draws import mix, name_to_int64
from cogvit.errors import CheckpointError, ConfigError, DataError
from cogvit.model.chat import Message
from cogvit.model.cross import CrossRows
from cogvit.model.decoder import KeyValueCache
from cogvit.model.generation import drawn_tokens
from cogvit.model.language import CausalLM
from cogvit.model.vlm import VisionLanguageModel
from cogvit.rl.rollout import Speech

_NOISE_SALT = 0x726F6C6C  # "roll"


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """An answer that is wanted.

    Attributes:
        conversation: what it answers; askers that share the object share what is computed of it.
        key: of its draws, see `noise_key`.
        said: [n] int32, what has been said of it already.
    """

    conversation: Sequence[Message]
    key: int
    said: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What was said of an answer.

    Attributes:
        tokens: [n] int32, those that are new.
        logprobs: [n] float32, of these.
        ended: by a token or for its length; otherwise it was stopped.
        text: of all its tokens, where it has ended.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    ended: bool
    text: str = ""


class Speaker(Protocol):
    """Who says tokens."""

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Speak with these weights, by the plain model's names; others stay. Errors: CheckpointError."""

    def speak(self, asked: Sequence[Asked], speech: Speech, stop: Callable[[], bool]) -> list[Said]:
        """Say each answer to its end, or until `stop` says so, which is asked between tokens.

        Errors: DataError when a conversation is none or too long.
        """


def noise_key(speech: Speech, request_id: str, sample: int, turn: int) -> int:
    """Return the key of an answer's draws: it depends on nobody else's."""
    return int(mix(torch.tensor(name_to_int64(request_id)), speech.seed, _NOISE_SALT, sample, turn))


class PlainSpeaker:
    """A VisionLanguageModel with its cache of keys and values.

    An answer ends with an end of the language model's or with the image token, which stands for an image and is never
    read as a word.

    Errors: ConfigError when the language model is not one of ours.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        if not isinstance(model.language, CausalLM):
            raise ConfigError(
                "a policy speaks by the cache of this project's language models: pass a Llama, GLM-4 or Qwen3"
            )
        self._model, self._language = model.eval(), model.causal
        self._device = model.language.embed.weight.device
        self._ends = torch.tensor([*model.language.cfg.eos_ids, model.image_token_id], device=self._device)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Speak with these weights; others stay. Errors: CheckpointError names one that does not fit."""
        own = self._model.state_dict()
        for name, weight in weights.items():
            if name not in own or own[name].shape != weight.shape:
                has = f"has it as {tuple(own[name].shape)}" if name in own else "has no such weight"
                raise CheckpointError(f"{name} {tuple(weight.shape)} does not fit: the policy {has}")
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)

    @torch.no_grad()
    def speak(self, asked: Sequence[Asked], speech: Speech, stop: Callable[[], bool]) -> list[Said]:
        """Say each answer to its end, or until `stop` says so. Errors: DataError as the protocol's."""
        rows = self._read(asked, speech.max_new_tokens)
        said: list[list[tuple[int, float]]] = [[] for _ in asked]
        ended = [False] * len(asked)
        while not stop():
            logits_BV = self._language.logits(rows.hidden_BD)
            id_B, logprob_B = drawn_tokens(logits_BV, rows.key_B, rows.place_B, speech.temperature)
            last_B = torch.isin(id_B, self._ends) | (rows.place_B + 1 >= speech.max_new_tokens)
            new = zip(rows.answers, id_B.tolist(), logprob_B.tolist(), last_B.tolist(), strict=True)
            for answer, token, logprob, last in new:
                said[answer].append((token, logprob))
                ended[answer] = last
            going_B = (~last_B).nonzero().squeeze(1)
            if not len(going_B):
                break
            if len(going_B) < len(last_B):
                rows.take(going_B)
            rows.hear(self._language, id_B[going_B])
        return [self._said(*parts) for parts in zip(asked, said, ended, strict=True)]

    def _read(self, asked: Sequence[Asked], max_new_tokens: int) -> _Rows:
        """Read the conversations and what was said, the same ones once."""
        read: dict[tuple[int, bytes], int] = {}
        origin = [read.setdefault((id(one.conversation), one.said.tobytes()), len(read)) for one in asked]
        firsts = [asked[origin.index(number)] for number in range(len(read))]
        prompts = [self._model.prompt(one.conversation) for one in firsts]
        ids = [
            torch.cat([prompt, torch.from_numpy(one.said.astype(np.int64)).to(self._device)])
            for (prompt, _), one in zip(prompts, firsts, strict=True)
        ]
        longest, most = max(len(prompt) for prompt, _ in prompts), self._language.cfg.max_tokens
        if longest + max_new_tokens > most:
            raise DataError(f"a prompt of {longest} and an answer of {max_new_tokens} tokens exceed {most}")
        pack = self._model.embedded(ids, [images for _, images in prompts])
        lengths = tuple(map(len, ids))
        cache = KeyValueCache(self._language.cfg, lengths, longest + max_new_tokens, pack.x_SD)
        hidden_SD = self._language.hidden(pack.x_SD, pack.position_3S, pack.segments, cache, pack.expert, pack.cross)
        numbers = range(len(read))
        rows = _Rows(
            answers=[*numbers],
            cache=cache,
            hidden_BD=hidden_SD[cache.length_B.cumsum(0) - 1],
            position_B=torch.stack([row.max() + 1 for row in pack.position_3S.split(lengths, dim=1)]),
            place_B=torch.zeros(len(read), dtype=torch.int64, device=self._device),
            key_B=torch.zeros(len(read), dtype=torch.int64, device=self._device),
            cross=pack.cross,
        )
        rows.take(torch.tensor(origin, device=self._device))
        rows.answers = [*range(len(asked))]
        rows.place_B = torch.tensor([len(one.said) for one in asked], device=self._device)
        rows.key_B = torch.tensor([one.key for one in asked], device=self._device)
        return rows

    def _said(self, asked: Asked, said: Sequence[tuple[int, float]], ended: bool) -> Said:
        tokens = np.array([token for token, _ in said], np.int32)
        logprobs = np.array([logprob for _, logprob in said], np.float32)
        whole = [*asked.said.tolist(), *tokens.tolist()]
        text = self._model.tokenizer.decode(whole, skip_special_tokens=True) if ended else ""
        return Said(tokens, logprobs, ended, text)


@dataclass
class _Rows:
    """Answers that go on, and all that the next tokens depend on.

    Attributes:
        answers: B numbers among those that were asked for.
        cache: of keys and values.
        hidden_BD: what the output matrix reads.
        position_B: of the next token.
        place_B: number of the next token in its answer.
        key_B: of the draws.
        cross: what cross attention looks at.
    """

    answers: list[int]
    cache: KeyValueCache
    hidden_BD: Tensor
    position_B: Tensor
    place_B: Tensor
    key_B: Tensor
    cross: CrossRows | None

    def take(self, row_B: Tensor) -> None:
        """Go on with the named rows alone, in this order."""
        numbers = row_B.tolist()
        self.answers = [self.answers[number] for number in numbers]
        self.cache.take(row_B)
        self.hidden_BD, self.position_B = self.hidden_BD[row_B], self.position_B[row_B]
        self.place_B, self.key_B = self.place_B[row_B], self.key_B[row_B]
        self.cross = None if self.cross is None else self.cross.taken(numbers)

    def hear(self, language: CausalLM, id_B: Tensor) -> None:
        """Read the tokens that were said."""
        self.cache.append()
        x_BD, position_3B = language.embed(id_B), self.position_B.expand(3, -1)
        self.hidden_BD = language.hidden(x_BD, position_3B, None, self.cache, None, self.cross)
        self.position_B, self.place_B = self.position_B + 1, self.place_B + 1

"""GLM-4's tokenizer as it was released with GLM-4V-9B: a line for each token, with its bytes in base64 and its rank.

It is read without the code that lies beside it. Two neighbors are merged where their bytes together are a token, those
whose token has the least rank first.

Source: tokenizer.model, tokenizer_config.json and tokenization_chatglm.py of the released glm-4v-9b.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvit.errors import CheckpointError
from cogvit.model.layouts.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RANKS, CONFIG = "tokenizer.model", "tokenizer_config.json"
_CLASS = "ChatGLM4Tokenizer"
_WORDS = (  # what a text is cut into before anything is merged
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that are spelt as themselves


def has_ranks(directory: Path) -> bool:
    """Whether a directory holds such a tokenizer. Errors: CheckpointError when its configuration is damaged."""
    there = all((directory / name).exists() for name in (RANKS, CONFIG))
    return there and read_json(directory / CONFIG).get("tokenizer_class") == _CLASS


def read_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a directory that has one. Errors: CheckpointError when a file is damaged."""
    from tokenizers import AddedToken

    tokenizer = of_ranks(read_ranks(directory / RANKS))
    added = read_json(directory / CONFIG).get("added_tokens_decoder", {})
    for number, content in sorted(_added(directory, added).items()):
        tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        if tokenizer.token_to_id(content) != number:
            found = tokenizer.token_to_id(content)
            raise CheckpointError(f"{directory / CONFIG}: {content} is token {number}, and would be {found} there")
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the ranks of all tokens, which are their ids. Errors: CheckpointError when the file is damaged."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path} is no list of tokens in base64 with their ranks: {error}") from None
    if len({*ranks.values()}) < len(lines) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise CheckpointError(f"{path} must have a token for each byte, and each rank once")
    return ranks


def of_ranks(ranks: Mapping[bytes, int]) -> Tokenizer:
    """Return a tokenizer whose ids are ranks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    spelling = _spelling()
    spelt = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    merges = [
        (ranks[token], ranks[token[:cut]], spelt[token[:cut]], spelt[token[cut:]])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    pairs = [(left, right) for _, _, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE({spelt[token]: rank for token, rank in ranks.items()}, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spelling() -> list[str]:
    """The character that stands for each byte in the tokenizers library."""
    others = iter(range(256, 512))
    return [chr(byte if byte in _PLAIN else next(others)) for byte in range(256)]


def _added(directory: Path, said: Any) -> dict[int, str]:
    """Ids and texts of control tokens. Errors: CheckpointError."""
    try:
        return {int(number): str(token["content"]) for number, token in said.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{directory / CONFIG}: added_tokens_decoder must say id and content of each") from None

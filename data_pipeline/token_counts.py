"""How many tokens every text of a corpus has for a tokenizer, counted once and stored beside the corpus file.

The plan and the placement know by them what a language model has to do for a sample, before they read it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cogvit.config import RunConfig
from cogvit.errors import DataError
from cogvit.model.config import VideoConfig
from cogvit.model.dialog import Conversation, DialogReader
from data_pipeline.caption import LANGUAGES, CaptionChoice, captions_of
from data_pipeline.clips import frame_texts
from data_pipeline.conversation import asked_about, conversation_of
from data_pipeline.corpus import Corpus
from data_pipeline.shards import ShardReader
from data_pipeline.spec import LanguageSpec
from data_pipeline.stored import stored
from data_pipeline.table import CONVERSATION

Ints = NDArray[np.int64]

VERSION = 1
KIND = "tokens"
TOLD_FROM = 100_000  # texts: counting fewer takes seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wording:
    """How a sample becomes a conversation."""

    prompts: dict[str, str]  # what a caption answers, by language
    field: str  # of a json, that holds its captions: data.caption_field
    video: VideoConfig


def wording_of(config: RunConfig) -> Wording:
    """Return how a run's samples become conversations."""
    return Wording(dict(config.language.prompts), config.data.caption_field, config.video)


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """The tokens of all texts of a corpus: of captions with what is asked, of whole conversations."""

    corpus: Corpus
    start: Ints  # [shards], of each shard's texts
    counts: NDArray[np.uint32]  # as `Corpus.lengths` has them, shard after shard; one token an image

    def of(self, rows: Ints, choice: CaptionChoice) -> Ints:
        """Return the tokens of the chosen text of each of some rows, all of which have one."""
        place = self.start[self.corpus.shard_of(rows)] + self.corpus.caption_place(rows, choice)
        return self.counts[place].astype(np.int64)


def open_counts(
    corpus: Corpus, dialogs: DialogReader, spec: LanguageSpec, wording: Wording, reader: ShardReader
) -> TokenCounts:
    """Return the counts as they are stored beside the corpus, or made now.

    Errors: DataError when a text cannot be read as it was indexed, or names the sample that has no form as tokens.
    """
    told = [spec.tokenizer, spec.prompts, wording.field, asdict(spec.video)]
    question = json.dumps([VERSION, corpus.content, corpus.identity(), *told])
    sizes = [len(corpus.lengths(shard)) for shard in range(corpus.num_shards)]

    def make() -> pa.Table:
        if sum(sizes) >= TOLD_FROM:
            log.warning("counting the tokens of %s texts; the next start finds them", f"{sum(sizes):,}")
        counted = [np.zeros(0, np.uint32)]
        for shard in range(corpus.num_shards):
            counted.append(np.array([*_lengths(corpus, shard, dialogs, wording, reader)], np.uint32))
        return pa.table({"tokens": np.concatenate(counted)})

    table = stored(corpus.path, KIND, question, make)
    counts = table["tokens"].chunk(0).to_numpy() if table.num_rows else np.zeros(0, np.uint32)
    return TokenCounts(corpus, np.cumsum([0, *sizes])[:-1].astype(np.int64), counts)


def read_text(
    corpus: Corpus, row: int, language: str, number: int, wording: Wording, reader: ShardReader
) -> Conversation:
    """Read a caption of a sample, with what is asked in its language, or the sample's conversation.

    Errors: DataError when the shard holds something else than its index.
    """
    metadata, extension = corpus.metadata(row, reader)
    entry = corpus.take(np.array([row]))[0]
    if entry["caption_member"] == CONVERSATION:
        more = corpus.further(corpus.shard(row), row)
        images = int(entry["height_px"] > 0) + int((more["frames"] == 0).sum())
        return conversation_of(metadata, images, frame_texts(more, wording.video))
    texts = captions_of(metadata, wording.field if extension == "json" else "")[language]
    if number >= len(texts):
        raise DataError(
            f"{corpus.name(row)} has other captions than its index; pass the --data.caption-field that its shards were"
            " indexed with, or run python -m tools.index_shards again"
        )
    return asked_about(wording.prompts.get(language, ""), texts[number])


def _lengths(corpus: Corpus, shard: int, dialogs: DialogReader, wording: Wording, reader: ShardReader) -> Iterator[int]:
    """The tokens of the texts of a shard in the order of `Corpus.lengths`."""
    first = int(corpus.first[shard])
    for place, entry in enumerate(corpus.rows_of(shard)):
        for language, count in zip(LANGUAGES, entry["num_captions"].tolist(), strict=True):
            for number in range(count):
                text = read_text(corpus, first + place, language, number, wording, reader)
                try:
                    yield len(dialogs.read(text))
                except DataError as error:
                    raise DataError(f"{corpus.name(first + place)}: {error}") from None

"""What a vision-language model says of held-out images: captions, answers, and how surprised it is by the right ones.

Every figure comes with that of a blind model: the same one, shown the image of another sample.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cogvit.errors import DataError
from cogvit.evaluation.cider import cider, words
from cogvit.evaluation.examples import Example, Item
from cogvit.evaluation.results import Evaluation, Score, score
from cogvit.evaluation.samples import spread
from cogvit.model.dialog import Conversation, DialogReader, Turn
from cogvit.model.video import VideoReader
from cogvit.model.vlm import VisionLanguageModel
from data_pipeline.caption import LANGUAGES
from data_pipeline.clips import reading, shown_of
from data_pipeline.decode import read_image
from data_pipeline.index import Index
from data_pipeline.shards import ShardReader
from data_pipeline.table import CONVERSATION
from data_pipeline.talks import lay
from data_pipeline.token_counts import Wording, read_text

MOST_ASKED = 400  # of a source in a language
_LONGEST_ANSWER = 64  # tokens
_LEAST_PX = (512, 512)  # frames of videos are not halved below it
_AT_ONCE = 8192  # tokens of prompts side by side, at most
_SHOWN = 4  # of each kind, in a report
Images = tuple[Image.Image, ...]


@dataclass(frozen=True)
class Asked:
    """A question about images: the turns up to it, and what would be right."""

    turns: Conversation
    images: Images
    right: tuple[str, ...]

    @property
    def learned(self) -> Conversation:
        """The question with the first right answer."""
        return (*self.turns, Turn("assistant", (self.right[0],)))

    def blind(self, other: Images) -> Asked:
        """Return the same question about other images, as many."""
        return Asked(self.turns, other, self.right)


@dataclass(frozen=True)
class Exam:
    """Questions of one kind: captions of a source in a language, or a source's conversations."""

    task: str  # caption or vqa
    name: str
    asked: list[Asked]

    def blind(self) -> list[Asked]:
        """Return every question about the next one's images that has as many."""
        by_count: dict[int, list[int]] = {}
        for place, one in enumerate(self.asked):
            by_count.setdefault(len(one.images), []).append(place)
        after = {place: own[(n + 1) % len(own)] for own in by_count.values() for n, place in enumerate(own)}
        return [one.blind(self.asked[after[place]].images) for place, one in enumerate(self.asked)]


def exams(index: Index, wording: Wording) -> Iterator[Exam]:
    """Yield what can be asked of held-out samples, evenly spread; those whose images do not decode are left out."""
    reader, videos = ShardReader(), VideoReader()
    for source in index.sources:
        rows = index.rows_of(source)
        entries = index.take(rows)
        talks = spread(rows[entries["caption_member"] == CONVERSATION], MOST_ASKED)
        if len(talks):
            asked = [_talk(read_text(index.corpus, row, "en", 0, wording, reader)) for row in talks.tolist()]
            yield Exam("vqa", source, list(_shown(index, talks, asked, wording, reader, videos)))
        captioned = (entries["caption_member"] >= 0) & (entries["caption_member"] != CONVERSATION)
        for number, language in enumerate(LANGUAGES):
            chosen = spread(rows[captioned & (entries["num_captions"][:, number] > 0)], MOST_ASKED)
            if len(chosen):
                found = []
                for row in chosen.tolist():
                    texts = index.corpus.captions(row, reader, wording.field)[language]
                    found.append((read_text(index.corpus, row, language, 0, wording, reader)[:-1], texts))
                shown = list(_shown(index, chosen, found, wording, reader, videos))
                yield Exam("caption", f"{source}_{language}", shown)


def answer_results(model: VisionLanguageModel, found: Sequence[Exam], tasks: Sequence[str]) -> Evaluation:
    """Return exact matches and CIDEr of captions, exact matches of answers, and nats a token of the right ones.

    The chance of a figure is the blind model's.
    """
    results: Evaluation = {}
    for exam in found:
        blind = exam.blind()
        if exam.task in tasks:
            said, guessed = (answers(model, asked) for asked in (exam.asked, blind))
            right = [one.right for one in exam.asked]
            figures: dict[str, Score] = {"exact": score(exact(said, right), exact(guessed, right))}
            if exam.task == "caption":
                figures["cider"] = score(cider(said, right), cider(guessed, right))
            results[f"{exam.task}_{exam.name}"] = figures
        if "perplexity" in tasks:
            seen, other = (nats_a_token(model, asked) for asked in (exam.asked, blind))
            without = nats_a_token(model, [_without_images(one) for one in exam.asked])
            results[f"perplexity_{exam.name}"] = {
                "nats": score(seen, other),
                "nats_without_image": score(without, other),
                "nats_gap": score(other - seen, 0.0),
            }
    return results


def answer_examples(model: VisionLanguageModel, found: Sequence[Exam]) -> list[Example]:
    """Return some questions about held-out images with what is said, evenly spread."""
    shown = []
    for exam in found:
        chosen = [exam.asked[place] for place in np.linspace(0, len(exam.asked) - 1, _SHOWN + 2).astype(int)[1:-1]]
        for one, said in zip(chosen, answers(model, chosen), strict=True):
            question = " ".join(part for turn in one.turns for part in turn.parts if part)
            png = strip(one.images) if one.images else None
            right = exact([said], [one.right]) == 1.0
            shown.append(Example(Item(question, png), (Item(said, right=right), Item(f"({one.right[0]})"))))
    return shown


def strip(images: Sequence[Image.Image]) -> bytes:
    """Return several images side by side, as PNG."""
    spread_px = [round(image.width * images[0].height / image.height) for image in images]
    row, data = Image.new("RGB", (sum(spread_px), images[0].height)), io.BytesIO()
    for place, (image, width_px) in enumerate(zip(images, spread_px, strict=True)):
        row.paste(image.resize((width_px, row.height)), (sum(spread_px[:place]), 0))
    row.save(data, "PNG")
    return data.getvalue()


def exact(said: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """Return the share of answers that are one of the right ones, whatever their case and marks."""
    hits = [words(answer) in {words(one) for one in own} for answer, own in zip(said, right, strict=True)]
    return sum(hits) / len(hits) if hits else 0.0


@torch.inference_mode()
def answers(model: VisionLanguageModel, asked: Sequence[Asked]) -> list[str]:
    """Return the model's greedy answers."""
    said: list[str] = []
    with tqdm(total=len(asked), unit=" prompts", disable=None, leave=False) as shown:
        for part in _side_by_side(model, asked):
            said += model.generate_many([_messages(one) for one in part], _LONGEST_ANSWER)
            shown.update(len(part))
    return said


def _side_by_side(model: VisionLanguageModel, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Yield the questions in their order, as many at once as there is room for, at least one."""
    part: list[Asked] = []
    tokens = 0
    for one in asked:
        # Letters for tokens: near enough where only memory is bounded.
        letters = sum(len(text) for turn in one.learned for text in turn.parts if text is not None)
        needed = letters + sum(model.num_visual_tokens(image) for image in one.images) + _LONGEST_ANSWER
        if part and tokens + needed > _AT_ONCE:
            yield part
            part, tokens = [], 0
        part.append(one)
        tokens += needed
    if part:
        yield part


@torch.inference_mode()
def nats_a_token(model: VisionLanguageModel, asked: Sequence[Asked]) -> float:
    """Return the mean loss of the right answers' tokens."""
    dialogs = DialogReader(model.tokenizer, model.language.cfg.eos_ids)
    total, count = 0.0, 0
    for part in _side_by_side(model, asked):
        rows, learned = [], []
        for one in part:
            grids = [model.token_grid(image) for image in one.images]
            dialog, framed = dialogs.read(one.learned), model.frame is not None
            laid = lay(dialog, dialogs.image_id, grids, model.language.cfg.max_tokens, framed=framed)
            rows.append(torch.from_numpy(laid.ids))
            learned.append(torch.from_numpy(laid.answer))
        ids_S, answer_S = torch.cat(rows), torch.cat(learned)
        hidden_SD = model.hidden_rows(rows, [one.images for one in part])
        follows_S = answer_S.roll(-1)  # no sequence begins with an answer
        logits = model.language.logits(hidden_SD[follows_S.to(hidden_SD.device)]).float().cpu()
        total += float(F.cross_entropy(logits, ids_S[answer_S], reduction="sum"))
        count += int(answer_S.sum())
    return total / max(count, 1)


def _talk(conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
    """The first question of a conversation and its answer."""
    place = next(n for n, turn in enumerate(conversation) if turn.role == "assistant")
    return conversation[:place], ("".join(part or "" for part in conversation[place].parts),)


def _shown(
    index: Index,
    rows: NDArray[np.int64],
    asked: Sequence[tuple[Conversation, tuple[str, ...]]],
    wording: Wording,
    reader: ShardReader,
    videos: VideoReader,
) -> Iterator[Asked]:
    """Questions with their images; those whose images do not decode are left out."""
    for row, (turns, right) in zip(rows.tolist(), asked, strict=True):
        images = []
        shown = shown_of(index, np.array([row]), wording.video)
        count = sum(turn.parts.count(None) for turn in turns)
        refs = [index.ref(row, number) for number in shown.number[:count].tolist()]
        read = reading(refs, shown.time_ms[:count], reader, videos)
        try:
            for number in range(count):
                data = read(number)
                images.append(Image.fromarray(read_image(data) if isinstance(data, bytes) else data.pixels(_LEAST_PX)))
        except DataError:
            continue
        yield Asked(turns, tuple(images), right)


def _messages(asked: Asked) -> list[dict[str, object]]:
    images = iter(asked.images)
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": next(images)} if part is None else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in asked.turns
    ]


def _without_images(asked: Asked) -> Asked:
    turns = tuple(
        Turn(turn.role, tuple(part for part in turn.parts if part is not None) or ("",)) for turn in asked.turns
    )
    return Asked(turns, (), asked.right)

"""Lessons as microbatches: answers end to end, and each image once in a pack, however many answer a question about it.

Cost and placement are stage 3's: what encoder and language model cost together, under every cap of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.batch import Batch, HostView, PackedAnswers, PackedImages, PackedSequence, SampleRef
from cogvit.config import RunConfig
from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from cogvit.model.image_input import image_patches
from cogvit.model.sequence import Part, part_positions
from cogvit.rl.lesson import Lesson, Question, Reader
from data_pipeline.assembly import assemble_images
from data_pipeline.balance import Placement, attention_cost, place
from data_pipeline.pack import pack_limits
from data_pipeline.phases import place_phases
from data_pipeline.spec import PlanSpec, plan_spec

Ints = NDArray[np.int64]
_SHARE = 4  # answers to one question stay together while they take at most this part of a pack


@dataclass(frozen=True)
class Packer:
    """Packs the lessons of a step.

    Attributes:
        config: of the run.
        reader: reads questions.
        sources: of the tasks, by number.
        image_id: the image token.
        by_place: whether image tokens have positions by row and column.
        embeds: whether this rank embeds patches; others get packs without pixels.
    """

    config: RunConfig
    reader: Reader
    sources: tuple[str, ...]
    image_id: int
    by_place: bool
    embeds: bool

    def packs(self, lessons: Sequence[Lesson], version: int, dp_rank: int, dp_size: int) -> tuple[Batch, ...]:
        """Return a dp rank's packs of a step's lessons, which all ranks know in the same order.

        version: of the weights that learn. The packs take turns in being the first, by version.
        Errors: DataError when a question with its answer is longer than a pack or than language.max_tokens.
        """
        bundles = self._bundled(lessons)
        packs = self._placed(bundles, dp_size).packs_of(dp_rank)
        first = version % len(packs)
        order = [*packs[first:], *packs[:first]]
        return tuple(self._pack([one for number in members for one in bundles[number]], version) for members in order)

    def _bundled(self, lessons: Sequence[Lesson]) -> list[list[Lesson]]:
        """Lessons that stay together: neighbors about the same question."""
        limits, most, bundles = pack_limits(self.config), self.config.language.max_tokens, list[list[Lesson]]()
        for lesson in lessons:
            length = self._length(lesson)
            if length > most:
                raise DataError(
                    f"a question of task {lesson.question.source!r} has {length} tokens with its answer, above"
                    f" --language.max-tokens {most}; raise that"
                )
            last = bundles[-1] if bundles and bundles[-1][0].question is lesson.question else []
            tokens = length + sum(map(self._length, last))
            if last and _SHARE * tokens <= limits.text_tokens and _SHARE * (len(last) + 1) <= limits.images:
                last.append(lesson)
            else:
                bundles.append([lesson])
        return bundles

    def _placed(self, bundles: Sequence[Sequence[Lesson]], dp_size: int) -> Placement:
        limits, spec = pack_limits(self.config), plan_spec(self.config)
        demand = np.array([self._demand(own, spec) for own in bundles], np.int64).reshape(-1, 5)
        phases, (tokens, text_tokens, slots) = demand[:, :2], demand[:, 2:].T
        if self.config.parallel.pp > 1:
            return place_phases(phases, tokens, text_tokens, slots, num_ranks=dp_size, limits=limits)
        return place(phases.sum(axis=1), tokens, text_tokens, slots, num_ranks=dp_size, limits=limits)

    def _demand(self, bundle: Sequence[Lesson], spec: PlanSpec) -> tuple[int, int, int, int, int]:
        """Costs of encoder and language model, patches, tokens and slots of a bundle, whose images lie there once."""
        language = spec.language
        assert language is not None, "a policy is a language model"
        patches = np.array([rows * columns for rows, columns in bundle[0].question.grids], np.int64)
        lengths = np.array([self._length(lesson) for lesson in bundle], np.int64)
        numerator, denominator = language.token_cost
        seen = int(attention_cost(patches, spec.attention_tokens).sum()) * language.vision_passes
        said = int(attention_cost(lengths, language.attention_tokens).sum()) * numerator // denominator
        return seen, said, int(patches.sum()), int(lengths.sum()), max(len(bundle), len(patches))

    def _parts(self, lesson: Lesson) -> list[Part]:
        """Text and images of a lesson's sequence, which ends before the answer's last token: nothing follows that."""
        pool, parts, text = self.config.adapter.spatial_pool, list[Part](), 0
        grids = iter(lesson.question.grids)
        for token in lesson.question.ids.tolist():
            if token == self.image_id:
                rows, columns = next(grids)
                parts += [text, (rows // pool, columns // pool)] if text else [(rows // pool, columns // pool)]
                text = 0
            else:
                text += 1
        text += len(lesson.said.tokens) - 1
        return [*parts, text] if text else parts

    def _length(self, lesson: Lesson) -> int:
        pool, question = self.config.adapter.spatial_pool, lesson.question
        visual = sum(rows * columns // pool**2 for rows, columns in question.grids)
        return len(question.ids) - len(question.grids) + visual + len(lesson.said.tokens) - 1

    def _pack(self, lessons: Sequence[Lesson], version: int) -> Batch:
        questions = list({id(lesson.question): lesson.question for lesson in lessons}.values())
        # Equal grids side by side: attention on CPU runs over neighbors of one length at a time.
        questions.sort(key=lambda question: question.grids, reverse=True)
        lessons = sorted(lessons, key=self._length, reverse=True)
        pool, first_row, rows_of = self.config.adapter.spatial_pool, 0, dict[int, range]()
        for question in questions:
            visual = sum(rows * columns // pool**2 for rows, columns in question.grids)
            rows_of[id(question)] = range(first_row, first_row + visual)
            first_row += visual
        sequence, answers = self._sequence(lessons, rows_of, version)
        refs = [_named(question) for question in questions for _ in question.grids]
        absent: tuple[SampleRef | None, ...] = (None,) * (pack_limits(self.config).images - len(refs))
        return Batch(self._images(questions), None, None, (*refs, *absent), sequence, answers)

    def _images(self, questions: Sequence[Question]) -> PackedImages:
        limits, patch_px = pack_limits(self.config), self.config.vision.patch_size
        grids = [grid for question in questions for grid in question.grids]
        if self.embeds:
            prompts = [self.reader.prompt(one.source, one.seed, one.texts) for one in questions]
            images = [image for prompt in prompts for image in prompt.images]
            shown = [image_patches(image, self.reader.limits, patch_px) for image in images]
            patches: list[Tensor | None] = [pixels for pixels, _ in shown]
            if [grid for _, grid in shown] != grids:
                raise DataError("a task shows other images when an episode is played again; it must depend on its seed")
        else:
            patches = [torch.zeros(rows * columns, 0, dtype=torch.uint8) for rows, columns in grids]
        grid_hw = np.array(grids, np.int64).reshape(-1, 2)
        width, key = (3 * patch_px**2 if self.embeds else 0), np.zeros(len(grids), np.int64)
        return assemble_images(patches, grid_hw, key, width, limits)

    def _sequence(
        self, lessons: Sequence[Lesson], rows_of: dict[int, range], version: int
    ) -> tuple[PackedSequence, PackedAnswers]:
        limits = pack_limits(self.config)
        bounds = [*accumulate(map(self._length, lessons), initial=0)]
        size, slots = limits.rows(bounds[-1], limits.text_tokens), limits.images
        bounds += [bounds[-1]] * (slots - len(lessons)) + [size]
        ids, labels, visual = np.zeros(size, np.int64), np.zeros(size, np.int64), np.full(size, -1, np.int64)
        weight, logprob, age = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.int64)
        position = torch.zeros(3, size, dtype=torch.int32)
        advantage, source = torch.zeros(slots), torch.full((slots,), -1)
        key = [_named(one.question).sample_id for one in lessons]
        for number, (start, lesson) in enumerate(zip(bounds, lessons, strict=False)):
            parts, said, stop = self._parts(lesson), lesson.said, bounds[number + 1]
            position[:, start:stop] = part_positions(parts, by_place=self.by_place)
            is_image = np.repeat(*_runs(parts))
            read = np.empty(stop - start, np.int64)
            read[is_image] = self.image_id
            words = lesson.question.ids[lesson.question.ids != self.image_id]
            read[~is_image] = np.concatenate([words, said.tokens[:-1].astype(np.int64)])
            ids[start:stop] = read
            visual[start + np.flatnonzero(is_image)] = rows_of[id(lesson.question)]
            answer = slice(stop - len(said.tokens), stop)
            labels[answer], logprob[answer], weight[answer] = said.tokens, said.logprobs, 1.0
            age[answer] = np.repeat([version - s.version for s in said.spans], [s.tokens for s in said.spans])
            advantage[number], source[number] = lesson.advantage, self.sources.index(lesson.question.source)
        sequence = PackedSequence(
            ids=torch.from_numpy(ids),
            position=position,
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            visual_row=torch.from_numpy(visual),
            labels=torch.from_numpy(labels),
            weight=torch.from_numpy(weight),
            key=torch.tensor([*key, *[0] * (slots - len(key))]),
            host=HostView(tuple(np.diff(bounds).tolist()), labels=int((weight > 0).sum())),
        )
        return sequence, PackedAnswers(torch.from_numpy(logprob), torch.from_numpy(age), advantage, source, version)


def _named(question: Question) -> SampleRef:
    """A question as a sample that lies nowhere."""
    return SampleRef(name_to_int64(f"{question.source}-{question.seed}-{question.texts}"), "", 0, 0)


def _runs(parts: Sequence[Part]) -> tuple[list[bool], list[int]]:
    """Whether each part is an image, and how many tokens it has."""
    sizes = [part if isinstance(part, int) else part[0] * part[1] for part in parts]
    return [not isinstance(part, int) for part in parts], sizes

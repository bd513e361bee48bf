"""Stage 4: a policy learns from its own answers, and in the same step is seen whether it looks and is itself.

The loss of a step is the mean over all answers of the global batch, each a mean over its tokens, so neither packing nor
layout weighs an answer differently. One pack in every step is also scored with other images: what they cost is what
images are worth. And a token must have the log-probability that whoever said it gave it, with the weights that said it:
if not, rollout and training see different things. What these very weights said is compared in passing; the first pack
is scored with earlier ones too.

Shape letters beyond the project's: R labels of a pack that have a weight, A answers of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.batch import Batch, PackedAnswers, PackedSequence
from cogvit.objective.blindness import with_other_images
from cogvit.objective.distill import reduce_terms
from cogvit.objective.language import JointModel, Sight, Speak, forward_passes, train_passes
from cogvit.objective.policy import Answers, Clipping, policy_loss
from cogvit.objective.reference import Earlier, Reference
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.schedule import Schedule
from cogvit.parallel.vocabulary import rows_with_weight

EFFECT = "image_effect"
OTHERS = "other_images"
GAP = "logprob_gap"


@dataclass(frozen=True)
class Pack:
    """What is known of a pack's labels before a pass."""

    answers: Answers
    age: Tensor  # [R] int64
    source: Tensor  # [R] int64


class Others(NamedTuple):
    """A pack with other images."""

    logprob_R: Tensor
    questions: Tensor  # of each source


class Seen(NamedTuple):
    """Sums over a pack: what the last stage reports of it."""

    loss: Tensor  # 0-dim, over its answers
    report: dict[str, Tensor]  # 0-dim each, as `policy_loss`
    gap: Tensor  # 0-dim, the largest
    effect: Tensor  # [3, sources]: nats that other images cost; tokens and questions that were scored with them


class Reinforce:
    """The clipped objective of a policy on encoder, adapter and language model.

    Args:
        clipping: the loss.
        sources: names of the tasks' sources.
        temperature: at which answers were drawn.
        spatial_pool: sides of the groups of patches that are a token.
        reference: the weights that the policy should stay near to, where clipping.kl_weight is not 0.
        earlier: weights that answered before they were trained further, where answers may be stale.
    """

    def __init__(
        self,
        clipping: Clipping,
        sources: Sequence[str],
        temperature: float,
        spatial_pool: int,
        reference: Reference | None,
        earlier: Earlier | None,
    ) -> None:
        self._clipping, self._sources, self._temperature = clipping, tuple(sources), temperature
        self._spatial_pool, self._reference, self._earlier = spatial_pool, reference, earlier

    def train(self, model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Leave the gradients of one step on the parameters; returns the global terms (0-dim tensors).

        "loss", "clipped", "ratio" and "kl" are means over answers; "logprob_gap" in nats, the largest of all tokens
        that were compared (minus infinity where there are none); "image_effect_SOURCE" in nats a token, by
        which other images lower the log-probability of the first pack's answers (NaN where it has none), and
        "other_images_SOURCE", to how many questions.
        """
        num_answers = _count_answers(micro, schedule)
        packs, other = self._packs(model, micro, schedule), self._other(model, micro, schedule)
        gaps = self._earlier_gaps(model, micro, packs, schedule)
        if self._earlier is not None:
            self._earlier.keep(_answers(micro[0]).version)

        def loss(logprob_R: Tensor, index: int) -> tuple[Tensor, Seen]:
            seen = self._seen(logprob_R, packs[index], other[0] if index == 0 else None)
            return seen.loss / num_answers, seen._replace(loss=seen.loss.detach())

        seen = train_passes(model, micro, schedule, self._speak(model, micro), loss)
        return self._terms(seen, gaps, num_answers, schedule)

    def evaluate(self, model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the terms without gradients."""
        packs, other = self._packs(model, micro, schedule), self._other(model, micro, schedule)
        found = forward_passes(model, micro, schedule, self._speak(model, micro))
        seen = [
            self._seen(logprob_R, pack, other[0] if index == 0 else None)
            for index, (logprob_R, pack) in enumerate(zip(found, packs, strict=False))
        ]
        gaps = self._earlier_gaps(model, micro, packs, schedule)
        return self._terms(seen, gaps, _count_answers(micro, schedule), schedule)

    def _speak(self, model: JointModel, micro: Sequence[Batch]) -> Speak:
        def speak(index: int, sight: Sight) -> Tensor:
            sequence = _sequence(micro[index])
            hidden_SD: Tensor = model.language(sequence, sight.visual_ED)
            if not model.language.mesh.is_last_stage:
                return hidden_SD
            assert isinstance(model.language, LanguageStage), "checked by the stage"
            return model.language.logprobs(hidden_SD, sequence, self._temperature)

        return speak

    def _packs(self, model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> list[Pack]:
        packs = [_pack(batch) for batch in micro]
        if self._reference is None:
            return packs
        with self._reference.in_place():
            found = forward_passes(model, micro, schedule, self._speak(model, micro))
        return [
            replace(pack, answers=replace(pack.answers, reference=logprob_R))
            for pack, logprob_R in zip(packs, found or [pack.answers.logprob for pack in packs], strict=True)
        ]

    def _other(self, model: JointModel, micro: Sequence[Batch], schedule: Schedule) -> list[Others]:
        """The first pack with other images, on the last stage."""
        shown = [with_other_images(micro[0], self._spatial_pool)]
        found, questions = forward_passes(model, shown, schedule, self._speak(model, shown)), self._questions(micro[0])
        return [Others(logprob_R, questions) for logprob_R in found]

    def _questions(self, batch: Batch) -> Tensor:
        """How many questions of each source a pack's answers are to."""
        source, key = _answers(batch).source, _sequence(batch).key
        asked = torch.stack([source, key])[:, source >= 0].unique(dim=1)
        return torch.bincount(asked[0], minlength=len(self._sources))

    def _seen(self, logprob_R: Tensor, pack: Pack, other: Others | None) -> Seen:
        loss, report = policy_loss(logprob_R, pack.answers, self._clipping)
        now_R = logprob_R.detach()
        effect = now_R.new_zeros(3, len(self._sources))
        if other is not None:
            effect[:2].index_add_(1, pack.source, torch.stack([now_R - other.logprob_R, torch.ones_like(now_R)]))
            effect[2] = other.questions
        return Seen(loss, report, _gap(now_R, pack, 0), effect)

    def _earlier_gaps(
        self, model: JointModel, micro: Sequence[Batch], packs: Sequence[Pack], schedule: Schedule
    ) -> list[Tensor]:
        """The first pack's gaps to the weights that said its tokens, where these are kept; on the last stage."""
        gaps: list[Tensor] = []
        if self._earlier is not None:
            for age, weights in self._earlier.before(_answers(micro[0]).version):
                with weights.in_place():
                    found = forward_passes(model, micro[:1], schedule, self._speak(model, micro))
                gaps += [_gap(logprob_R, packs[0], age) for logprob_R in found]
        return gaps

    def _terms(
        self, seen: Sequence[Seen], gaps: Sequence[Tensor], num_answers: Tensor, schedule: Schedule
    ) -> dict[str, Tensor]:
        names = ["clipped", "ratio", *(["kl"] if self._reference is not None else [])]
        device, sources = schedule.mesh.device, len(self._sources)
        blank = torch.zeros(1 + len(names) + 3 * sources, device=device)
        rows = [torch.cat([torch.stack([one.loss, *(one.report[name] for name in names)]), one.effect.flatten()])
                for one in seen]  # fmt: skip
        sums = reduce_terms(torch.stack([blank, *rows]).sum(0), schedule)
        gap = torch.stack([blank.new_full((), -torch.inf), *gaps, *(one.gap for one in seen)]).max()
        gap = schedule.mesh.all_reduce(gap, dist.ReduceOp.MAX)
        means, (cost, tokens, asked) = sums[: 1 + len(names)] / num_answers, sums[1 + len(names) :].view(3, sources)
        terms = dict(zip(["loss", *names], means, strict=True)) | {GAP: gap}
        terms |= {f"{EFFECT}_{name}": value for name, value in zip(self._sources, cost / tokens, strict=True)}
        return terms | {f"{OTHERS}_{name}": count for name, count in zip(self._sources, asked, strict=True)}


def _pack(batch: Batch) -> Pack:
    sequence, own = _sequence(batch), _answers(batch)
    row_R = rows_with_weight(sequence.weight, None if sequence.host is None else sequence.host.labels)
    answer_R = torch.searchsorted(sequence.cu_seqlens[1:-1].contiguous(), row_R.to(torch.int32), right=True)
    return Pack(
        Answers(answer_R, own.logprob.index_select(0, row_R), own.advantage),
        own.age.index_select(0, row_R),
        own.source.index_select(0, answer_R),
    )


def _gap(logprob_R: Tensor, pack: Pack, age: int) -> Tensor:
    """The largest difference in the log-probability of a token of this age, 0-dim; minus infinity where none has it."""
    apart_R = (logprob_R - pack.answers.logprob).abs().where(pack.age == age, -torch.inf)
    return torch.cat([apart_R, apart_R.new_full((1,), -torch.inf)]).max()


def _count_answers(micro: Sequence[Batch], schedule: Schedule) -> Tensor:
    """Of the global batch, at least 1, fp32; collective over the dp ranks."""
    count = torch.stack([(_answers(batch).source >= 0).sum() for batch in micro]).sum().float()
    dist.all_reduce(count, group=schedule.mesh.dp_group)
    return count.clamp(min=1.0)


def _sequence(batch: Batch) -> PackedSequence:
    assert batch.sequence is not None, "a policy reads sequences"
    return batch.sequence


def _answers(batch: Batch) -> PackedAnswers:
    assert batch.answers is not None, "a policy learns from answers"
    return batch.answers

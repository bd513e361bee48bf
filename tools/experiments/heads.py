"""Heads for more tokens on interleaved texts: trained on a language model that reads, and what they then reach."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvit import CausalLM, VisionLanguageModel
from cogvit.batch import PackedSequence
from cogvit.model.config import MmtpConfig, SeenAtImages
from cogvit.model.drafting import Drafted, Prompt
from cogvit.model.generation import Sampling
from cogvit.model.language import place_visual
from cogvit.model.packing import pack_images
from cogvit.model.vit import CogViT
from cogvit.report.chart import running_mean
from configs.models import demo_vision
from tools.experiments.interleaved import (
    Document,
    Laid,
    Pictures,
    Words,
    draw_documents,
    lay,
    new_model,
)

DEPTHS, WEIGHT = 3, 0.3
DOCUMENTS, WARMUP_STEPS, PEAK_RATE = 8, 20, 3e-3
HELD_OUT_DOCUMENTS, PROMPTS, LONGEST_ANSWER = 96, 48, 48
PLACES = ("across", "edge", "text")


@dataclass(frozen=True)
class Run:
    """One training of heads.

    Attributes:
        images: what they see where an image stands.
        tokens: K, where that is a learned set.
        share: one layer for all depths.
        joint: the language model and the adapter learn too, and the heads' loss reaches them; else heads alone learn.
        seed: of heads, batches and of the model that they start from.
        depths: M; 0 is the control.
    """

    images: SeenAtImages = "token"
    tokens: int = 4
    share: bool = True
    joint: bool = True
    seed: int = 0
    depths: int = DEPTHS

    @property
    def kind(self) -> str:
        """What it is without its seed, as a name."""
        if not self.depths:
            return "joint_none"
        images = f"tokens{self.tokens}" if self.images == "tokens" else self.images
        return f"{'joint' if self.joint else 'alone'}_{images}_{'shared' if self.share else 'own'}"

    @property
    def name(self) -> str:
        """Its name among all runs."""
        return f"{self.kind}_{self.seed}"

    @property
    def mmtp(self) -> MmtpConfig:
        """The heads."""
        return MmtpConfig(self.depths, self.share, self.images, self.tokens, WEIGHT, trunk_gradient=self.joint)


@dataclass(frozen=True)
class Found:
    """What a run reached.

    Attributes:
        curve: for each step the training losses, the next token's first, then each depth's, in nats a label.
        held_out: likewise of held-out texts, all labels.
        places: by where a prediction is made, each depth's held-out loss: `across` an image, at its `edge` (an image's
            token or the one behind it, no image in the path), elsewhere in `text`.
        labels: how many each of these means are of.
        accepted: tokens a pass of greedy answers to held-out pictures.
        roughness: mean over depths of how far the training loss strays from its running mean in the second half.
        largest_norm: of the gradients after the warmup.
        cpu_s: of the whole run.
    """

    curve: list[list[float]]
    held_out: list[float]
    places: dict[str, list[float]]
    labels: dict[str, list[int]]
    accepted: float
    roughness: float
    largest_norm: float
    cpu_s: float


@dataclass(frozen=True)
class Trained:
    """A model with its heads, and what it reached."""

    model: VisionLanguageModel
    found: Found


def train_base(
    pixels: Pictures, tokenizer: Any, depth: int, course: Course, vision: CogViT | None = None
) -> VisionLanguageModel:
    """Return encoder, adapter and language model, trained on the next token alone.

    vision: an encoder that stands still; the demo's with random weights, which learns, if None.
    """
    torch.manual_seed(course.seed)
    own = CogViT(demo_vision()) if vision is None else vision.requires_grad_(False)
    model = new_model(tokenizer, depth, own)
    words = Words.of(tokenizer)

    def terms(documents: list[list[int]]) -> list[Tensor]:
        laid = lay(pixels, documents, words)
        sizes = [rows * columns for rows, columns in laid.grids]
        visual_ED = model.encode_images(pack_images(laid.patches.split(sizes), laid.grids))
        return losses(model.causal, model.causal.forward_packed(laid.sequence, visual_ED), laid, visual_ED)

    descend(terms, lambda found: found[0], [x for x in model.parameters() if x.requires_grad], course)
    return model.eval()


def train_heads(run: Run, base: VisionLanguageModel, train: Pictures, held_out: Pictures, steps: int) -> Trained:
    """Train heads behind a base; both kinds of pictures are its encoder's features."""
    start_s, words = time.process_time(), Words.of(base.tokenizer)
    torch.manual_seed(run.seed)
    language = CausalLM(replace(base.causal.cfg, mmtp=run.mmtp))
    language.load_state_dict(base.causal.state_dict(), strict=False)
    model = replaced(base, language)
    adapter, learning = model.adapter, [*language.parameters(), *model.adapter.parameters()]
    if not run.joint:
        assert language.mtp is not None, "heads alone are some"
        learning = [*language.mtp.parameters()]

    def terms(documents: list[list[int]]) -> list[Tensor]:
        laid = lay(train, documents, words, run.mmtp)
        with torch.set_grad_enabled(run.joint):
            visual_ED = adapter.forward_packed(laid.patches, laid.grids)
            hidden_SD = language.forward_packed(laid.sequence, visual_ED)
        return losses(language, hidden_SD, laid, visual_ED)

    def loss(found: list[Tensor]) -> Tensor:
        ahead = WEIGHT * torch.stack(found[1:]).mean() if run.depths else found[0].new_zeros(())
        return found[0] + ahead if run.joint else ahead / WEIGHT

    course = Course(len(train.grids), steps, run.seed)
    curve, norms = descend(terms, loss, learning, course)
    model.eval()
    reached = examine(model, held_out, words)
    accepted = accepted_length(model, held_out, words) if run.depths else 1.0
    rough = statistics.mean(roughness([row[depth] for row in curve]) for depth in range(len(curve[0])))
    return Trained(
        model,
        Found(curve, *reached, accepted, rough, max(norms[WARMUP_STEPS:]), time.process_time() - start_s),
    )


@dataclass(frozen=True)
class Course:
    """How long one trains, on documents of which pictures."""

    num_pictures: int
    steps: int
    seed: int

    def batches(self) -> Iterator[list[list[int]]]:
        """Yield the documents of each step; equal seeds give equal ones."""
        draw = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield draw_documents(DOCUMENTS, self.num_pictures, draw)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        return PEAK_RATE * min((step + 1) / WARMUP_STEPS, 1.0) * (1.0 + math.cos(math.pi * step / self.steps)) / 2


def descend(
    terms: Callable[[list[list[int]]], list[Tensor]],
    loss: Callable[[list[Tensor]], Tensor],
    parameters: list[nn.Parameter],
    course: Course,
) -> tuple[list[list[float]], list[float]]:
    """Train; returns the terms of each step and the norms of its gradients before they are clipped."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01)
    curve, norms = [], []
    for step, documents in enumerate(course.batches()):
        for group in optimizer.param_groups:
            group["lr"] = course.rate(step)
        found = terms(documents)
        optimizer.zero_grad()
        loss(found).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        curve.append([round(term.item(), 4) for term in found])
    return curve, norms


def losses(language: CausalLM, hidden_SD: Tensor, laid: Laid, visual_ED: Tensor) -> list[Tensor]:
    """Return the mean loss of the next token and of each depth, in nats a label."""
    sequence, counted_S = laid.sequence, laid.sequence.weight > 0
    means = [F.cross_entropy(language.logits(hidden_SD[counted_S]), sequence.labels[counted_S])]
    if sequence.ahead is None or not language.cfg.mmtp.depths:
        return means
    deep = language.forward_ahead(hidden_SD, sequence, sequence.ahead, visual_ED)
    for deep_SD, labels_S, weight_S in zip(deep, *sequence.ahead_labels(), strict=True):
        counted_S = weight_S > 0
        means.append(F.cross_entropy(language.logits(deep_SD[counted_S]), labels_S[counted_S]))
    return means


@torch.no_grad()
def examine(
    model: VisionLanguageModel, held_out: Pictures, words: Words
) -> tuple[list[float], dict[str, list[float]], dict[str, list[int]]]:
    """Return held-out losses: over all labels, by place, and how many labels these are of.

    All labels of the text count at every depth, also those that `token_path` does not learn.
    """
    mmtp = model.causal.cfg.mmtp
    documents = draw_documents(HELD_OUT_DOCUMENTS, len(held_out.grids), torch.Generator().manual_seed(0))
    laid = lay(held_out, documents, words, mmtp)
    sequence = laid.sequence
    visual_ED = model.adapter.forward_packed(laid.patches, laid.grids)
    hidden_SD = model.causal.forward_packed(sequence, visual_ED)
    means = [losses(model.causal, hidden_SD, laid, visual_ED)[0].item()]
    places: dict[str, list[float]] = {place: [] for place in PLACES}
    labels: dict[str, list[int]] = {place: [] for place in PLACES}
    ahead = lay(held_out, documents, words, replace(mmtp, images="token")).sequence.ahead
    if ahead is None or sequence.ahead is None:
        return means, places, labels
    deep = model.causal.forward_ahead(hidden_SD, sequence, sequence.ahead, visual_ED)
    for deep_SD, source_S, weight_S in zip(deep, ahead.source.long(), ahead.weight, strict=True):
        each_S = F.cross_entropy(model.causal.logits(deep_SD), sequence.labels[source_S], reduction="none")
        means.append(each_S[weight_S > 0].mean().item())
        for place, where_S in places_of(sequence, source_S, words).items():
            own = each_S[where_S & (weight_S > 0)]
            places[place].append(own.mean().item() if len(own) else math.nan)
            labels[place].append(len(own))
    return means, places, labels


def places_of(sequence: PackedSequence, source_S: Tensor, words: Words) -> dict[str, Tensor]:
    """Return which predictions of a depth are of each kind of place."""
    is_image_S = sequence.visual_row >= 0
    before_S = is_image_S.cumsum(0)
    across_S = before_S[source_S] > before_S
    edge_S = ~across_S & (is_image_S | (sequence.ids == words.end))
    return dict(zip(PLACES, (across_S, edge_S, ~across_S & ~edge_S), strict=True))


@torch.no_grad()
def accepted_length(model: VisionLanguageModel, held_out: Pictures, words: Words) -> float:
    """Return tokens a pass of greedy captions of held-out pictures, every other behind another one and its caption."""
    drafted, sampling = Drafted(), Sampling(LONGEST_ANSWER)
    documents = draw_documents(PROMPTS, len(held_out.grids), torch.Generator().manual_seed(1))
    for number, document in enumerate(documents):
        for _ in model.causal.stream_drafted(
            prompt_of(model, held_out, document[number % 2 :], words), sampling, drafted
        ):
            continue
    return drafted.accepted_length


def prompt_of(model: VisionLanguageModel, held_out: Pictures, document: Document, words: Words) -> Prompt:
    """Return a document without its last caption as a prompt."""
    laid = lay(held_out, [document], words, model.causal.cfg.mmtp)
    sequence, ahead = laid.sequence, laid.sequence.ahead
    assert ahead is not None, "heads were asked for"
    length = len(sequence.ids) - len(held_out.texts[document[-1]])
    embedded_SD = model.causal.embed_ids(sequence.ids[:length])
    visual_ED = model.adapter.forward_packed(laid.patches, laid.grids)
    x_SD = place_visual(embedded_SD, visual_ED, sequence.visual_row[:length])
    return Prompt(x_SD, embedded_SD, ahead.slot[:length], sequence.position[:, :length])


def replaced(base: VisionLanguageModel, language: CausalLM) -> VisionLanguageModel:
    """Return a base with another language model."""
    return VisionLanguageModel(
        base.vision, base.adapter, language, base.image_token_id, base.limits, tokenizer=base.tokenizer
    )


def roughness(values: Sequence[float]) -> float:
    """Return by how much values stray from their running mean in their second half."""
    half = len(values) // 2
    return statistics.pstdev(a - b for a, b in zip(values[half:], running_mean(values)[half:], strict=True))

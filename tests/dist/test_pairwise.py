"""The sigmoid loss over ranks: loss and gradients against the full matrix of one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit.batch import Batch
from cogvit.config import ContrastConfig, ParallelConfig
from cogvit.errors import NonFiniteStep
from cogvit.objective.pairwise import Pairs, SigmoidGradients, sigmoid_gradients, start_groups
from cogvit.objective.siglip import Contrast, ContrastModel
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.parallel.schedule import Schedule
from tests.dist.runs import Case, micro_of, run_config, start_engine
from tests.largest_tensor import LargestTensor
from tests.peak_bytes import PeakBytes
from tests.pool import Pool

DIM = 8
CHUNKS = (1, 3, 7, 64)  # 7 and 3 divide no count, 64 is more than all


@dataclass(frozen=True)
class World:
    """A layout with the pairs that each dp rank brings; `absent` slots among them hold none."""

    counts: tuple[int, ...]
    tp: int = 1
    pp: int = 1
    absent: int = 2

    @property
    def size(self) -> int:
        return len(self.counts) * self.tp * self.pp


WORLDS = [
    World((9,)),
    World((1,), absent=0),
    World((8, 8), absent=0),
    World((3, 11)),
    World((4, 0, 6)),
    World((5, 5, 5), absent=0),
    World((6, 1, 9, 2)),
    World((7, 4), tp=2),
    World((7, 4), pp=2),
    # The ranks of a replica compute the same side by side.
    World((9,), tp=2),
    World((9,), pp=2),
    World((5,), tp=3),
    World((5,), pp=3),
    World((8,), tp=4),
    World((8,), pp=4),
    World((6,), tp=2, pp=2),
    World((6, 0, 0, 5, 9, 2, 1, 4)),
    World((3,) * 8, absent=0),
    World((2, 7, 0, 3), tp=2),
]


@dataclass(frozen=True)
class Slots:
    """The slots of one rank."""

    image: Tensor
    text: Tensor
    pairs: Pairs


def slots_of(rank: int, count: int, absent: int, dtype: torch.dtype) -> Slots:
    """Pairs with a few equal captions and concepts, in random slots."""
    g = torch.Generator().manual_seed(rank)
    total = count + absent
    image, text = (F.normalize(torch.randn(total, DIM, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    weight = torch.zeros(total).index_fill_(0, torch.randperm(total, generator=g)[:count], 1.0)
    caption, concept = torch.randint(0, 6, (total,), generator=g), torch.randint(100, 112, (total,), generator=g)
    return Slots(image.to(dtype), text.to(dtype), Pairs(caption, concept, weight))


def scalars(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor([1.3], dtype=dtype), torch.tensor([-1.7], dtype=dtype)


def full_matrix(everyone: list[Slots], log_t: Tensor, bias: Tensor, leave_out: str = "concepts") -> Tensor:
    """The loss as the paper writes it over all slots of all ranks at once, for autograd."""
    image, text = (torch.cat([getattr(one, name) for one in everyone]) for name in ("image", "text"))
    caption, concept, weight = (
        torch.cat([getattr(one.pairs, name) for one in everyone]) for name in ("caption_id", "concept_id", "weight")
    )
    logits = log_t.exp() * image @ text.T + bias
    own = torch.eye(len(image), dtype=torch.bool)
    same = torch.zeros_like(own)
    if leave_out != "none":
        same |= caption[:, None] == caption
    if leave_out == "concepts":
        same |= concept[:, None] == concept
    counts = weight[:, None].bool() & weight.bool() & (own | ~same)
    losses = -F.logsigmoid(torch.where(own, 1.0, -1.0) * logits)
    return losses[counts].sum() / weight.sum()


def reference_of(everyone: list[Slots], leave_out: str) -> SigmoidGradients:
    """Loss and gradients of the full matrix in fp64."""
    leaves = [torch.cat([getattr(one, name) for one in everyone]).double() for name in ("image", "text")]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, *scalars(torch.float64))]
    sizes = [len(one.image) for one in everyone]
    split = [
        Slots(image, text, one.pairs)
        for image, text, one in zip(leaves[0].split(sizes), leaves[1].split(sizes), everyone, strict=True)
    ]
    loss = full_matrix(split, leaves[2], leaves[3], leave_out)
    return SigmoidGradients(loss.detach(), *torch.autograd.grad(loss, leaves))


GATHER = ContrastConfig(loss="gather")


def ring(group_ranks: int, **config: Any) -> ContrastConfig:
    return ContrastConfig(loss="ring", group_ranks=group_ranks, **config)


CONFIGS = [replace(loss, chunk_pairs=chunk) for loss, chunk in product((ring(1), GATHER), CHUNKS)]
CONFIGS += [ring(1, chunk_pairs=7, leave_out="captions"), replace(GATHER, chunk_pairs=7, leave_out="none")]
CONFIGS += [ring(ranks, chunk_pairs=chunk) for ranks, chunk in product((2, 4), (3, 7))]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def configs_of(layout: World) -> list[ContrastConfig]:
    """Those whose groups divide the dp ranks."""
    return [one for one in CONFIGS if len(layout.counts) % max(one.group_ranks, 1) == 0]


def loss_of(own: Slots, log_t: Tensor, bias: Tensor, mesh: Mesh, config: ContrastConfig) -> SigmoidGradients:
    groups = start_groups(config, mesh.dp_size, mesh)
    return sigmoid_gradients(own.image, own.text, own.pairs, log_t, bias, mesh, groups, config)


def on_this_rank(rank: int, world: int, layout: World) -> tuple[int, dict[torch.dtype, list[SigmoidGradients]]]:
    mesh = start_mesh(ParallelConfig(tp=layout.tp, pp=layout.pp))
    answers = {}
    for dtype in TOLERANCE:
        own = slots_of(mesh.dp_rank, layout.counts[mesh.dp_rank], layout.absent, dtype)
        answers[dtype] = [loss_of(own, *scalars(dtype), mesh, config) for config in configs_of(layout)]
    return mesh.dp_rank, answers


@pytest.mark.parametrize("layout", WORLDS, ids=str)
def test_equals_the_full_matrix(pool: Pool, layout: World) -> None:
    answers = dict(pool.run(on_this_rank, layout.size, (layout,)))  # one of each model replica
    for (dtype, tolerance), number in product(TOLERANCE.items(), range(len(configs_of(layout)))):
        everyone = [slots_of(rank, count, layout.absent, dtype) for rank, count in enumerate(layout.counts)]
        expected = reference_of(everyone, configs_of(layout)[number].leave_out)
        parts = [answers[rank][dtype][number] for rank in range(len(everyone))]
        actual = {
            "loss": sum((part.loss for part in parts), torch.zeros(())),
            "image": torch.cat([part.image for part in parts]),
            "text": torch.cat([part.text for part in parts]),
            "log_t": sum((part.log_t for part in parts), torch.zeros(1)),
            "bias": sum((part.bias for part in parts), torch.zeros(1)),
        }
        for name, value in actual.items():
            reference = getattr(expected, name)
            assert value.dtype == dtype
            atol = tolerance * max(1.0, float(reference.abs().max()))
            torch.testing.assert_close(
                value.double(), reference, rtol=0.0, atol=atol, msg=lambda m, n=name, c=CONFIGS[number]: f"{n} {c}: {m}"
            )


def test_a_step_leaves_the_gradients_of_the_full_matrix(pool: Pool) -> None:
    for num_micro, (loss, expected, grads, references) in pool.run(steps_against_autograd, 1, timeout_s=100.0)[
        0
    ].items():
        assert loss == pytest.approx(expected, rel=1e-6)
        assert grads.keys() == references.keys()
        for name, reference in references.items():
            atol = 1e-6 * max(1.0, float(reference.abs().max()))
            torch.testing.assert_close(
                grads[name], reference, rtol=1e-5, atol=atol, msg=lambda m, n=name, k=num_micro: f"{n} of {k}: {m}"
            )


def steps_against_autograd(
    rank: int, world: int
) -> dict[int, tuple[float, float, dict[str, Tensor], dict[str, Tensor]]]:
    """By number of microbatches: a step's loss and gradients, and those of one autograd graph over all of them."""
    case = Case(stage="contrast", num_micro=8)
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    assert isinstance(engine.model, ContrastModel)
    all_micro = micro_of(case, mesh)
    return {k: step_against_autograd(engine.model, objective, all_micro[:k], engine.schedule) for k in range(1, 9)}


def step_against_autograd(
    model: ContrastModel, objective: Contrast, micro: Sequence[Batch], schedule: Schedule
) -> tuple[float, float, dict[str, Tensor], dict[str, Tensor]]:
    loss = float(objective.train(model.train(), micro, schedule)["loss"])
    grads = taken_gradients(model)
    everyone = [
        Slots(
            model.embed_image(model.pool_image(model.vision(one.images), one)),
            model.embed_text(model.text(one.text, one.images.key)),
            Pairs(one.text.caption_id, one.text.concept_id, one.images.weight * one.text.weight),
        )
        for one in micro
    ]
    expected = full_matrix(everyone, model.log_t, model.bias)
    expected.backward()
    return loss, float(expected), grads, taken_gradients(model)


def step_with_locked_towers(rank: int, world: int, case: Case) -> list[dict[str, Tensor]]:
    """The gradients of a step with no tower locked, with the vision tower and with both."""
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    assert isinstance(engine.model, ContrastModel) and isinstance(objective, Contrast)
    steps = []
    for locked in ((), ("vision",), ("vision", "text")):
        replace(objective, locked=locked).train(engine.model, micro_of(case, mesh), engine.schedule)
        steps.append(taken_gradients(engine.model))
    return steps


@pytest.mark.parametrize("case", [Case(stage="contrast", num_micro=1), Case(world=4, pp=2, stage="contrast")], ids=str)
def test_a_locked_tower_gets_no_gradient_and_changes_no_other(pool: Pool, case: Case) -> None:
    for free, *locked_steps in pool.run(step_with_locked_towers, case.world, (case,)):
        for towers, step in zip((("vision.",), ("vision.", "text.")), locked_steps, strict=True):
            assert step.keys() == {name for name in free if not name.startswith(towers)}
            for name, gradient in step.items():
                torch.testing.assert_close(gradient, free[name], rtol=1e-5, atol=1e-6, msg=name)


def taken_gradients(model: ContrastModel) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def compare(mesh: Mesh, own: Slots, log_t: float = 1.3, **config: Any) -> SigmoidGradients:
    return loss_of(own, torch.tensor([log_t]), torch.tensor([-1.7]), mesh, ContrastConfig(**config))


def largest_tensor(rank: int, world: int, config: ContrastConfig) -> int:
    mesh = start_mesh(ParallelConfig())
    own = slots_of(rank, 100, 0, torch.float32)
    with LargestTensor() as largest:
        loss_of(own, *scalars(torch.float32), mesh, replace(config, chunk_pairs=41))
    return largest.elements


# A group's texts end to end: 200 of 8 numbers are as many as the logits of a block, so the block is a little larger.
@pytest.mark.parametrize("config", [ring(1), ring(2)], ids=["ring", "group"])
def test_no_rank_holds_more_than_chunk_by_chunk_logits(pool: Pool, config: ContrastConfig) -> None:
    assert max(pool.run(largest_tensor, 2, (config,))) == 41 * 41


def peak_bytes(rank: int, world: int, absent: int, config: ContrastConfig) -> int:
    """What the loss holds at its peak above its inputs, in bytes; its blocks are a fifth of a copy."""
    mesh, slots, chunk = start_mesh(ParallelConfig()), PAIRS + absent, 40
    g = torch.Generator().manual_seed(rank)
    image, text = (torch.randn(slots, WIDTH, generator=g) for _ in range(2))
    weight = torch.ones(slots).index_fill_(0, torch.randperm(slots, generator=g)[:absent], 0.0)
    number = torch.arange(slots) + 10_000 * rank
    with PeakBytes() as peak:
        own = Slots(image, text, Pairs(number, number, weight))
        loss_of(own, *scalars(torch.float32), mesh, replace(config, chunk_pairs=chunk))
    return peak.bytes


# Copies of one side's embeddings that a rank holds: the two gradients; where slots are absent, what is there of both
# sides (and then the gradients in their slots). A visit of another rank's texts is two more: they and their gradient,
# then that and the gradient that comes home. A group of two holds both ranks' texts and their gradients
# until the gradient of its own comes back.
PAIRS, WIDTH = 640, 200
COPIES = {(1, 1): 2, (1, 2): 2 + 2, (2, 2): 2 + 3}


@pytest.mark.parametrize("absent", [0, 100])
@pytest.mark.parametrize(("group", "ranks"), COPIES)
def test_memory_grows_with_the_pairs_and_absent_ones_cost_a_copy_of_both_sides(
    pool: Pool, group: int, ranks: int, absent: int
) -> None:
    copy = (PAIRS + absent) * WIDTH * 4
    copies = COPIES[group, ranks] + (2 if absent else 0)
    for peak in pool.run(peak_bytes, ranks, (absent, ring(group))):
        assert copies - 1.5 < peak / copy < copies + 0.5


def degenerate(rank: int, world: int) -> dict[str, SigmoidGradients]:
    mesh, own = start_mesh(ParallelConfig()), slots_of(0, 6, 1, torch.float32)
    one_caption = replace(own, pairs=replace(own.pairs, caption_id=torch.zeros(7, dtype=torch.int64)))
    aligned = replace(one_caption, text=own.image)  # no negatives: only a higher temperature is better
    nobody = replace(own, pairs=replace(own.pairs, weight=torch.zeros(7)))
    return {
        "one caption": compare(mesh, one_caption),
        "nobody": compare(mesh, nobody),
        "hot": compare(mesh, own, log_t=200.0),
        "limited": compare(mesh, own, log_t=200.0, max_temperature=50.0),
        "at 50": compare(mesh, own, log_t=math.log(50.0)),
        "aligned": compare(mesh, aligned),
        "aligned at the limit": compare(mesh, aligned, max_temperature=math.exp(1.2)),
        "cold": compare(mesh, own, log_t=-300.0),
    }


def test_degenerate_batches_and_temperatures_give_finite_numbers(pool: Pool) -> None:
    answers = pool.run(degenerate, 1)[0]
    for name, answer in answers.items():
        values = (answer.loss, answer.image, answer.text, answer.log_t, answer.bias)
        assert all(bool(value.isfinite().all()) for value in values), name
    own = slots_of(0, 6, 1, torch.float32)
    positives = ((own.image * own.text).sum(1) * math.exp(1.3) - 1.7)[own.pairs.weight > 0]
    # Equal captions are no negatives, so the positives are all there is.
    torch.testing.assert_close(answers["one caption"].loss, -F.logsigmoid(positives).mean())
    assert answers["nobody"].loss == 0.0 and not answers["nobody"].image.any()
    # Above its limit a temperature counts as the limit, and what would raise it further is dropped.
    torch.testing.assert_close(answers["limited"].loss, answers["at 50"].loss)
    assert answers["aligned"].log_t < 0.0 and answers["aligned at the limit"].log_t == 0.0


def nobody(rank: int, world: int) -> list[SigmoidGradients]:
    mesh, own = start_mesh(ParallelConfig()), slots_of(rank, 0, 3, torch.float32)
    return [compare(mesh, own, group_ranks=ranks) for ranks in (1, 2)]


def test_ranks_that_all_come_without_a_pair(pool: Pool) -> None:
    for answer in (one for answers in pool.run(nobody, 2) for one in answers):
        assert answer.loss == 0.0 and not any(x.any() for x in (answer.image, answer.text, answer.log_t, answer.bias))


def step_with_a_nan_on_the_last_rank(rank: int, world: int) -> tuple[str, bool]:
    case = Case(world=world, stage="contrast")
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    micro = list(micro_of(case, mesh))
    if rank == world - 1:
        images = micro[0].images
        micro[0] = replace(micro[0], images=replace(images, patches=images.patches.float() * math.nan))
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    with pytest.raises(NonFiniteStep) as failure:
        engine.step(objective, micro, 0)
    return str(failure.value), all(torch.equal(before[name], p) for name, p in engine.model.named_parameters())


def test_a_nan_on_one_rank_stops_every_rank_before_the_update(pool: Pool) -> None:
    for message, unchanged in pool.run(step_with_a_nan_on_the_last_rank, 2):
        assert "nothing was updated" in message and unchanged

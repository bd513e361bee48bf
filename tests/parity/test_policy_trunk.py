"""Stage 4 on Megatron's layers is the plain policy: loss, every gradient, the gap and what images are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cogvit.objective.reference
from cogvit import VisionLanguageModel
from cogvit.batch import Batch, PackedAnswers
from cogvit.config import ActivationConfig
from cogvit.errors import ConfigError
from cogvit.objective.blindness import with_other_images
from cogvit.objective.language import JointModel
from cogvit.objective.policy import Answers, Clipping, PolicyLoss, policy_loss
from cogvit.objective.reference import Earlier, Reference, check_room, free_bytes
from cogvit.objective.reinforce import Reinforce
from cogvit.parallel.convert import fill
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.gathered import trained_weights
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.training.engine import Engine
from tests.dist.runs import whole
from tests.packs import Shown, joint_batch
from tests.parity.test_language_trunk import ADAPTERS, LANGUAGES, VISION, Layout, plain_model, run_config
from tests.pool import Pool

SOURCES, TEMPERATURE, FAMILY, VERSION = ("digits", "counting", "reading"), 1.3, "llama", 5
SHOWN: tuple[Shown, ...] = ("mixed", "images", "mixed", "nothing")
AWAY = 1.02  # what a reference's weights are multiples of


def labels_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Places of a pack's labels, and whose they are."""
    row_R = batch.sequence.weight.nonzero().squeeze(1)
    return row_R, torch.searchsorted(batch.sequence.cu_seqlens[1:-1], row_R.to(torch.int32), right=True)


def logprobs(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """Of the labels that count, [R]."""
    row_R, _ = labels_of(batch)
    hidden = model.forward_packed(batch.images, batch.sequence)[row_R]
    logits = model.language.logits(hidden) / TEMPERATURE
    return -F.cross_entropy(logits, batch.sequence.labels[row_R], reduction="none")


def answered(batch: Batch, seed: int) -> Batch:
    """A pack whose samples are answers, some of them of older weights, of the last source none."""
    g = torch.Generator().manual_seed(seed)
    row_R, answer_R = labels_of(batch)
    size, slots = len(batch.sequence.ids), len(batch.sequence.cu_seqlens) - 2
    with torch.no_grad():
        own_R, before_R = (logprobs(model, batch) for model in (plain_model(FAMILY), away_model()))
    age, logprob = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
    age[row_R] = answer_R % 3
    noise_R = torch.randn(len(row_R), generator=g) * 0.3  # of weights that nobody has kept
    logprob[row_R] = own_R.where(age[row_R] == 0, before_R.where(age[row_R] == 1, own_R + noise_R))
    there = batch.sequence.cu_seqlens.diff()[:-1] > 0
    source = torch.where(there, torch.arange(slots) % 2, -1)
    answers = PackedAnswers(logprob, age, torch.randn(slots, generator=g), source, VERSION)
    return replace(batch, answers=answers)


@dataclass(frozen=True)
class Found:
    """What a step gave beside the plain model's, on rank 0."""

    terms: dict[str, float]
    evaluated: dict[str, float]
    expected: dict[str, float]
    gradients: dict[str, Tensor]
    expected_gradients: dict[str, Tensor]
    weights_differ: list[str]  # names of gathered weights that are not the plain model's to the bit
    wrong_gap: float  # where what the weights before said is a hundredth off


def away_model() -> VisionLanguageModel:
    """The plain model with weights that are some way off."""
    away = plain_model(FAMILY)
    with torch.no_grad():
        for parameter in away.parameters():
            parameter.mul_(AWAY)
    return away


def start(layout: Layout, mesh: Mesh) -> tuple[Engine, JointModel, Reference, Earlier]:
    """The engine with the plain model's weights; a reference and the version before are some way off."""
    config = run_config(layout)
    vision = VisionStage(VISION, mesh, config.parallel, ActivationConfig(), num_tokens=96, num_slots=8)
    language = LanguageStage(LANGUAGES[FAMILY], mesh, config.parallel, ActivationConfig(), num_tokens=96)
    model = JointModel(vision, ADAPTERS[FAMILY], language)
    weights = {name: x.detach() for name, x in plain_model(FAMILY).named_parameters()}
    fill(model.to(mesh.device), mesh, lambda name, shape: weights[name] * AWAY)
    reference, earlier = Reference(model), Earlier(model, 1)
    earlier.keep(VERSION - 1)
    fill(model, mesh, lambda name, shape: weights[name])
    return Engine(model, config, mesh), model, reference, earlier


def plain_terms(
    model: VisionLanguageModel, batches: Sequence[Batch], first: Sequence[Batch], clipping: Clipping
) -> tuple[Tensor, dict[str, float]]:
    """The loss with its graph, and what else a step says."""
    away = away_model()
    count = sum(int((batch.answers.source >= 0).sum()) for batch in batches)
    losses, sums, gap = [], {"clipped": 0.0, "ratio": 0.0, "kl": 0.0}, 0.0
    for batch in batches:
        row_R, answer_R = labels_of(batch)
        found_R, old_R = logprobs(model, batch), batch.answers.logprob[row_R]
        with torch.no_grad():
            reference_R = logprobs(away, batch)
        loss, report = policy_loss(found_R, Answers(answer_R, old_R, batch.answers.advantage, reference_R), clipping)
        losses.append(loss)
        sums = {name: value + float(report.get(name, 0.0)) for name, value in sums.items()}
        apart = (found_R - old_R).abs()[batch.answers.age[row_R] == 0].detach()
        gap = max([gap, *apart.tolist()])
    cost, tokens = torch.zeros(len(SOURCES)), torch.zeros(len(SOURCES))
    for batch in first:
        _, answer_R = labels_of(batch)
        with torch.no_grad():
            effect_R = logprobs(model, batch) - logprobs(model, with_other_images(batch, 2))
        cost.index_add_(0, batch.answers.source[answer_R], effect_R)
        tokens.index_add_(0, batch.answers.source[answer_R], torch.ones_like(effect_R))
    effects = {f"image_effect_{name}": x for name, x in zip(SOURCES, (cost / tokens).tolist(), strict=True)}
    asked = torch.cat([batch.answers.source for batch in first])  # each answers a question of its own
    effects |= {f"other_images_{name}": float((asked == number).sum()) for number, name in enumerate(SOURCES)}
    loss = torch.stack(losses).sum() / count
    means = {name: value / count for name, value in sums.items()}
    return loss, {"loss": float(loss.detach()), **means, **effects, "logprob_gap": gap}


def both_ways(rank: int, world: int, layout: Layout, kind: PolicyLoss) -> Found:
    """A step on this layout and of the plain model."""
    mesh = start_mesh(run_config(layout).parallel)
    clipping = Clipping(kind, low=0.05, high=0.1, kl_weight=0.2)
    batches = [answered(joint_batch(seed, shown, by_place=False), seed) for seed, shown in enumerate(SHOWN)]
    share = len(batches) // mesh.dp_size
    micro = batches[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
    engine, model, reference, earlier = start(layout, mesh)
    objective = Reinforce(clipping, SOURCES, TEMPERATURE, 2, reference, earlier)
    lied = replace(micro[0].answers, logprob=micro[0].answers.logprob + (micro[0].answers.age == 1) * 0.01)
    wrong = engine.evaluate(objective, [replace(micro[0], answers=lied), *micro[1:]])["logprob_gap"]
    evaluated = engine.evaluate(objective, micro)
    gradients = whole(engine.plain_gradients(objective, micro), mesh)
    weights = trained_weights(model, mesh)
    terms = engine.step(objective, micro, 0).terms
    plain = plain_model(FAMILY)
    names = {name for name, _ in plain.named_parameters()}
    differ = [name for name, x in plain.named_parameters() if mesh.is_writer and not torch.equal(x, weights[name])]
    assert not mesh.is_writer or weights.keys() == names
    loss, expected = plain_terms(plain, batches, batches[::share], clipping)
    loss.backward()
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in plain.named_parameters()}
    return Found(terms, evaluated, expected, gradients, wanted, differ, wrong)


def refusal_of_a_small_machine(rank: int, world: int, memory: str) -> str:
    mesh = start_mesh(run_config(Layout()).parallel)
    cogvit.objective.reference._MEMORY = Path(memory)
    try:
        check_room(torch.nn.Linear(250, 1000, bias=False), mesh, copies=2)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "folder", "limit", "taken", "idle"),
    [
        ("0::", "", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_limit_of_a_job_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, folder: str, limit: str, taken: str, idle: str
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 3000 kB\n")
    for name, path in (("_MEMORY", "meminfo"), ("_OWN_GROUPS", "own"), ("_GROUPS", "groups")):
        monkeypatch.setattr(cogvit.objective.reference, name, tmp_path / path)
    assert free_bytes() == 3000 * 1024
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{kind}/slurm/job_7/task\n")
    job = tmp_path / "groups" / folder / "slurm" / "job_7"
    job.mkdir(parents=True)
    (job / limit).write_text("900000\n")
    (job / taken).write_text("500000\n")
    (job / "memory.stat").write_text(f"anon 1\n{idle} 100000\n")
    assert free_bytes() == 500000
    (job / limit).write_text("max\n")
    assert free_bytes() == 3000 * 1024


def test_a_reference_that_does_not_fit_is_refused(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 3000 kB\n")
    for told in pool.run(refusal_of_a_small_machine, 2, (str(tmp_path / "meminfo"),)):
        assert "take 0.004 GB on" in told and "0.00307 GB free" in told and "--rl.kl-weight 0" in told
    (tmp_path / "meminfo").write_text("MemAvailable: 4000 kB\n")
    assert pool.run(refusal_of_a_small_machine, 2, (str(tmp_path / "meminfo"),)) == ["", ""]


LAYOUTS = [
    pytest.param(Layout(), marks=pytest.mark.long),
    pytest.param(Layout(tp=2, sequence=True), marks=pytest.mark.long),
    pytest.param(Layout(pp=2), marks=pytest.mark.long),
    Layout(dp=2, zero=2),
    Layout(tp=2, pp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_is_that_of_the_plain_policy(pool: Pool, layout: Layout) -> None:
    kind: PolicyLoss = "gspo" if layout.pp > 1 else "grpo"
    found = pool.run(both_ways, layout.tp * layout.pp * layout.dp, (layout, kind), timeout_s=150.0)[0]
    assert found.terms["logprob_gap"] <= 1e-5 and found.evaluated["logprob_gap"] <= 1e-5
    assert found.wrong_gap == pytest.approx(0.01, abs=1e-5)
    assert not found.weights_differ
    assert found.terms.keys() == found.evaluated.keys() == found.expected.keys()
    for name, value in found.expected.items():
        if name != "logprob_gap":
            assert found.terms[name] == pytest.approx(value, rel=1e-4, abs=2e-6, nan_ok=True), name
            assert found.evaluated[name] == pytest.approx(value, rel=1e-4, abs=2e-6, nan_ok=True), name
    assert 0.0 < found.terms["clipped"] < 1.0 and found.terms["kl"] > 1e-5
    assert abs(found.terms["image_effect_digits"]) > 1e-4
    for name, gradient in found.expected_gradients.items():
        error = (found.gradients[name] - gradient).norm()
        noise = 1e-6 if name.endswith(("k_norm.bias", "qkv.bias")) else 0.0
        assert error <= 2e-5 * gradient.norm() + noise, f"{name}: {error / gradient.norm():.1e}"

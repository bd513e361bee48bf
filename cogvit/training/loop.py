"""The training loop: take a global batch, step, record, and save when it is due or somebody asked to leave."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.batch import Batch, PackedSequence, SharpImages, StepBatch, move, pad_step
from cogvit.errors import AskedToLeave, CogViTError, TeacherUnavailable
from cogvit.parallel.mesh import Mesh
from cogvit.training.checkpoint import Checkpoints
from cogvit.training.chrono import Chrono
from cogvit.training.engine import Engine, StepReport
from cogvit.training.meter import Meter
from cogvit.training.objective import Objective
from cogvit.training.signals import StopRequest
from cogvit.training.spikes import SpikeLog
from cogvit.training.state import TrainState
from cogvit.training.watchdog import Watchdog

# A collective gives up this much after the watchdog, so that every rank's stacks are written before a peer is gone.
_STACKS_FIRST_S = 30.0


# What makes a step's packs complete once they are on the device; collective over the ranks of a replica.
Deliver = Callable[[Sequence[Batch]], tuple[Batch, ...]]


@dataclass(frozen=True)
class Workload:
    """What a global batch held, over all dp ranks."""

    images: int
    tokens: int  # valid patch tokens, or those of the language model where there is one
    slots: int  # likewise, padding included
    failed: int  # images that were planned and did not decode
    cut_captions: int  # longer than text.max_tokens, or language.max_tokens
    downsized: int  # images with more patches than their budget
    dropped: int  # images whose place in a conversation was cut off


# What to say of a step's figures; nothing where all is well.
Concern = Callable[[int, dict[str, float]], str]


@dataclass(frozen=True)
class Evaluation:
    """Evaluation during training: held-out global batches, made anew for each pass."""

    every_steps: int
    steps: int
    batches: Callable[[], Generator[StepBatch]]
    last: int  # step of the run, which an evaluation follows too
    concern: Concern

    def due(self, step: int) -> bool:
        """Whether a step is followed by an evaluation."""
        return self.every_steps > 0 and (step % self.every_steps == 0 or step == self.last)


# Looks at a step's figures, the same on every rank. Errors: PolicyFault when the run must stop.
Guard = Callable[[int, dict[str, float]], None]


def train(
    engine: Engine,
    objective: Objective,
    batches: Iterable[StepBatch],
    state: TrainState,
    *,
    deliver: Deliver = tuple,
    steps: int,
    checkpoints: Checkpoints,
    evaluation: Evaluation,
    meter: Meter,
    stop: StopRequest,
    watchdog: Watchdog,
    spikes: SpikeLog,
    guard: Guard = lambda step, values: None,
) -> TrainState:
    """Train until `steps` or until the ranks agree to stop; the returned state is saved once a step was done.

    Errors: NonFiniteStep, DataError and PolicyFault pass through, and the last checkpoint stays as it is;
    TeacherUnavailable too, after a save. CheckpointError when the last save could not be written.
    """
    mesh, first_step = engine.mesh, state.step
    source = iter(batches)
    try:
        while state.step < steps:
            state, values, report = advance(engine, objective, source, state, deliver)
            watchdog.feed()
            try:
                if evaluation.due(state.step):
                    start_s = time.perf_counter()
                    losses = evaluate(engine, objective, evaluation, watchdog, values, deliver)
                    spent = Chrono(evaluation_s=time.perf_counter() - start_s)
                    state = state.with_evaluation(losses["eval_loss"]).spending(spent)
                    values |= losses
            finally:  # the step is done, and saved below when teachers fail, whatever becomes of its evaluation
                meter.record(state.step, values)
            guard(state.step, values)
            if mesh.is_writer:
                tell_trouble(report, spikes, evaluation.concern, state.step, values)
            leaving = stop.agreed(mesh.agree_max)
            if leaving or checkpoints.due(state.step) or evaluation.due(state.step) or state.step == steps:
                start_s = time.perf_counter()
                watchdog.rest()  # a slow disk has a deadline of its own, hours away
                checkpoints.save(state, engine)
                state = state.spending(Chrono(checkpoint_s=time.perf_counter() - start_s))
            if leaving:
                break
            if state.step == first_step + 1 and watchdog.timeout_s > 0:
                mesh.shorten_timeouts(watchdog.timeout_s + _STACKS_FIRST_S)
            watchdog.feed()
    except (AskedToLeave, TeacherUnavailable) as error:
        watchdog.rest()
        if state.step:  # before the first there is nothing to keep, and the directory stays free
            checkpoints.save(state, engine)
            checkpoints.finish()
        if isinstance(error, TeacherUnavailable):
            raise
    watchdog.rest()
    checkpoints.finish()
    return state


def advance(
    engine: Engine,
    objective: Objective,
    source: Iterator[StepBatch],
    state: TrainState,
    deliver: Deliver = tuple,
) -> tuple[TrainState, dict[str, float], StepReport]:
    """Train on the next global batch; returns the state after it, its metrics, and the engine's report."""
    start_s = time.perf_counter()
    batch = take(source, engine.mesh, deliver)
    data_s = time.perf_counter() - start_s
    report = engine.step(objective, batch.micro, state.step, counted(batch, engine.mesh))
    work = Workload(*map(int, report.beside))
    seconds = time.perf_counter() - start_s
    spent = Chrono(step_s=seconds - data_s, data_wait_s=data_s)
    skipped = bool(report.skipped)
    state = state.after(batch.position, images=work.images, tokens=work.tokens, spent=spent, skipped=skipped)
    return state, {**step_values(report, work, seconds=seconds, data_s=data_s), **batch.figures}, report


def tell_trouble(report: StepReport, spikes: SpikeLog, concern: Concern, step: int, values: dict[str, float]) -> None:
    """Print what somebody should look at: a step that was skipped, a loss that stands out, what a stage has to say."""
    trouble = f"skipped {report.skipped}" if report.skipped else spikes.record(step, values)
    for line in (trouble, concern(step, values)):
        if line:
            print(line, file=sys.stderr, flush=True)


def take(source: Iterator[StepBatch], mesh: Mesh, deliver: Deliver = tuple) -> StepBatch:
    """Return the next global batch, on the device, with as many packs on every rank as the fullest needs.

    When one rank's data or teachers fail, all ranks raise and none waits for it. Errors: StopIteration at the end.
    """
    batch, failure = None, None
    try:
        batch = next(source)
    except CogViTError as error:
        failure = error
    failed, num_packs = mesh.agree_all(int(batch is None), 0 if batch is None else len(batch.micro))
    if failed:
        mesh.raise_together(failure)
    assert batch is not None
    batch = pad_step(batch, num_packs)
    return replace(batch, micro=deliver(put_together([move(one, mesh.device) for one in batch.micro], mesh)))


def put_together(micro: Sequence[Batch], mesh: Mesh) -> tuple[Batch, ...]:
    """Return the packs of a replica, of which each rank has decoded a part: patches on the first stage, weights on all.

    What a rank did not decode is zeros with weight 1, so the largest bytes and the smallest weights are those of all.
    """
    if mesh.tp_size * mesh.pp_size == 1:
        return tuple(micro)
    patches = [batch.images.patches for batch in micro]
    if mesh.is_first_stage and mesh.tp_size > 1:
        patches_kTE = torch.stack(patches)
        dist.all_reduce(patches_kTE, dist.ReduceOp.MAX, group=mesh.tp_group)
        patches = list(patches_kTE)
    weight_kN = torch.stack([batch.images.weight for batch in micro])
    dist.all_reduce(weight_kN, dist.ReduceOp.MIN, group=mesh.model_group)
    sequences = _sequences_together([batch.sequence for batch in micro], mesh)
    whole = []
    for batch, patches_TE, weight_N, sequence in zip(micro, patches, weight_kN, sequences, strict=True):
        text = None if batch.text is None else replace(batch.text, weight=weight_N)
        images = replace(batch.images, patches=patches_TE, weight=weight_N)
        sharp = _sharp_together(batch.sharp, mesh)
        whole.append(replace(batch, images=images, text=text, sequence=sequence, sharp=sharp))
    return tuple(whole)


def _sharp_together(sharp: SharpImages | None, mesh: Mesh) -> SharpImages | None:
    if sharp is None or not mesh.is_first_stage or mesh.tp_size == 1:
        return sharp
    patches = sharp.patches.clone()
    if len(patches):
        dist.all_reduce(patches, dist.ReduceOp.MAX, group=mesh.tp_group)
    return replace(sharp, patches=patches)


def _sequences_together(sequences: Sequence[PackedSequence | None], mesh: Mesh) -> Sequence[PackedSequence | None]:
    """Return the sequences of a replica: a sample with an image that some rank could not decode teaches nothing."""
    found = [sequence for sequence in sequences if sequence is not None]
    if not found:
        return sequences
    weight_kS = torch.stack([sequence.weight for sequence in found])
    dist.all_reduce(weight_kS, dist.ReduceOp.MIN, group=mesh.model_group)
    weights = [
        [weight_S, *(() if sequence.ahead is None else sequence.ahead.weights_where(weight_S))]
        for sequence, weight_S in zip(found, weight_kS, strict=True)
    ]
    # One wait for the device instead of one a pass.
    counts = torch.stack([torch.stack([(weight > 0).sum() for weight in own]) for own in weights]).tolist()
    whole = []
    for sequence, (weight_S, *ahead_S), (labels, *ahead_counts) in zip(found, weights, counts, strict=True):
        ahead = sequence.ahead
        if ahead is not None:
            ahead = replace(ahead, weight=torch.stack(ahead_S), counts=tuple(ahead_counts))
        host = None if sequence.host is None else replace(sequence.host, labels=labels)
        whole.append(replace(sequence, weight=weight_S, host=host, ahead=ahead))
    return whole


def evaluate(
    engine: Engine,
    objective: Objective,
    evaluation: Evaluation,
    watchdog: Watchdog,
    trained: Container[str],
    deliver: Deliver = tuple,
) -> dict[str, float]:
    """Return the mean loss terms over the held-out batches, named eval_* where a step has a term of that name."""
    sums: dict[str, float] = {}
    with closing(evaluation.batches()) as source:
        for _ in range(evaluation.steps):
            batch = take(source, engine.mesh, deliver)
            watchdog.feed()
            for name, value in engine.evaluate(objective, batch.micro).items():
                sums[name] = sums.get(name, 0.0) + value
    return {f"eval_{name}" if name in trained else name: value / evaluation.steps for name, value in sums.items()}


def counted(step: StepBatch, mesh: Mesh) -> Tensor:
    """Count a step's work over the dp ranks: the fields of `Workload` [7], float64 on the device."""
    packs = [batch.images for batch in step.micro]
    read = [batch.sequence or batch.images for batch in step.micro]  # what the larger part of the model reads
    planned = sum(sample is not None for batch in step.micro for sample in batch.samples)
    valid = torch.stack([images.weight.sum() for images in packs]).sum()
    tokens = torch.stack([pack.cu_seqlens[-2] for pack in read]).sum()
    slots = sum(len(pack.ids) if isinstance(pack, PackedSequence) else pack.num_tokens for pack in read)
    counted = (slots, planned, step.cut_captions, step.downsized, step.dropped)
    known = [torch.full_like(valid, count) for count in counted]
    counts = torch.stack([valid, tokens, known[0], known[1] - valid, *known[2:]]).to(torch.float64)
    dist.all_reduce(counts, group=mesh.dp_group)
    return counts


def step_values(report: StepReport, work: Workload, *, seconds: float, data_s: float) -> dict[str, float]:
    """Return one line of metrics.jsonl."""
    return {
        **report.terms,
        "grad_norm": report.grad_norm,
        **{f"grad_norm_{name}": norm for name, norm in report.grad_norms.items()},
        "lr": report.lr,
        **{f"lr_{name}": lr for name, lr in report.lrs.items()},
        "skipped": float(bool(report.skipped)),
        "images": float(work.images),
        "tokens": float(work.tokens),
        "valid_fraction": work.tokens / work.slots,
        "failed_images": float(work.failed),
        "cut_captions": float(work.cut_captions),
        "downsized_images": float(work.downsized),
        "dropped_images": float(work.dropped),
        "images_per_s": work.images / seconds,
        "tokens_per_s": work.tokens / seconds,
        "seconds": seconds,
        "data_s": data_s,
        "forward_backward_s": report.forward_backward_s,
        "reduction_s": report.reduction_s,
        "optimizer_s": report.optimizer_s,
    }

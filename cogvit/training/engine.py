"""One optimizer step: Megatron's schedule inside DeepSpeed's single reduction, then the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from cogvit.batch import Batch
from cogvit.config import RunConfig
from cogvit.errors import NonFiniteStep
from cogvit.model.cross import is_cross
from cogvit.model.expert import is_expert
from cogvit.parallel.convert import PlainTensor, Split, gather_plain, plain_tensors
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.rectangles import rectangles
from cogvit.parallel.schedule import Schedule
from cogvit.training import zero
from cogvit.training.blame import find_suspects
from cogvit.training.clock import StepClock
from cogvit.training.objective import Objective
from cogvit.training.optim import Module, lr_at, param_groups
from cogvit.training.orthogonal import QkvHeads
from cogvit.training.snapshot import Snapshot
from cogvit.training.storage import Part
from cogvit.training.zero import Fragment, whole_tensors


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    terms: dict[str, float]
    grad_norm: float
    grad_norms: dict[Module, float]
    lr: float
    lrs: dict[str, float]  # by module and kind, such as vision_muon
    skipped: str  # why nothing was updated; empty where it was
    forward_backward_s: float
    reduction_s: float  # of the gradients over dp, with the norms
    optimizer_s: float
    beside: tuple[float, ...] = ()  # what else left the device with the step's scalars


class Engine:
    """This rank's model stage with its ZeRO-sharded optimizer."""

    def __init__(self, model: nn.Module, config: RunConfig, mesh: Mesh) -> None:
        self.mesh, self.model = mesh, model
        self.skips_in_a_row = 0
        # What is frozen has no gradient, no moments and no part in what is stored.
        self.tensors = [tensor for tensor in plain_tensors(model) if tensor.parameter.requires_grad]
        self.optim, self.lr_schedule, self.guard = config.optim, config.schedule, config.guard
        self._named = {tensor.name: tensor.parameter for tensor in self.tensors}
        self.schedule = Schedule(mesh, config.precision)
        named = [(t.name, t.parameter, module_of(t.name)) for t in self.tensors]
        later: tuple[Module, ...] = ()
        if "language" in dict(model.named_children()):  # also on stages that have no layers of it
            grown: tuple[tuple[Module, bool], ...] = (
                ("expert", config.expert.every > 0),
                ("cross", config.cross.image_size > 0),
            )
            later = ("adapter", "language", *(module for module, there in grown if there))
        groups = param_groups(named, config.optim, config.schedule, later=later)
        qkv_heads = {
            t.parameter: QkvHeads(t.num_heads // mesh.tp_size, t.num_kv_heads // mesh.tp_size)
            for t in self.tensors
            if t.split is Split.QKV
        }
        self.zero = zero.initialize(model, groups, qkv_heads, config, mesh.mpu, mesh.dp_size)
        self._snapshot = Snapshot(mesh.device)
        self._training = replace(self.schedule, early=self.zero.early)

    def step(self, objective: Objective, micro: Sequence[Batch], step: int, beside: Tensor | None = None) -> StepReport:
        """Train on one global batch with the rates of `step`.

        All scalars leave the device at once, between the reduction and the update, and with them `beside` [K].

        Where a loss or gradient is not finite, nothing is updated, on any rank. Errors: NonFiniteStep on every rank for
        such a step, or for one too many in a row where the guard lets them be skipped.
        """
        clock = StepClock(self.mesh.device)
        self.model.train()
        self.zero.set_lr(step)
        with self.zero.one_reduction():
            terms = objective.train(self.model, micro, self._training)
            clock.mark()
        clock.mark()
        values, others = self._scalars(terms, beside)
        forward_backward_s, reduction_s = clock.spans_s()
        report = StepReport(
            terms=values,
            grad_norm=self.zero.grad_norm(),
            grad_norms=self.zero.grad_norms_by_module(),
            lr=self.optim.lr * lr_at(self.lr_schedule, step),
            lrs=self.zero.lrs(),
            skipped="",
            forward_backward_s=forward_backward_s,
            reduction_s=reduction_s,
            optimizer_s=0.0,
            beside=others,
        )
        if not math.isfinite(values["loss"]) or self.zero.has_non_finite_gradient():
            return replace(report, skipped=self._skip(objective, micro, step, values["loss"]))
        self.skips_in_a_row = 0
        start_s = time.perf_counter()
        self.zero.step()
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()  # the next step begins with a message that would wait as long
        return replace(report, optimizer_s=time.perf_counter() - start_s)

    def _scalars(self, terms: dict[str, Tensor], beside: Tensor | None) -> tuple[dict[str, float], tuple[float, ...]]:
        """Read loss terms, what the reduction measured, and `beside`: one wait for the device."""
        parts = [torch.stack(list(terms.values())), self.zero.measured]
        parts += [] if beside is None else [beside]
        values = torch.cat([part.to(torch.float64) for part in parts]).tolist()
        measured = values[len(terms) : len(terms) + len(self.zero.measured)]
        self.zero.read(measured)
        return dict(zip(terms, values, strict=False)), tuple(values[len(terms) + len(measured) :])

    def _skip(self, objective: Objective, micro: Sequence[Batch], step: int, loss: float) -> str:
        """Give up the step's gradients and say who is to blame. Errors: NonFiniteStep where the guard wants it."""
        self.zero.drop_gradients()
        found = find_suspects(self.model, objective, micro, self.schedule, self.zero)
        who = "; ".join(map(str, found[:3])) or "no microbatch shows it when done again alone"
        message = f"step {step}: loss {loss} or a gradient is not finite; nothing was updated; {who}"
        self.skips_in_a_row += 1
        if self.guard.non_finite == "raise":
            raise NonFiniteStep(message)
        if self.skips_in_a_row > self.guard.max_skips:
            raise NonFiniteStep(f"{message}; guard.max_skips={self.guard.max_skips} steps in a row were skipped before")
        return message

    def evaluate(self, objective: Objective, micro: Sequence[Batch]) -> dict[str, float]:
        """Return the loss terms of one global batch without training on it."""
        self.model.eval()
        with torch.no_grad():
            terms = objective.evaluate(self.model, micro, self.schedule)
        return {name: float(term) for name, term in terms.items()}

    def plain_gradients(self, objective: Objective, micro: Sequence[Batch]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full plain gradient) of one global batch, before clipping; nothing is updated.

        Collective over the tp and dp ranks of a stage, which all see the same sequence.
        """
        self.model.train()
        with self.zero.one_reduction():
            objective.train(self.model, micro, self._training)
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for name, local in self.zero.full_gradients(self._named):
            yield name, gather_plain(by_name[name], local, self.mesh.tp_group)
        self.zero.drop_gradients()

    def snapshot(self) -> list[Fragment]:
        """Copy this rank's part of weights and moments to the CPU, perhaps over the one before; talks to no one."""
        return self._snapshot.take(self.zero.fragments(self._named))

    def plain_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("master/NAME" or "MOMENT/NAME", full plain tensor) of the state, one at a time; clone what is kept.

        Collective over the tp and dp ranks of a stage, which all see the same sequence.
        """
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for fragment, tensor in whole_tensors(self.zero.fragments(self._named), self.mesh.dp_group):
            plain = gather_plain(by_name[fragment.name], tensor, self.mesh.tp_group)
            yield f"{fragment.kind}/{fragment.name}", plain

    def parts_of(self, fragments: Iterable[Fragment]) -> Iterator[Part]:
        """Yield what this rank stores of a snapshot: where its fragments lie in the plain tensors; talks to no one.

        What all tensor ranks hold is dealt to them.
        """
        by_name = {tensor.name: tensor for tensor in self.tensors}
        tp_rank, tp_size = self.mesh.tp_rank, self.mesh.tp_size
        for index, fragment in enumerate(fragments):
            tensor = by_name[fragment.name]
            if tensor.split is Split.REPLICATED and index % tp_size != tp_rank:
                continue
            yield from _parts(tensor, fragment, fragment.values, self.mesh)

    def parts_here(self) -> Iterator[Part]:
        """Yield the rectangles that `load_fragments` will read, without memory for their values; talks to no one."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for fragment in self.zero.fragments(self._named):
            values = torch.empty_like(fragment.values, device="meta")
            yield from _parts(by_name[fragment.name], fragment, values, self.mesh)

    @torch.no_grad()
    def load_fragments(self, read: Callable[[Part], None]) -> None:
        """Set this rank's fragments of weights and moments; `read` fills a part. `zero.share_parameters` comes next."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for fragment in self.zero.fragments(self._named):
            values = torch.empty_like(fragment.values, device="cpu")
            for part in _parts(by_name[fragment.name], fragment, values, self.mesh):
                read(part)
            fragment.values.copy_(values)


def _parts(tensor: PlainTensor, fragment: Fragment, values: Tensor, mesh: Mesh) -> Iterator[Part]:
    """Yield the rectangles of a fragment with their share of its values."""
    key, shape = f"{fragment.kind}/{fragment.name}", tensor.plain_shape(mesh.tp_size)
    stop = fragment.start + values.numel()
    for start, offsets, sizes in rectangles(tensor, fragment.start, stop, mesh.tp_rank, mesh.tp_size):
        first = start - fragment.start
        yield Part(key, shape, offsets, values[first : first + prod(sizes)].view(sizes))


def module_of(name: str) -> Module:
    """Return the module whose rates a parameter has, from its plain name; tokens around images go with the adapter."""
    first = name.split(".")[0]
    if is_expert(name):
        return "expert"
    if first == "cross" or is_cross(name):
        return "cross"
    if first == "frame":
        return "adapter"
    if first in ("vision", "text", "adapter", "language"):
        return cast(Module, first)
    return "temperature" if first == "log_t" else "bias" if first == "bias" else "projection"

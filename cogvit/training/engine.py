"""One optimizer step: Megatron's schedule inside DeepSpeed's single reduction, then the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from cogvit.batch import Batch
from cogvit.config import RunConfig
from cogvit.errors import NonFiniteStep
from cogvit.parallel.convert import gather_plain, plain_tensors, to_local
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.schedule import Schedule
from cogvit.training import zero
from cogvit.training.optim import Module, param_groups


class Objective(Protocol):
    """What a stage trains: it runs the model's towers on the microbatches and leaves gradients behind."""

    def train(self, model: nn.Module, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the global loss terms; "loss" is the one that is minimized."""
        ...

    def evaluate(self, model: nn.Module, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the global loss terms without gradients."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    terms: dict[str, float]
    grad_norm: float
    grad_norms: dict[Module, float]
    lr: float
    forward_backward_s: float
    optimizer_s: float


class Engine:
    """This rank's model stage with its ZeRO-sharded optimizer."""

    def __init__(self, model: nn.Module, config: RunConfig, mesh: Mesh) -> None:
        self.mesh, self.model = mesh, model
        self.tensors = list(plain_tensors(model))
        self.peak_lr = config.optim.lr
        self.schedule = Schedule(mesh, config.precision)
        groups = param_groups([(t.name, t.parameter, module_of(t.name)) for t in self.tensors], config.optim)
        self.zero = zero.initialize(model, groups, config, mesh.mpu, mesh.dp_size)

    def step(self, objective: Objective, micro: Sequence[Batch], step: int) -> StepReport:
        """Train on one global batch with the rates of `step`.

        Errors: NonFiniteStep on every rank, before anything is updated, when a loss or gradient is not finite.
        """
        start_s = time.perf_counter()
        self.model.train()
        factor = self.zero.set_lr(step)
        with self.zero.one_reduction():
            terms = objective.train(self.model, micro, self.schedule)
        values = {name: float(term) for name, term in terms.items()}
        reduced_s = time.perf_counter()
        if not math.isfinite(values["loss"]) or self.zero.has_non_finite_gradient():
            raise NonFiniteStep(f"step {step}: loss {values['loss']} or a gradient is not finite; nothing was updated")
        self.zero.step()
        return StepReport(
            terms=values,
            grad_norm=self.zero.grad_norm(),
            grad_norms=self.zero.grad_norms_by_module(),
            lr=self.peak_lr * factor,
            forward_backward_s=reduced_s - start_s,
            optimizer_s=time.perf_counter() - reduced_s,
        )

    def evaluate(self, objective: Objective, micro: Sequence[Batch]) -> dict[str, float]:
        """Return the loss terms of one global batch without training on it."""
        self.model.eval()
        with torch.no_grad():
            terms = objective.evaluate(self.model, micro, self.schedule)
        return {name: float(term) for name, term in terms.items()}

    def plain_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("master/NAME" or "MOMENT/NAME", full plain tensor), one at a time.

        Collective over the tp and dp ranks of a stage, which all see the same sequence.
        """
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for name, kind, local in self.zero.full_tensors({t.name: t.parameter for t in self.tensors}):
            yield f"{kind}/{name}", gather_plain(by_name[name], local, self.mesh)

    def load_plain_state(self, read: Callable[[dict[str, tuple[int, ...]]], dict[str, Tensor]]) -> None:
        """Set weights and moments; `read` maps keys and full shapes to plain tensors, one kind at a time."""
        kinds = sorted({kind for tensor in self.tensors for kind in self.zero.kinds_of(tensor.parameter)})
        for kind in kinds:
            holders = {f"{kind}/{t.name}": t for t in self.tensors if kind in self.zero.kinds_of(t.parameter)}
            full = read({key: tensor.plain_shape(self.mesh.tp_size) for key, tensor in holders.items()})
            for key, tensor in holders.items():
                local = to_local(tensor, full[key], self.mesh.tp_rank, self.mesh.tp_size)
                self.zero.load_tensor(tensor.parameter, kind, local)


def module_of(name: str) -> Module:
    """Return the module whose rates a parameter has, from the first part of its plain name."""
    first = name.split(".")[0]
    if first in ("vision", "text"):
        return cast(Module, first)
    return "temperature" if first in ("log_t", "bias") else "projection"

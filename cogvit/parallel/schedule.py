"""Runs one tower over a step's microbatches through Megatron's pipeline schedule; one stage takes the same path."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from cogvit.parallel.early import EarlyGradients
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.stage import TrunkStage

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

Output = TypeVar("Output")


@dataclass(frozen=True)
class Schedule:
    """How a tower is run: the mesh it is split over and the compute precision.

    A tower without a trunk lies whole on the last stage, which runs it alone.
    """

    mesh: Mesh
    precision: str
    early: EarlyGradients | None = None  # who wants gradients before the last backward ends

    def forward_backward(
        self,
        trunk: TrunkStage | None,
        forward: Callable[[int], Any],
        num_micro: int,
        loss: Callable[[Any, int], tuple[Tensor, Any]],
    ) -> list[Any]:
        """Train one tower on every microbatch; gradients stay on the parameters of this rank.

        `forward(index)` runs the tower on a microbatch. `loss(output, index)` runs on the last stage and returns this
        rank's share of the global loss (a local sum over a global count) and what to report. Returns the reports on
        the last stage, an empty list elsewhere.
        """
        # The schedule divides by the microbatches and DeepSpeed averages over dp; the loss is a sum over both.
        scale = num_micro * self.mesh.dp_size

        def share(output: Any, index: int) -> tuple[Tensor, Any]:
            with self._autocast_off():
                value, report = loss(output, index)
            value = value * scale
            # With stages, the backwards of several microbatches are under way at once.
            if early is not None and index == num_micro - 1:
                early.begin(value)
            return value, report

        early = self.early if self.mesh.pp_size == 1 else None
        reports = self._run(trunk, forward, num_micro, share, forward_only=False)
        if early is not None:
            early.end()
        return reports

    def forward_only(
        self,
        trunk: TrunkStage | None,
        forward: Callable[[int], Any],
        num_micro: int,
        collect: Callable[[Any, int], Output],
    ) -> list[Output]:
        """Run one tower without gradients; returns what `collect` made on the last stage, an empty list elsewhere."""
        with torch.no_grad():  # Megatron's forward_only runs no backward but would keep the activations for one
            return self._run(trunk, forward, num_micro, collect, forward_only=True)

    def _run(
        self,
        trunk: TrunkStage | None,
        forward: Callable[[int], Any],
        num_micro: int,
        last: Callable[[Any, int], Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        if trunk is None:
            return self._run_whole(forward, num_micro, last, forward_only=forward_only)

        def forward_step(indices: Any, model: TrunkStage) -> tuple[Any, Callable[..., Any]]:
            index = next(indices)
            with self.autocast():
                output = forward(index)

            def on_last_stage(result: Any, non_loss_data: bool = False) -> Any:
                return last(result, index)

            return output, on_last_stage

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(num_micro)),
            model=trunk,
            num_microbatches=num_micro,
            seq_length=trunk.num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _run_whole(
        self, forward: Callable[[int], Any], num_micro: int, last: Callable[[Any, int], Any], *, forward_only: bool
    ) -> list[Any]:
        """Do with a tower of one stage what Megatron's schedule does with a pipeline."""
        reports = []
        for index in range(num_micro if self.mesh.is_last_stage else 0):
            with self.autocast():
                output = forward(index)
            report = last(output, index)
            if not forward_only:
                value, report = report
                (value / num_micro).backward()
            reports.append(report)
        return reports

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which models run; losses are computed outside."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.mesh.device.type, torch.bfloat16)

    def _autocast_off(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.mesh.device.type, enabled=False)

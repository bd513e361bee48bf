"""DeepSpeed ZeRO behind one small class: the only file where its configuration keys and its internals are spelt.

Parameters are fp32 (bf16 is autocast around the model); gradients are summed over microbatches and reduced once.
Verified against deepspeed 0.19.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from cogvit.config import RunConfig
from cogvit.errors import NonFiniteStep
from cogvit.parallel.cpu import prepare_process
from cogvit.parallel.early import EarlyGradients
from cogvit.parallel.mesh import MegatronGroups
from cogvit.training.muon import MOMENTS, InnerOptimizer
from cogvit.training.optim import MASTER, Module, ParamGroup
from cogvit.training.orthogonal import QkvHeads
from cogvit.training.partition import MatrixSpan, Partition
from cogvit.training.reduction import FlatGroup, Reduction

prepare_process()
import deepspeed  # noqa: E402

_ROW = 1024  # elements


class StateTensor(NamedTuple):
    """One tensor of the training state: whole over dp, this rank's shard over tp."""

    name: str
    kind: str  # MASTER or a moment of cogvit.training.muon.MOMENTS
    tensor: Tensor


class Fragment(NamedTuple):
    """What one dp rank holds of a tensor of the training state: a stretch of it, flat, perhaps empty."""

    name: str
    kind: str
    shape: torch.Size  # of the whole
    start: int  # of the stretch
    values: Tensor


def whole_tensors(
    fragments: Iterable[Fragment], dp_group: dist.ProcessGroup, bucket_values: int = 1 << 22
) -> Iterator[tuple[Fragment, Tensor]]:
    """Put the tensors of the dp ranks' fragments together, a bucket at a time; collective over the dp ranks.

    Holds one bucket (16 MB, or one tensor that is larger), whose memory the yielded tensors share.
    """
    bucket: list[Fragment] = []
    for fragment in fragments:
        if bucket and sum(held.shape.numel() for held in [*bucket, fragment]) > bucket_values:
            yield from _whole(bucket, dp_group)
            bucket = []
        bucket.append(fragment)
    yield from _whole(bucket, dp_group)


def _whole(bucket: list[Fragment], dp_group: dist.ProcessGroup) -> Iterator[tuple[Fragment, Tensor]]:
    if not bucket:
        return
    sizes = [fragment.shape.numel() for fragment in bucket]
    flat = bucket[0].values.new_zeros(sum(sizes), dtype=torch.float32)
    parts = flat.split(sizes)
    for fragment, part in zip(bucket, parts, strict=True):
        part[fragment.start : fragment.start + fragment.values.numel()] = fragment.values
    dist.all_reduce(flat, group=dp_group)
    for fragment, part in zip(bucket, parts, strict=True):
        yield fragment, part.view(fragment.shape)


def deepspeed_config(config: RunConfig, dp_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run.

    The batch keys only have to agree with each other: microbatches are ours, so DeepSpeed sees one per step.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": dp_size,
        "gradient_clipping": 0.0,  # `ZeroEngine` measures and clips
        "zero_allow_untested_optimizer": True,  # InnerOptimizer
        "zero_optimization": {
            "stage": config.zero.stage,
            "compute_grad_norm": False,
            "allgather_bucket_size": config.zero.gather_bucket_elements,
        },
    }


class _Trainee(nn.Module):
    """What DeepSpeed is given: the model, and a placeholder parameter for each group that is empty on this stage.

    DeepSpeed runs collectives group by group, so every pipeline stage needs every group. A placeholder is 0, gets a
    gradient of 0 and so stays 0.
    """

    def __init__(self, model: nn.Module, num_placeholders: int) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.placeholders = nn.ParameterList(torch.zeros(1, device=device) for _ in range(num_placeholders))


def initialize(
    module: nn.Module,
    groups: list[ParamGroup],
    qkv_heads: Mapping[Parameter, QkvHeads],
    config: RunConfig,
    mpu: type[MegatronGroups],
    dp_size: int,
) -> ZeroEngine:
    """Partition the optimizer over dp and return the engine; `module` itself stays the one to run.

    groups: the list of `param_groups`, of one length and order on all ranks. qkv_heads: heads of this rank in its fused
    q, k, v matrices. Parameters are broadcast from dp rank 0, and each has at least one dim because DeepSpeed cannot
    broadcast a scalar.
    """
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist.get_backend())
    trainee = _Trainee(module, sum(not group.params for group in groups))
    placeholders = iter(trainee.placeholders)
    filled = [group if group.params else replace(group, params=(next(placeholders),)) for group in groups]
    inner = InnerOptimizer(filled, config.optim)
    engine, zero_optimizer, _, _ = deepspeed.initialize(
        model=trainee, optimizer=inner, config=deepspeed_config(config, dp_size), mpu=mpu, dist_init_required=False
    )
    tp_size = mpu.get_tensor_model_parallel_world_size()
    partitions = {
        flat: _partition(zero_optimizer, index, qkv_heads, tp_size)
        for index, flat in enumerate(_flat_params(zero_optimizer))
    }
    inner.bind_partitions(partitions, mpu.get_data_parallel_group(), mpu.get_tensor_model_parallel_group())
    zero_optimizer._lazy_init_hp_params_optimizer_state()
    return ZeroEngine(engine, inner, filled, config)


def _flat_params(zero_optimizer: Any) -> list[Tensor]:
    return zero_optimizer.single_partition_of_fp32_groups


def _partition(zero_optimizer: Any, index: int, qkv_heads: Mapping[Parameter, QkvHeads], tp_size: int) -> Partition:
    """Describe the slice of a group's flat buffer that this rank owns, and where the group's matrices lie in it."""
    params, starts = zero_optimizer.round_robin_bit16_groups[index], zero_optimizer.round_robin_bit16_offsets[index]
    size = _flat_params(zero_optimizer)[index].numel()
    matrices = tuple(
        MatrixSpan(
            start,
            tuple(param.shape),
            param.partition_dim if tp_size > 1 and _is_sharded(param) else None,
            qkv_heads.get(param),
        )
        for param, start in zip(params, starts, strict=True)
        if param.ndim == 2
    )
    return Partition(dist.get_rank(zero_optimizer.real_dp_process_group[index]) * size, size, matrices)


def _norm(flat: Tensor) -> Tensor:
    """Return a norm in fp64, 0-dim; short rows are summed in fp32, which a long sum of fp32 values would falsify."""
    whole = len(flat) // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:]).view(1)
    return torch.linalg.vector_norm(torch.cat([rows, rest]), dtype=torch.float64)


def _is_sharded(param: Tensor) -> bool:
    return getattr(param, "tensor_model_parallel", False)


class ZeroEngine:
    """One optimizer step: reduce, look at the gradients, update; and the state, parameter by parameter."""

    def __init__(self, engine: Any, inner: InnerOptimizer, groups: list[ParamGroup], config: RunConfig) -> None:
        self.inner = inner
        self._engine = engine
        self._zero = engine.optimizer
        self._groups = groups
        self._kinds = {param: (MASTER, *MOMENTS[group.kind]) for group in groups for param in group.params}
        self._flat = [
            FlatGroup.of(params, flat.numel())
            for params, flat in zip(self._zero.round_robin_bit16_groups, _flat_params(self._zero), strict=True)
        ]
        dtype = torch.bfloat16 if config.zero.gradient_messages == "bf16" else torch.float32
        ranks = self._zero.dp_process_group
        self._reduction = Reduction(self._flat, ranks, config.zero.reduce_bucket_elements, dtype)
        # One rank has nobody to send to.
        shared = config.zero.overlap and ranks.size() > 1
        self.early = EarlyGradients(engine.module.model.parameters(), self._reduction.send) if shared else None
        self._clip_norm = config.optim.clip_norm
        self.measured = torch.zeros(len(groups) + 1)  # of the last reduction: norm of each group; ranks that overflow
        self._known: list[float] | None = None  # the same on the host

    @contextmanager
    def one_reduction(self) -> Iterator[None]:
        """Collect gradients of any number of backward passes inside; average them over dp once, on leaving.

        Those that `early` was given before are on their way by then. A parameter that got no gradient on this rank
        takes part with zeros: a rank that skipped it would hang the others. A body that raises gives up its gradients
        and talks to no one any more.
        """
        self._reduction.forget()
        if self.early is not None:
            self.early.forget()
        with self._local():
            try:
                yield
            except BaseException:
                self._reduction.forget()
                self._zero.zero_grad()
                raise
        sent = set() if self.early is None else self.early.sent
        unsent = [param for group in self._flat for param in group.params if param not in sent]
        for param in unsent:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        slices = self._reduction.finish(unsent)
        self._zero.averaged_gradients.update((index, [flat]) for index, flat in enumerate(slices))
        self._measure_gradients()

    @contextmanager
    def _local(self) -> Iterator[None]:
        """Keep DeepSpeed from reducing gradients by itself."""
        self._zero._coalesce_grad_reduction = True
        try:
            yield
        finally:
            self._zero._coalesce_grad_reduction = False

    @contextmanager
    def local_gradients(self) -> Iterator[None]:
        """Keep the gradients of the passes inside on this rank and drop them on leaving; talks to no one."""
        with self._local():
            try:
                yield
            finally:
                self._zero.zero_grad()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Give up what the last reduction left, as if the step had not been taken."""
        self._zero.zero_grad()
        for index in self._zero.averaged_gradients:
            self._zero.averaged_gradients[index] = None

    def _measure_gradients(self) -> None:
        """Take every group's norm over all ranks, and whether any rank holds NaN or infinity; waits for no device."""
        found = [self._measure_group(index) for index in range(len(self._groups))]
        measured = torch.stack([*(square for square, _ in found), torch.stack([bad for _, bad in found]).sum()])
        dist.all_reduce(measured, group=self._zero.dp_process_group)
        self._zero._model_parallel_all_reduce(measured, op=dist.ReduceOp.SUM)
        self.measured = torch.cat([measured[:-1].pow(0.5), measured[-1:]])
        self._known = None

    def _measure_group(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the squared norm of this rank's part of a group, and 1 where it is not finite; both 0-dim fp32.

        A parameter that every tensor rank holds counts on one of them.
        """
        zero = self._zero
        (gradients,) = zero.averaged_gradients[index]
        norm = _norm(gradients)
        runs = [gradients]
        if zero.model_parallel_rank > 0:
            counted = groupby(self._held(index), lambda held: _is_sharded(held[0]))
            runs = [torch.cat([part for *_, part in parts]) for sharded, parts in counted if sharded]
        squares = [_norm(run).square() for run in runs]
        square = torch.stack(squares).sum() if squares else torch.zeros_like(norm)
        return square.float(), (~norm.isfinite()).float()

    def _held(self, index: int) -> list[tuple[Parameter, int, Tensor]]:
        """Return what this rank holds of a group's reduced gradients: parameter, first element of it, flat stretch."""
        group, (gradients,) = self._flat[index], self._zero.averaged_gradients[index]
        start = self._zero.dp_process_group.rank() * group.slice_size
        stretches = list(group.stretches(start, start + group.slice_size))
        sizes = [last - first for _, first, last in stretches]
        parts = gradients[: sum(sizes)].split(sizes)  # padding comes last
        return [(param, first, part) for (param, first, _), part in zip(stretches, parts, strict=True)]

    def read(self, values: list[float]) -> None:
        """Take `measured` as it left the device, so that nobody has to ask for it again."""
        self._known = values

    def _read(self) -> list[float]:
        if self._known is None:
            self._known = self.measured.tolist()
        return self._known

    def has_non_finite_gradient(self) -> bool:
        """Say, after the reduction and before the update, whether any rank's gradients are NaN or infinite.

        The answer is the same on every rank.
        """
        return self._read()[-1] > 0.0 or not math.isfinite(self.grad_norm())

    def grad_norm(self) -> float:
        """Return the global norm of the last reduced gradients, before clipping, over all parameters and ranks."""
        return math.hypot(*self._read()[:-1])

    def grad_norms_by_module(self) -> dict[Module, float]:
        """Return the norm of each module's part of the same gradients."""
        norms: dict[Module, float] = {}
        for group, norm in zip(self._groups, self._read()[:-1], strict=True):
            norms[group.module] = math.hypot(norms.get(group.module, 0.0), norm)
        return norms

    def set_lr(self, step: int) -> None:
        """Set the rates of the update with this index (from 0)."""
        self.inner.set_lr_step(step)

    def lrs(self) -> dict[str, float]:
        """Return the rates of the update under way, by module and kind."""
        return {
            f"{group.module}_{group.kind}": settings["lr"]
            for group, settings in zip(self._groups, self.inner.param_groups, strict=True)
        }

    def step(self) -> None:
        """Clip, update, and gather the parameters. Errors: NonFiniteStep, before anything is changed."""
        if self.has_non_finite_gradient():
            raise NonFiniteStep(f"the gradient norm is {self.grad_norm()}; nothing was updated")
        if self._clip_norm > 0.0:
            excess = (torch.linalg.vector_norm(self.measured[:-1]) + 1e-6) / self._clip_norm
            gradients = [flat for (flat,) in self._zero.averaged_gradients.values()]
            torch._foreach_mul_(gradients, 1.0 / excess.clamp(min=1.0))
        self._engine.step()

    def kinds_of(self, param: Parameter) -> tuple[str, ...]:
        """Return the kinds of state a parameter has: MASTER and its moments."""
        return self._kinds[param]

    def fragments(self, named: Mapping[str, Parameter]) -> Iterator[Fragment]:
        """Yield views of what this rank holds of each parameter's fp32 state; talks to no one."""
        for name, param in named.items():
            for kind in self._kinds[param]:
                mapping: Any = vars(param)["_hp_mapping"]  # None where the parameter lies in other ranks' partitions
                start = 0 if mapping is None else mapping.lp_fragment_address.start
                held = (
                    torch.empty(0, device=param.device)
                    if mapping is None
                    else mapping.get_hp_fragment(None if kind == MASTER else kind).detach()
                )
                yield Fragment(name, kind, param.shape, start, held)

    def full_tensors(self, named: Mapping[str, Parameter]) -> Iterator[StateTensor]:
        """Yield the fp32 state of each parameter in turn, whole over dp; holds one bucket of `whole_tensors` at a time.

        Collective over dp: every dp rank iterates to the end over the same names in the same order.
        """
        group = MegatronGroups.get_data_parallel_group()
        for fragment, tensor in whole_tensors(self.fragments(named), group):
            yield StateTensor(fragment.name, fragment.kind, tensor)

    def full_gradients(self, named: Mapping[str, Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's last reduced gradient before clipping, whole over dp; collective as `full_tensors`."""
        held = {param: (first, part) for index in range(len(self._flat)) for param, first, part in self._held(index)}
        fragments = (
            Fragment(name, "gradient", param.shape, *held.get(param, (0, param.new_empty(0))))
            for name, param in named.items()
        )
        for fragment, tensor in whole_tensors(fragments, MegatronGroups.get_data_parallel_group()):
            yield fragment.name, tensor

    @torch.no_grad()
    def share_parameters(self) -> None:
        """Set the module's parameters from the fp32 fragments of all dp ranks; collective over dp."""
        self._zero.update_lp_params()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters, which would keep them, and every group, to the process's end."""
        self._engine.destroy()

    def load_update_count(self, count: int) -> None:
        """Set how many updates the optimizer has made; with the tensors, this is its whole state."""
        for group in self.inner.param_groups:
            group["updates"] = count

"""What one step of a run costs on a layout: memory, time by what takes it, messages; the arithmetic of `tools.plan`.

Rates are a cluster's; what a block keeps and how many kernels it starts were counted on fake tensors (tests/fake_cuda).
Nothing here has met a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cogvit.config import ActivationConfig, ParallelConfig, RunConfig
from cogvit.stages.cost import Load, kept_bytes
from cogvit.training.partition import MatrixSpan, Partition
from configs.clusters import Cluster

_FP32_BYTES, _MOMENTS = 4, {"muon": 1, "adamw": 2, "sgd": 1}  # moments of most parameters
_MEMORY_ATTAINED = 0.85  # share of a memory's rate that a kernel which only moves data reaches
_ATTENTION_ATTAINED = 1 / 3  # of what products reach: forward and backward of varlen attention
_ATTENTION_BACKWARD, _PRODUCT_BACKWARD = 2.5, 2.0  # over a forward
# Bytes that pass through memory beside products and attention, for each token and channel of a block, and kernels,
# forward and backward: of fused pieces and of plain ones. Counted on fake tensors of cogvit_l.
MOVED_BYTES = {True: (85.0, 166.0), False: (430.0, 885.0)}
KERNELS = {True: (19, 37), False: (73, 147)}
_LAUNCH_S = 8e-6  # that the host needs for a kernel
_BUCKETS = 3  # gradients of a bucket in memory: filled, under way twice


@dataclass(frozen=True)
class Seconds:
    """Where a step's time goes, on the rank that works most."""

    products: float
    attention: float
    moved: float  # kernels that read and write memory
    loss: float
    muon: float
    bubble: float  # a pipeline stage waits
    messages: float  # that nothing overlaps

    @property
    def step(self) -> float:
        """All of it, one after the other."""
        return self.products + self.attention + self.moved + self.loss + self.muon + self.bubble + self.messages


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a step."""

    tensor: float  # of activations, to the ranks that share a layer
    pipeline: float  # to its neighbors
    gradients: float
    parameters: float
    muon: float
    loss: float  # captions and their gradients

    @property
    def all(self) -> float:
        """In a step."""
        return self.tensor + self.pipeline + self.gradients + self.parameters + self.muon + self.loss


@dataclass(frozen=True)
class Prediction:
    """One layout's cost."""

    layout: ParallelConfig
    memory_bytes: float  # of a rank
    sent: Sent
    seconds: Seconds
    launch_s: float  # that the host needs to start a step's kernels
    filled: float  # share of the packs' tokens that images and captions fill
    micro: int
    mfu: float

    @property
    def launch_bound(self) -> bool:
        """Whether the device waits for the host."""
        compute_s = self.seconds.products + self.seconds.attention + self.seconds.moved
        return self.launch_s > compute_s


def state_bytes(config: RunConfig, loads: Sequence[Load]) -> float:
    """Return what a checkpoint holds: fp32 parameters and the optimizer's moments; what is frozen is not in it."""
    return _FP32_BYTES * (1 + _MOMENTS[config.optim.name]) * sum(load.learned for load in loads)


def predict(config: RunConfig, loads: list[Load], world: int, per_node: int, cluster: Cluster) -> Prediction:
    """Return the cost of the configuration's layout."""
    layout = config.parallel
    tp, pp = layout.tp, layout.pp
    dp = world // (tp * pp)
    micro = max(pp, *(math.ceil(load.tokens / (dp * load.pack_tokens)) for load in loads))
    fused = config.fusion != "off"
    rate = cluster.flops * cluster.attained
    products = attention = moved = launched = 0.0
    for load in loads:
        ways = dp * (1 if load.whole else tp * pp)
        forwards = 1 + load.runs_twice(pp, micro) + (load.memory.recompute == "full")
        again = load.memory.recompute == "selective"  # fc1 and attention
        mlp = (2 if load.gated else 1) * load.hidden / (4 * load.width + (3 if load.gated else 2) * load.hidden)
        products += load.product_flops * (forwards + again * mlp + _PRODUCT_BACKWARD) / (ways * rate)
        attention += (
            load.attention_flops * (forwards + again + _ATTENTION_BACKWARD) / (ways * rate * _ATTENTION_ATTAINED)
        )
        blocks = load.depth * micro / (1 if load.whole else pp)
        forward_bytes, backward_bytes = MOVED_BYTES[fused]
        values = load.pack_tokens * load.width * blocks / (1 if load.whole else tp)
        passed = forwards * forward_bytes + backward_bytes
        moved += values * passed / (cluster.memory_bytes_per_s * _MEMORY_ATTAINED)
        forward_kernels, backward_kernels = KERNELS[fused]
        launched += blocks * (forwards * forward_kernels + backward_kernels)
    ways_of = [1 if load.whole else tp * pp for load in loads]
    held = sum(load.learned / ways for load, ways in zip(loads, ways_of, strict=True))
    frozen = sum(load.frozen / ways for load, ways in zip(loads, ways_of, strict=True))
    sent, loss_s = _sent(config, loads, dp, micro, held), _loss_s(config, dp, rate)
    compute_s = products + attention + moved
    muon_s = sum(
        load.muon_flops / (rate * (dp if load.whole else pp * dp * (tp if config.optim.muon_tp == "sharded" else 1)))
        for load in loads
    )
    seconds = Seconds(
        products=products,
        attention=attention,
        moved=moved,
        loss=loss_s,
        muon=muon_s,
        bubble=compute_s * (pp - 1) / micro,
        messages=_waiting_s(config, sent, world, per_node, cluster, compute_s / micro),
    )
    flops = 3 * sum(load.forward_flops for load in loads)
    tokens = sum(load.tokens for load in loads)
    return Prediction(
        layout=layout,
        memory_bytes=_FP32_BYTES * frozen + _memory_bytes(config, loads, dp, micro, held, fused=fused),
        sent=sent,
        seconds=seconds,
        launch_s=launched * _LAUNCH_S,
        filled=tokens / sum(dp * micro * load.pack_tokens for load in loads),
        micro=micro,
        mfu=flops / (seconds.step * world * cluster.flops),
    )


def _memory_bytes(config: RunConfig, loads: list[Load], dp: int, micro: int, held: float, *, fused: bool) -> float:
    """Parameters and whole gradients; master, moments and averaged gradients in shares; buckets; what is kept.

    What one pass runs is kept together; what runs twice is kept alone, in its second pass.
    """
    layout = config.parallel
    memory = _FP32_BYTES * held * (2 + (2 + _MOMENTS[config.optim.name]) / dp)
    memory += _FP32_BYTES * min(_BUCKETS * config.zero.reduce_bucket_elements, held) * (dp > 1)
    under_way = min(layout.pp, micro)
    together = most_alone = 0.0
    for load in loads:
        tp, pp = (1, 1) if load.whole else (layout.tp, layout.pp)
        block = kept_bytes(load, tp, sequence=layout.sequence, fused=fused, precision=config.precision)
        kept = 0.0 if load.memory.offload else block * load.depth / pp * (1 if load.whole else under_way)
        if load.memory.recompute == "full" or load.memory.offload:  # the blocks that are done again, or come back
            plain = replace(load, memory=ActivationConfig())
            kept += load.memory.recompute_blocks * kept_bytes(
                plain, tp, sequence=layout.sequence, fused=fused, precision=config.precision
            )
        if load.runs_twice(layout.pp, micro):
            most_alone = max(most_alone, kept)
        else:
            together += kept
    return memory + max(together, most_alone)


def _sent(config: RunConfig, loads: list[Load], dp: int, micro: int, held: float) -> Sent:
    layout = config.parallel
    tp, pp = layout.tp, layout.pp
    half = 2 if config.precision == "bf16" else 4
    tensor = pipeline = 0.0
    for load in (load for load in loads if not load.whole):
        row = load.pack_tokens * load.width
        # Two sums over tensor ranks in every block's forward and in its backward.
        first_pass = load.runs_twice(pp, micro)
        forwards = 1 + first_pass + (load.memory.recompute == "full")
        tensor += 2 * (forwards + 1) * micro * load.depth / pp * row * half * 2 * (tp - 1) / tp
        border = row * (2 if layout.pipeline_messages == "bf16" else 4) / (tp if layout.sequence else 1)
        pipeline += (2 + first_pass) * micro * border * (pp > 1)
    share = (dp - 1) / dp
    gradient_bytes = 2 if config.zero.gradient_messages == "bf16" else 4
    pairs = config.data.global_batch_images * config.proj_dim * _FP32_BYTES * (config.objective == "contrast")
    return Sent(
        tensor=tensor,
        pipeline=pipeline,
        gradients=share * held * gradient_bytes * (2 if config.zero.overlap and pp == 1 else 1),
        parameters=share * held * _FP32_BYTES,
        muon=sum(muon_bytes(load, tp, pp, dp) for load in loads if load.muon_flops),
        loss=2 * share * pairs,
    )


def muon_bytes(load: Load, tp: int, pp: int, dp: int) -> float:
    """Return what a rank sends on average to bring matrices that borders of ZeRO's slices cut to one owner and back.

    And, with tensor ranks, the shards of the rest.
    """
    spans, start = [], 0
    for rows, columns in load.matrices[: len(load.matrices) // pp]:
        spans.append(MatrixSpan(start, (rows, max(1, columns // tp))))
        start = spans[-1].stop
    if not spans:
        return 0.0
    size = -(-start // dp)
    cut = Partition(0, size, tuple(spans))
    away = sum(
        span.stop - span.start - cut.length(span, cut.owner(span)) for span in spans if len(cut.holders(span)) > 1
    )
    return 2 * _FP32_BYTES * (away + start * (tp - 1) / tp) / dp


def _loss_s(config: RunConfig, dp: int, rate: float) -> float:
    """Of stage 2: three products of a rank's images with all texts, in fp32 at an eighth of the rate of bf16."""
    if config.objective != "contrast":
        return 0.0
    pairs = config.data.global_batch_images
    return 3 * 2.0 * (pairs / dp) * pairs * config.proj_dim / (rate / 8)


def _waiting_s(config: RunConfig, sent: Sent, world: int, per_node: int, cluster: Cluster, micro_s: float) -> float:
    """Return the time of messages that nothing overlaps.

    Muon's travel while other matrices are made orthogonal, the loss's while blocks are compared; with --zero.overlap
    gradients travel beside the last backward, two thirds of its microbatch.
    """
    layout = config.parallel
    inside, across = cluster.node_bytes_per_s, cluster.network_bytes_per_s
    pipeline = inside if layout.tp * layout.pp <= per_node else across
    data = inside if world <= per_node else across
    gradients_s = sent.gradients / data
    if config.zero.overlap and layout.pp == 1:
        gradients_s = max(0.0, gradients_s - 2 / 3 * micro_s)
    return sent.tensor / inside + sent.pipeline / pipeline + gradients_s + sent.parameters / data

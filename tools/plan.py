"""What a run would cost on a cluster: parameters, memory, FLOPs, communication, step time, MFU and bubble.

usage: python -m tools.plan PRESET [flags]

--nodes N           4 by default
--gpus-per-node G   8 by default
--cluster NAME      a100, h100 or h200 of configs/clusters.py; h100 by default
--tp T --pp P       plan this layout alone; by default every legal one, the fastest that fits first
--samples N         of the corpus (8e9): what it costs a rank to open and to plan

Other flags are the trainer's (--data.global-batch-images, --text-encoder.path, ...).

Parameters and the FLOPs of blocks and Muon are exact (tests count them). Memory and time are estimates from data-sheet
figures and an assumed share of the peak: they rank layouts; `tools.bench.plan` compares them with steps on CPU, nothing
has on a GPU. Images count with their largest size, teachers and data with nothing; communication is not overlapped
with computation. A text encoder of transformers is counted whole on the last stage, its memory and FLOPs as those of
blocks of its size.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

from cogvit.config import ParallelConfig, RunConfig
from cogvit.config.arguments import asks_for_help, take_flag
from cogvit.errors import CogViTError, ConfigError
from cogvit.stages import check_run, read_run, stage_of
from cogvit.stages.cost import Load
from configs.clusters import CLUSTERS, Cluster
from tools.corpus_cost import cost_lines, read_samples

_FP32_BYTES, _MOMENTS = 4, {"muon": 1, "adamw": 2, "sgd": 1}  # moments of most parameters
_BACKWARD = 3  # a step's FLOPs over the forward's


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    preset: str
    nodes: str = "4"
    gpus_per_node: str = "8"
    cluster: str = "h100"
    tp: str = ""
    pp: str = ""
    samples: str = "0"


@dataclass(frozen=True)
class Prediction:
    """One layout's cost."""

    layout: ParallelConfig
    memory_bytes: float  # of a rank
    sent_bytes: float  # by a rank in a step
    bubble: float  # share of the time in which a pipeline stage waits
    step_s: float
    mfu: float


def predict(config: RunConfig, loads: list[Load], world: int, per_node: int, cluster: Cluster) -> Prediction:
    """Return the cost of the configuration's layout."""
    layout = config.parallel
    tp, pp, dp = layout.tp, layout.pp, world // (layout.tp * layout.pp)
    value_bytes = 2 if config.precision == "bf16" else 4
    micro = max(math.ceil(load.tokens / (dp * load.pack_tokens)) for load in loads)
    shared_by = {True: 1, False: tp * pp}
    held = sum(load.parameters / shared_by[load.whole] for load in loads)
    sharded = 1 + _MOMENTS[config.optim.name] + (config.zero.stage == 2)  # master, moments, gradients
    memory = _FP32_BYTES * held * (1 + (config.zero.stage == 1) + sharded / dp)
    tp_bytes = pp_bytes = 0.0
    for load in loads:
        row = load.pack_tokens * load.width
        if load.whole:  # one microbatch at a time, and nothing is sent
            memory += value_bytes * row * 18 * load.depth
            continue
        # Of a block, in values of the width: its inputs, q, k, v, attention's output and the MLP's 4-wide layers.
        kept = 2 if config.memory.vision.recompute == "full" else 4 + 14 / tp
        memory += value_bytes * row * kept * load.depth / pp * min(pp, micro)
        tp_bytes += 4 * micro * load.depth / pp * row * value_bytes * 2 * (tp - 1) / tp
        pp_bytes += 2 * micro * row * _FP32_BYTES * (pp > 1)
    dp_bytes = 2 * 2 * (dp - 1) / dp * held * _FP32_BYTES  # gradients are reduced, parameters gathered
    across = cluster.network_bytes_per_s
    fast = cluster.node_bytes_per_s
    bubble = (pp - 1) / (micro + pp - 1)
    rate = cluster.flops * cluster.attained
    flops = _BACKWARD * sum(load.forward_flops for load in loads)
    alone = _BACKWARD * sum(load.forward_flops for load in loads if load.whole)  # the other stages wait
    compute_s = (flops - alone) / (world * rate) / (1 - bubble) + alone / (dp * rate)
    # Each dp rank has its part of the matrices; tensor ranks repeat the work on each other's, or share it.
    for load in loads:
        sharing = dp if load.whole else pp * dp * (tp if config.optim.muon_tp == "sharded" else 1)
        compute_s += load.muon_flops / (sharing * rate)
    sending_s = tp_bytes / fast + pp_bytes / (fast if tp * pp <= per_node else across)
    sending_s += dp_bytes / (fast if world <= per_node else across)
    step_s = compute_s + sending_s
    mfu = flops / (step_s * world * cluster.flops)
    return Prediction(layout, memory, tp_bytes + pp_bytes + dp_bytes, bubble, step_s, mfu)


def legal_layouts(config: RunConfig, world: int, per_node: int) -> list[RunConfig]:
    """Return the configuration under every layout that it can run in, tensor ranks inside a node."""
    legal = []
    for tp in (size for size in range(1, per_node + 1) if per_node % size == 0):
        for pp in (size for size in range(1, world // tp + 1) if world % (tp * size) == 0):
            candidate = replace(config, parallel=replace(config.parallel, tp=tp, pp=pp))
            try:
                check_run(candidate, world)
            except ConfigError:
                continue
            legal.append(candidate)
    return legal


def plan(arguments: Arguments, config: RunConfig) -> int:
    """Print the table; returns the exit status."""
    if arguments.cluster not in CLUSTERS:
        raise ConfigError(f"unknown cluster {arguments.cluster!r}; there are {', '.join(CLUSTERS)}")
    try:
        nodes, per_node = int(arguments.nodes), int(arguments.gpus_per_node)
        fixed = {name: int(size) for name, size in (("tp", arguments.tp), ("pp", arguments.pp)) if size}
    except ValueError as error:
        raise ConfigError(f"--nodes, --gpus-per-node, --tp and --pp are whole numbers: {error}") from None
    samples = read_samples(arguments.samples)
    world, cluster = nodes * per_node, CLUSTERS[arguments.cluster]
    layouts = legal_layouts(config, world, per_node)
    layouts = [one for one in layouts if all(getattr(one.parallel, name) == size for name, size in fixed.items())]
    if not layouts:
        raise ConfigError(f"{arguments.preset} has no legal layout on {nodes} x {per_node}; try other --tp and --pp")
    loads = stage_of(config).loads(config)
    predictions = [predict(one, loads, world, per_node, cluster) for one in layouts]
    predictions.sort(key=lambda one: (one.memory_bytes > cluster.memory_bytes, one.step_s))
    flops = _BACKWARD * sum(load.forward_flops for load in loads)
    print(f"{arguments.preset} on {nodes} nodes x {per_node} {arguments.cluster}, ZeRO {config.zero.stage}")
    print(f"{sum(load.parameters for load in loads):,} parameters, {flops:.3g} FLOPs a step (heads left out)")
    print(f"{'tp':>4}{'pp':>4}{'dp':>6}{'memory':>10}{'sent':>11}{'bubble':>8}{'step':>10}{'MFU':>7}")
    for one in predictions:
        dp = world // (one.layout.tp * one.layout.pp)
        full = "" if one.memory_bytes <= cluster.memory_bytes else "  does not fit"
        print(
            f"{one.layout.tp:>4}{one.layout.pp:>4}{dp:>6}"
            f"{one.memory_bytes / 1e9:>7.1f} GB{one.sent_bytes / 1e9:>8.2f} GB"
            f"{one.bubble:>8.1%}{1000 * one.step_s:>7,.0f} ms{one.mfu:>7.1%}{full}"
        )
    state_bytes = _FP32_BYTES * (1 + _MOMENTS[config.optim.name]) * sum(load.parameters for load in loads)
    print(*cost_lines(samples, predictions[0].layout, world, per_node, state_bytes), sep="\n")
    return 0


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or asks_for_help(argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        own: dict[str, str] = {}
        words = argv[1:]
        for name in ("nodes", "gpus_per_node", "cluster", "tp", "pp", "samples"):
            value, words = take_flag(words, f"--{name.replace('_', '-')}")
            own |= {} if value is None else {name: value}
        return plan(Arguments(argv[0], **own), read_run(argv[0], words))
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

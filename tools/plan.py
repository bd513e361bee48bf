"""What a run would cost on a cluster: memory, messages, step time by what takes it, launches, MFU and bubble.

usage: python -m tools.plan PRESET [flags]

--nodes N           4 by default
--gpus-per-node G   8 by default
--cluster NAME      a100, h100, h200, b200, rtx4090 or rtx5090 of configs/clusters.py; h100 by default
--tp T --pp P       plan this layout alone; by default every legal one, the fastest that fits first
--samples N         of the corpus (8e9): what it costs a rank to open and to plan

Other flags are the trainer's (--data.global-batch-images, --text-encoder.path, ...).

Parameters and the FLOPs of blocks and Muon are exact (tests count them); what is kept for backward is within 10 % of
what autograd keeps of a step on fake tensors (tests). Time is an estimate from data-sheet figures and assumed shares of
them: it ranks layouts; `tools.bench.plan` compares it with steps on CPU, nothing has on a GPU. Images count with their
largest size, data with nothing. Layouts whose kernels take longer to launch than to run are refused, and those with
more ranks than there are packs to fill. A text encoder of transformers is counted whole on the last stage, its memory
and FLOPs as those of blocks of its size.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cogvit.config import RunConfig, TeacherConfig
from cogvit.config.arguments import asks_for_help, take_flag
from cogvit.errors import CogViTError, ConfigError
from cogvit.stages import check_run, read_run, stage_of
from cogvit.stages.cost import Load
from configs.clusters import CLUSTERS, Cluster
from tools.corpus_cost import cost_lines, read_samples
from tools.step_cost import Prediction, predict, state_bytes

_LEAST_FILLED = 0.5  # of the packs' tokens
# Depth, width and MLP width of the published teachers of the presets, for where their files are not here.
_TEACHERS = {"siglip2-so400m": (27, 1152, 4304), "dinov3-vitl16": (24, 1024, 4096)}


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


def refusal(config: RunConfig, one: Prediction) -> str:
    """Return why a layout is not to be run though it could be; empty where nothing speaks against it."""
    if one.filled < _LEAST_FILLED:
        return (
            f"too few images for so many ranks: {config.data.global_batch_images} fill {one.filled:.0%} of the packs;"
            " raise --data.global-batch-images, lower --data.tokens-per-pack, or start fewer ranks"
        )
    if one.launch_bound:
        compute_s = one.seconds.products + one.seconds.attention + one.seconds.moved
        return (
            f"launch-bound: the host needs {1000 * one.launch_s:,.0f} ms to start the kernels of a step, which run"
            f" {1000 * compute_s:,.0f} ms; raise --data.tokens-per-pack, or take a smaller --tp"
        )
    return ""


def teacher_flops(member: TeacherConfig, tokens: int, length: int) -> float | None:
    """Return the FLOPs of a teacher's forward on as many patches as the student has; None where nobody knows it."""
    try:
        said = json.loads((Path(member.path) / "config.json").read_text())
        said = said.get("vision_config", said)
        depth, width, hidden = (said[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    except (OSError, ValueError, KeyError, AttributeError):  # it is not here, or no transformer
        known = next((shape for name, shape in _TEACHERS.items() if name in member.path), None)
        if known is None:
            return None
        depth, width, hidden = known
    return depth * tokens * (2.0 * (4 * width**2 + 2 * width * hidden) + 4.0 * length * width)


def teachers_line(config: RunConfig, load: Load, cluster: Cluster) -> str:
    """Say what the teachers compute in a step, and how long their actors need for it."""
    length = (
        config.data.max_patches if config.data.sizing != "square" else load.tokens // config.data.global_batch_images
    )
    found = {member.name: teacher_flops(member, load.tokens, length) for member in config.teachers.members}
    unknown = [name for name, flops in found.items() if flops is None]
    flops = sum(flops for flops in found.values() if flops is not None)
    line = f"teachers: {flops:.3g} FLOPs a step, {flops / (3 * load.forward_flops):.2f} of the student's"
    gpus = config.teachers.num_actors * config.teachers.actor_gpus
    if gpus:
        line += f"; {gpus:g} GPUs of their own need {1000 * flops / (gpus * cluster.flops * cluster.attained):,.0f} ms"
    else:
        line += "; their actors have no GPUs (--teachers.actor-gpus)"
    return f"{line}; not counted: {', '.join(unknown)}" if unknown else line


def plan(arguments: Arguments, config: RunConfig) -> int:
    """Print the table; returns the exit status. Errors: ConfigError where no layout is to be run, with the reason."""
    if arguments.cluster not in CLUSTERS:
        raise ConfigError(f"unknown cluster {arguments.cluster!r}; there are {', '.join(CLUSTERS)}")
    try:
        nodes, per_node = int(arguments.nodes), int(arguments.gpus_per_node)
        fixed = {name: int(size) for name, size in (("tp", arguments.tp), ("pp", arguments.pp)) if size}
    except ValueError as error:
        raise ConfigError(f"--nodes, --gpus-per-node, --tp and --pp are whole numbers: {error}") from None
    if min(nodes, per_node) < 1:
        raise ConfigError(f"--nodes {nodes} and --gpus-per-node {per_node} must be at least 1")
    samples = read_samples(arguments.samples)
    world, cluster, stage = nodes * per_node, CLUSTERS[arguments.cluster], stage_of(config)
    layouts = legal_layouts(config, world, per_node)
    layouts = [one for one in layouts if all(getattr(one.parallel, name) == size for name, size in fixed.items())]
    if not layouts:
        own = config.parallel
        asked = replace(own, tp=fixed.get("tp", own.tp), pp=fixed.get("pp", own.pp))
        check_run(replace(config, parallel=asked), world)  # says why
        raise ConfigError(f"{arguments.preset} has no legal layout on {nodes} x {per_node}; try other --tp and --pp")
    loads = stage.loads(config)
    found = [predict(one, loads, world, per_node, cluster) for one in layouts]
    refused = [reason for one in found if (reason := refusal(config, one))]
    sound = [one for one in found if not refusal(config, one)]
    if not sound:
        raise ConfigError(f"{arguments.preset} on {nodes} x {per_node} {arguments.cluster} is {refused[0]}")
    sound.sort(key=lambda one: (one.memory_bytes > cluster.memory_bytes, one.seconds.step))
    flops = 3 * sum(load.forward_flops for load in loads)
    print(f"{arguments.preset} on {nodes} nodes x {per_node} {arguments.cluster}, ZeRO {config.zero.stage}")
    print(f"{sum(load.parameters for load in loads):,} parameters, {flops:.3g} FLOPs a step (heads left out)")
    if stage.asks_actors(config):
        print(teachers_line(config, loads[0], cluster))
    print(table(sound, world, cluster))
    print(f"fastest: {where_time_goes(sound[0])}")
    if refused:
        print(f"{len(refused)} layouts left out, the first as {refused[0]}")
    print(*cost_lines(samples, sound[0].layout, world, per_node, state_bytes(config, loads)), sep="\n")
    return 0


def table(predictions: list[Prediction], world: int, cluster: Cluster) -> str:
    """Return a line for each layout."""
    lines = [f"{'tp':>4}{'pp':>4}{'dp':>6}{'memory':>10}{'sent':>13}{'bubble':>8}{'launch':>10}{'step':>11}{'MFU':>7}"]
    for one in predictions:
        seconds, layout = one.seconds, one.layout
        full = "" if one.memory_bytes <= cluster.memory_bytes else "  does not fit"
        lines.append(
            f"{layout.tp:>4}{layout.pp:>4}{world // (layout.tp * layout.pp):>6}"
            f"{one.memory_bytes / 1e9:>7.1f} GB{one.sent.all / 1e9:>10.2f} GB{seconds.bubble / seconds.step:>8.1%}"
            f"{1000 * one.launch_s:>7,.0f} ms{1000 * seconds.step:>8,.0f} ms{one.mfu:>7.1%}{full}"
        )
    return "\n".join(lines)


def where_time_goes(one: Prediction) -> str:
    """Say what a step's time and messages are made of."""
    times = ", ".join(f"{name} {1000 * seconds:,.0f}" for name, seconds in vars(one.seconds).items() if seconds > 5e-4)
    sent = ", ".join(f"{name} {count / 1e9:,.2f}" for name, count in vars(one.sent).items() if count > 5e6)
    return (
        f"{times} ms; sent: {sent or 'nothing'} GB; {one.micro} microbatches, {one.filled:.0%} of their tokens filled"
    )


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

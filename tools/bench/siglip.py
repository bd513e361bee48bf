"""Time and memory of the sigmoid loss beside open_clip's SigLipLoss, and of the two-pass step beside one pass.

usage: python -m tools.bench.siglip [flags]
  --pairs 1024,4096,16384  pairs of the global batch; 0 for none (needs open_clip_torch, whose loss alone is loaded)
  --alone 32768            the same without open_clip, which cannot hold them; 0 for none
  --ranks 1,4              processes that share the pairs
  --dim 768                width of the embeddings
  --chunk 1024             rows and columns of our blocks
  --threads 1              of each process
  --absent 0               slots of each process without a pair, for our loss: packs are rarely full
  --device cpu             cpu or cuda; on a GPU --step is left out
  --rounds 3               each round runs every contender once; the table has the medians
  --step 1,2,4,8           microbatches of the step's comparison; 1 is one pass; 0 leaves it out
  --out FILE               also write the record there

Loss with the gradients of both embeddings, temperature and bias, fp32. "Products" are the three matrix products of
every block and nothing else: what any exact method has to compute. Memory is what a process holds at its peak above its
inputs, the gradients included; of several processes, the one that holds most.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit.config import ContrastConfig
from cogvit.config.device import Device, device_flag
from cogvit.errors import ConfigError
from cogvit.objective.pairwise import Groups, Pairs, sigmoid_gradients, start_groups
from cogvit.parallel.mesh import Mesh
from tools.bench._contrast_step import step_lines
from tools.bench._probe import Probe
from tools.bench._ranks import busiest, join, on_ranks, ranks_for, take_turns
from tools.bench._record import flags_of, run_benchmark

RING = "ours, ring"
OURS = {
    RING: ContrastConfig(group_ranks=1),
    "ours, groups of 2": ContrastConfig(group_ranks=2),
    "ours, gather": ContrastConfig(loss="gather"),
}
PEER = "open_clip"
PRODUCTS = "products"


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    pairs: str = "1024,4096,16384"
    alone: str = "32768"
    ranks: str = "1,4"
    dim: str = "768"
    chunk: str = "1024"
    threads: str = "1"
    absent: str = "0"
    rounds: str = "3"
    step: str = "1,2,4,8"
    device: str = "cpu"
    out: str = ""


@dataclass(frozen=True)
class Setting:
    """What one group of processes measures."""

    pairs: int  # of the global batch
    ranks: int
    dim: int
    chunk: int
    threads: int
    absent: int = 0  # slots of a rank, beside its pairs
    device: Device = "cpu"


@dataclass(frozen=True)
class Inputs:
    """One rank's share of the pairs."""

    image_nE: Tensor
    text_nE: Tensor
    pairs: Pairs
    log_t: Tensor
    bias: Tensor


def inputs_of(setting: Setting, mesh: Mesh) -> Inputs:
    """Return random unit vectors with captions that all differ."""
    rank, device = mesh.dp_rank, mesh.device
    count, generator = setting.pairs // setting.ranks + setting.absent, torch.Generator().manual_seed(rank)
    image, text = (F.normalize(torch.randn(count, setting.dim, generator=generator), dim=1) for _ in range(2))
    weight = torch.ones(count).index_fill_(0, torch.randperm(count, generator=generator)[: setting.absent], 0.0)
    number, scalars = (torch.arange(count) + rank * count).to(device), torch.tensor([[2.3], [-10.0]], device=device)
    return Inputs(image.to(device), text.to(device), Pairs(number, number, weight.to(device)), *scalars)


def ours(inputs: Inputs, mesh: Mesh, groups: Groups, config: ContrastConfig) -> None:
    """Compute loss and gradients."""
    pairs, scalars = inputs.pairs, (inputs.log_t, inputs.bias)
    sigmoid_gradients(inputs.image_nE, inputs.text_nE, pairs, *scalars, mesh, groups, config)


def open_clip_loss(rank: int, ranks: int) -> Any:
    """Return open_clip's loss, from its file: the package would import torchvision and timm, which the loss needs not.

    Errors: ConfigError when open_clip_torch is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("open_clip_torch is not installed; pip install --no-deps open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss(rank=rank, world_size=ranks)


def peer(inputs: Inputs, loss: Any) -> None:
    """Compute open_clip's loss and gradients."""
    leaves = [x.detach().requires_grad_() for x in (inputs.image_nE, inputs.text_nE, inputs.log_t, inputs.bias)]
    loss(leaves[0], leaves[1], leaves[2].exp(), leaves[3]).backward()


def products(inputs: Inputs, setting: Setting) -> None:
    """Multiply what has to be multiplied, block by block, for this rank's images and everybody's texts."""
    d_image, d_text = torch.empty_like(inputs.image_nE), torch.empty_like(inputs.text_nE)
    size, block = setting.chunk, inputs.image_nE.new_empty(setting.chunk**2)
    for text, d_text_c in zip(inputs.text_nE.split(size), d_text.split(size), strict=True):
        for image, d_image_r in zip(inputs.image_nE.split(size), d_image.split(size), strict=True):
            logits = block[: len(image) * len(text)].view(len(image), len(text))
            for _ in range(setting.ranks):
                torch.mm(image, text.T, out=logits)
                torch.mm(logits, text, out=d_image_r)
                torch.mm(logits.T, image, out=d_text_c)


def contender(name: str, setting: Setting, mesh: Mesh) -> Callable[[], None]:
    """Return what runs under a name."""
    full = replace(setting, absent=0)
    inputs = inputs_of(setting if name in OURS else full, mesh)
    if name == PRODUCTS:
        return partial(products, inputs, setting)
    if name == PEER:
        return partial(peer, inputs, open_clip_loss(mesh.dp_rank, mesh.dp_size))
    config = replace(OURS[name], chunk_pairs=setting.chunk)
    return partial(ours, inputs, mesh, start_groups(config, setting.pairs, mesh), config)


def run_rank(rank: int, rendezvous: str, setting: Setting, names: Sequence[str], rounds: int) -> dict[str, list[Probe]]:
    """Join the ranks and run the contenders in turn, round after round."""
    mesh = join(rank, setting.ranks, rendezvous, setting.threads, setting.device)
    for name in names:
        contender(name, replace(setting, pairs=256), mesh)()  # what libraries set up on first use is nobody's
    return take_turns({name: contender(name, setting, mesh) for name in names}, rounds, mesh.device)


def loss_lines(setting: Setting, names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield a row of each contender."""
    of_ranks = on_ranks(partial(run_rank, setting=setting, names=tuple(names), rounds=rounds), setting.ranks)
    found = {name: busiest(of_ranks, name) for name in names}
    for name, one in found.items():
        yield (
            f"| {setting.ranks} | {setting.pairs:,} | {name} | {one.cpu_s:.2f}"
            f" | {one.cpu_s / found[PRODUCTS].cpu_s:.2f} | {one.peak_bytes / 2**20:,.0f} |"
        )


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line.

    Errors: ConfigError for a flag that is no number, or without open_clip where --pairs needs it.
    """
    try:
        numbers = {
            name: [int(number) for number in value.split(",") if number != "0"]
            for name, value in vars(arguments).items()
            if name not in ("out", "device")
        }
    except ValueError as error:
        raise ConfigError(
            f"flags are whole numbers, --pairs, --alone, --ranks and --step lists of them: {error}"
        ) from None
    absent, device = sum(numbers["absent"]), device_flag(arguments.device)
    (dim,), (chunk,), (threads,), (rounds,) = (numbers[name] for name in ("dim", "chunk", "threads", "rounds"))
    libraries = [f"torch {version('torch')}"]
    if numbers["pairs"]:
        open_clip_loss(0, 1)
        libraries.append(f"open_clip_torch {version('open_clip_torch')}")
    yield f"# The sigmoid loss, time and memory on {device}"
    yield ""
    yield f"{date.today()}, `python -m tools.bench.siglip {flags_of(arguments)}`;"
    yield f"{', '.join(libraries)}, {threads} thread(s) a process, fp32, E = {dim},"
    yield f"of our loss {absent} absent slots a process."
    yield ""
    yield "| processes | pairs | loss | s of the busiest | against the products | peak MiB of a process |"
    yield "|---|---|---|---|---|---|"
    for ranks in ranks_for(numbers["ranks"], device):
        way = [name for name, one in OURS.items() if ranks % max(one.group_ranks, 1) == 0] if ranks > 1 else [RING]
        for pairs in sorted({*numbers["pairs"], *numbers["alone"]}):
            peers = [PEER] if pairs in numbers["pairs"] else []
            setting = Setting(pairs, ranks, dim, chunk, threads, absent, device)
            yield from loss_lines(setting, [*way, *peers, PRODUCTS], rounds)
    yield ""
    if numbers["step"] and device == "cpu":
        yield from step_lines(numbers["step"], rounds)


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))

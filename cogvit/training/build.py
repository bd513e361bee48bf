"""The parts that every stage's model is put together from, and its initial weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cogvit.config import RunConfig
from cogvit.errors import CheckpointError
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.init import init_tensor
from cogvit.parallel.convert import fill
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.mesh import Mesh

TowerShape = CogViTConfig | TextConfig
Weights = Callable[[str, tuple[int, ...]], Tensor]


def vision_stage(config: RunConfig, mesh: Mesh) -> VisionStage:
    """Return this rank's part of the vision tower."""
    data = config.data
    return VisionStage(
        config.vision,
        mesh,
        config.parallel,
        config.memory.vision,
        num_tokens=data.tokens_per_pack,
        num_slots=data.images_per_pack,
        fusion=config.fusion,
    )


def fill_on_device(model: nn.Module, mesh: Mesh, weights: Weights) -> None:
    """Move a model to its device and give it its initial weights. Errors: as the weights' source."""
    fill(model.to(mesh.device), mesh, weights)


def initial_weights(
    config: RunConfig, given: Mapping[str, Tensor], constants: Mapping[str, float], towers: Mapping[str, TowerShape]
) -> Weights:
    """Return the source of initial plain tensors: what is given, constants, and the seed for the rest.

    towers: shapes of towers besides the vision tower, by the prefix of their tensors' names.
    Errors: CheckpointError when a tensor of --init has another shape than this run's.
    """

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in given:
            if given[name].shape != shape:
                raise CheckpointError(f"--init {config.init} has {name} of {tuple(given[name].shape)}, not {shape}")
            return given[name]
        if name in constants:
            return torch.full(shape, constants[name])
        tower = next((shape_of for prefix, shape_of in towers.items() if name.startswith(prefix)), config.vision)
        scale = 1.0 if tower.layer_scale_init is None else tower.layer_scale_init
        return init_tensor(name, shape, config.seed, scale)

    return weight

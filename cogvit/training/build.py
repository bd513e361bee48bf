"""This rank's stage of the model with its initial weights, and what trains it: from a run's configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cogvit.config import ModuleConfig, RunConfig
from cogvit.errors import CheckpointError, CogViTError
from cogvit.model.init import init_tensor
from cogvit.model.pretrained import load_text_encoder
from cogvit.objective.distill import Distill, DistillModel, Term
from cogvit.objective.siglip import Contrast, ContrastModel
from cogvit.parallel.convert import fill
from cogvit.parallel.encoder import TextStage, VisionStage, WholeTextStage
from cogvit.parallel.mesh import Mesh
from cogvit.training.objective import Objective
from cogvit.training.restore import initial_towers
from data_pipeline.caption import load_tokenizer


def build(config: RunConfig, mesh: Mesh, teacher_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
    """Return this rank's stage of the model with its initial weights, and what trains it."""
    data, parallel, memory = config.data, config.parallel, config.memory
    vision = VisionStage(
        config.vision, mesh, parallel, memory.vision, num_tokens=data.tokens_per_pack, num_slots=data.images_per_pack
    )
    if config.objective == "distill":
        terms = {
            member.name + part: Term(weight, member.error)
            for member in config.teachers.members
            for part, weight in member.parts.items()
        }
        model: nn.Module = DistillModel(vision, teacher_dims, recompute=memory.projection_recompute)
        objective: Any = Distill(terms, config.teachers.mask_ratio)
    else:
        text: Any = (
            whole_text_stage(config, mesh)
            if config.text_encoder.path
            else TextStage(config.text, mesh, parallel, memory.text, num_tokens=data.text_tokens_per_pack)
        )
        model, objective = (
            ContrastModel(vision, text, config.proj_dim, recompute=memory.projection_recompute),
            Contrast(config.contrast, locked_towers(config)),
        )
    fill(model.to(mesh.device), mesh, initial_weights(config, model))
    return model, objective


def whole_text_stage(config: RunConfig, mesh: Mesh) -> WholeTextStage | None:
    """Return the run's text encoder of transformers with its weights on the last stage, nothing elsewhere.

    Errors: ConfigError or DataError, on all ranks.
    """
    stage, failure = None, None
    try:
        if mesh.is_last_stage:
            pad_id = load_tokenizer(config.data.tokenizer, config.text.vocab_size).pad_id
            tower = load_text_encoder(config.text_encoder, config.text.max_tokens, pad_id)
            stage = WholeTextStage(tower.encoder, tower.spec)
    except CogViTError as error:
        failure = error
    mesh.raise_together(failure)
    return stage


def locked_towers(config: RunConfig) -> tuple[Literal["vision", "text"], ...]:
    """Return the towers whose rate is 0: nothing needs their gradients."""
    towers: tuple[tuple[Literal["vision", "text"], ModuleConfig], ...] = (
        ("vision", config.optim.vision),
        ("text", config.optim.text),
    )
    return tuple(name for name, own in towers if own.lr_mult == 0.0)


def initial_weights(config: RunConfig, model: nn.Module) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Return the source of initial plain tensors: --init for what it holds of the towers, the seed for the rest.

    A text encoder of transformers, which has its weights, keeps those that --init does not hold.
    Errors: CheckpointError when a tower of --init is not this run's.
    """
    given = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if name.startswith("text.encoder.")}
    given |= initial_towers(config) if config.init else {}
    constants = {"log_t": config.init_log_t, "bias": config.init_bias}

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in given:
            if given[name].shape != shape:
                raise CheckpointError(f"--init {config.init} has {name} of {tuple(given[name].shape)}, not {shape}")
            return given[name]
        if name in constants:
            return torch.full(shape, constants[name])
        tower = config.text if name.startswith("text.") else config.vision
        scale = 1.0 if tower.layer_scale_init is None else tower.layer_scale_init
        return init_tensor(name, shape, config.seed, scale)

    return weight

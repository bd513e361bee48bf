"""Stage 2's room: image-text alignment by the sigmoid loss over the whole global batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cogvit.batch import Reads
from cogvit.config import ModuleConfig, RunConfig, load_config
from cogvit.config.rules import Tower, require, vision_tower
from cogvit.errors import CheckpointError, CogViTError
from cogvit.model.config import TextConfig
from cogvit.stages.protocol import ReadsShards

if TYPE_CHECKING:  # a configuration is checked before any of these is imported
    from torch import Tensor, nn

    from cogvit.evaluation.examples import Example
    from cogvit.evaluation.subject import Subject
    from cogvit.parallel.encoder import WholeTextStage
    from cogvit.parallel.mesh import Mesh
    from cogvit.stages.cost import Load
    from cogvit.teacher.targets import Targets
    from cogvit.training.feed import Corpus
    from cogvit.training.objective import Objective


@dataclass(frozen=True)
class ContrastStage(ReadsShards):
    """Two towers, and captions beside the images."""

    title: str = "Stage 2: image-text alignment"
    shows: str = "Retrieval on held-out images"
    fields: tuple[str, ...] = (
        "contrast.", "text.", "text_encoder.", "proj_dim", "init_log_t", "init_bias", "memory.text.",
        "optim.text.", "optim.temperature.", "optim.bias.",
        "data.text_tokens_per_pack", "data.tokenizer", "data.zh_fraction",
    )  # fmt: skip
    execution: tuple[str, ...] = ("contrast.loss", "contrast.group_ranks", "contrast.chunk_pairs")
    reads: Reads = "captions"
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    def towers(self, config: RunConfig) -> tuple[Tower, ...]:
        """The text tower too, unless it is one of transformers, which lies whole on the last stage."""
        if config.text_encoder.path:
            return (vision_tower(config),)
        tokens = config.data.text_tokens_per_pack
        text = Tower("text", config.text, config.memory.text, "data.text_tokens_per_pack", tokens)
        return vision_tower(config), text

    def check(self, config: RunConfig) -> None:
        """Check the loss, the captions' packs and the text encoder. Errors: ConfigError."""
        data = config.data
        contrast = config.contrast
        require(config.proj_dim >= 1, f"--proj-dim {config.proj_dim} must be at least 1")
        for flag, start in (("--init-log-t", config.init_log_t), ("--init-bias", config.init_bias)):
            require(start is None or math.isfinite(start), f"{flag} {start} must be finite")
        require(contrast.chunk_pairs >= 1, f"contrast.chunk_pairs={contrast.chunk_pairs} must be at least 1")
        require(contrast.group_ranks >= 0, f"contrast.group_ranks={contrast.group_ranks} must be at least 0")
        require(
            contrast.loss == "ring" or contrast.group_ranks == 0,
            f"contrast.group_ranks={contrast.group_ranks} is of a ring; contrast.loss=gather has one of all ranks",
        )
        require(
            0.0 < contrast.max_temperature < math.inf,
            f"contrast.max_temperature={contrast.max_temperature} must be positive and finite",
        )
        hottest = math.log(contrast.max_temperature)
        require(
            config.init_log_t <= hottest,
            f"--init-log-t {config.init_log_t} is above {hottest:.4g}, the logarithm of"
            f" contrast.max_temperature={contrast.max_temperature}; lower the one or raise the other",
        )
        require(
            config.text.max_tokens <= data.text_tokens_per_pack,
            f"a caption of text.max_tokens={config.text.max_tokens} does not fit"
            f" data.text_tokens_per_pack={data.text_tokens_per_pack}",
        )
        encoder, memory = config.text_encoder.path, config.memory.text
        require(
            not encoder or (memory.recompute == "none" and not memory.offload),
            f"memory.text is of our own text tower; --text-encoder.path {encoder} keeps its activations",
        )

    def completed(self, config: RunConfig) -> RunConfig:
        """The shape of a text encoder of transformers; loads the tokenizer too, for the errors that it may have."""
        from cogvit.model.tokenizer import load_tokenizer
        from cogvit.training.restore import check_init

        if config.text_encoder.path:
            from cogvit.model.pretrained import with_encoder_shape

            config = with_encoder_shape(config)
        there = check_init(config) if config.init else None
        if there is not None and there.objective == config.objective:
            _check_text_tower(there, config)
        load_tokenizer(config.data.tokenizer, config.text.vocab_size)
        return config

    def asks_actors(self, config: RunConfig) -> bool:
        """Nobody: a pair is its own target."""
        return False

    def targets(self, config: RunConfig, corpus: Corpus, mesh: Mesh) -> Targets | None:
        """Nobody makes targets."""
        return None

    def build(self, config: RunConfig, mesh: Mesh, target_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
        """Both towers with their projections, and the sigmoid loss."""
        from cogvit.objective.pairwise import start_groups
        from cogvit.objective.siglip import Contrast, ContrastModel
        from cogvit.parallel.encoder import TextStage
        from cogvit.training.build import fill_on_device, initial_weights, vision_stage

        text: Any = (
            whole_text_stage(config, mesh)
            if config.text_encoder.path
            else TextStage(
                config.text,
                mesh,
                config.parallel,
                config.memory.text,
                num_tokens=config.data.text_tokens_per_pack,
                fusion=config.fusion,
            )
        )
        recompute = config.memory.projection_recompute
        model = ContrastModel(vision_stage(config, mesh), text, config.proj_dim, recompute=recompute)
        constants = {"log_t": config.init_log_t, "bias": first_bias(config)}
        weights = initial_weights(config, given_weights(config, model), constants, {"text.": config.text})
        fill_on_device(model, mesh, weights)
        groups = start_groups(config.contrast, config.data.global_batch_images, mesh)
        return model, Contrast(config.contrast, groups, locked_towers(config))

    def loads(self, config: RunConfig) -> list[Load]:
        """Both towers, whose embeddings come first, all of them; a text encoder of transformers whole."""
        from cogvit.stages.cost import tower_load, vision_load

        shape, module = text_tower(config)
        whole = bool(config.text_encoder.path)
        text = tower_load(
            config, shape, module, shape.max_tokens, pack_tokens=config.data.text_tokens_per_pack, whole=whole
        )
        return [replace(load, runs_first="unless_at_once") for load in (vision_load(config), text)]

    def concern(self, config: RunConfig, step: int, values: dict[str, float]) -> str:
        """Nothing that the losses do not say."""
        return ""

    def examples(self, subject: Subject) -> list[Example]:
        """Captions that are found for images, and images for captions."""
        from cogvit.evaluation.examples import retrieval_examples

        return retrieval_examples(subject) if subject.captioned else []

    def shade(self, pixels: NDArray[np.uint8], key: int, config: RunConfig) -> NDArray[np.uint8]:
        """The image as it is."""
        return pixels


def first_bias(config: RunConfig) -> float:
    """Return the bias of the loss at the start: by default such that pairs match as often as they do, one in a batch.

    Source: Zhai et al. 2023 (arXiv 2303.15343), section 3.2: -10 for a batch of 32K, whose logarithm is 10.4.
    """
    if config.init_bias is not None:
        return config.init_bias
    at_start = [images for step, images in config.data.batch_schedule if step == 0]
    return -math.log((at_start or [config.data.global_batch_images])[0])


def whole_text_stage(config: RunConfig, mesh: Mesh) -> WholeTextStage | None:
    """Return the run's text encoder of transformers with its weights on the last stage, nothing elsewhere.

    Errors: ConfigError or DataError, on all ranks.
    """
    from cogvit.model.pretrained import load_text_encoder
    from cogvit.model.tokenizer import load_tokenizer
    from cogvit.parallel.encoder import WholeTextStage

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


def given_weights(config: RunConfig, model: nn.Module) -> dict[str, Tensor]:
    """Return what a run does not draw: the weights of a text encoder of transformers, and over them those of --init.

    Errors: as `started_from`.
    """
    given = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if name.startswith("text.encoder.")}
    return given | (started_from(config) if config.init else {})


def started_from(config: RunConfig) -> dict[str, Tensor]:
    """Return the plain tensors that a run takes from its --init: all but the heads of stage 1.

    Errors: CheckpointError when a tower of --init is not this run's.
    """
    from cogvit.training.restore import initial_towers, is_run

    found = {name: tensor for name, tensor in initial_towers(config).items() if not name.startswith("heads.")}
    if is_run(Path(config.init)) and any(name.startswith("text.") for name in found):
        _check_text_tower(load_config(Path(config.init) / "config.json"), config)
    return found


def _check_text_tower(there: RunConfig, config: RunConfig) -> None:
    """Errors: CheckpointError when the text tower of --init is not this run's."""
    names = ("vocab_size", "max_tokens", "embed_dim", "depth", "num_heads", "mlp_dim", "norm", "mlp", "use_qk_norm")
    kinds = [bool(run.text_encoder.path) for run in (there, config)]
    differences = ["one is of transformers, one of our own"] if kinds[0] != kinds[1] else []
    differences += [
        f"{name}: {getattr(there.text, name)!r} there, {getattr(config.text, name)!r} here"
        for name in names
        if getattr(there.text, name) != getattr(config.text, name)
    ]
    if differences:
        raise CheckpointError(
            f"--init {config.init} has another text tower ({'; '.join(differences)}); export it (tools.export) to start"
            " from its vision tower alone"
        )


def text_tower(config: RunConfig) -> tuple[TextConfig, nn.Module]:
    """Return the text tower's shape and the tower on the meta device. Errors: ConfigError."""
    import torch

    from cogvit.model.pretrained import PretrainedText, inspect_text_encoder
    from cogvit.model.text import TextTower

    with torch.device("meta"):
        if not config.text_encoder.path:
            return config.text, TextTower(config.text)
        spec = inspect_text_encoder(config.text_encoder)
        return spec.shape(config.text.max_tokens), PretrainedText(spec.model_class(spec.config), spec)

"""Stage 3's room: the encoder meets a causal language model, which reads text and images in one sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cogvit.batch import Reads
from cogvit.config import RunConfig
from cogvit.config.recipe import PARTS, frozen_parts
from cogvit.config.rules import Tower, require, vision_tower
from cogvit.errors import CheckpointError, ConfigError
from cogvit.model.language_config import FAMILIES, LanguageConfig, LanguageShape, check_layout, cross_of
from cogvit.stages.protocol import ReadsShards

if TYPE_CHECKING:  # a configuration is checked before any of these is imported
    from torch import nn

    from cogvit.evaluation.examples import Example
    from cogvit.evaluation.subject import Subject
    from cogvit.model.pretrained_language import PretrainedLanguage
    from cogvit.parallel.mesh import Mesh
    from cogvit.stages.cost import Load
    from cogvit.teacher.targets import Targets
    from cogvit.training.feed import Corpus
    from cogvit.training.objective import Objective


@dataclass(frozen=True)
class LanguageStage(ReadsShards):
    """Encoder, adapter and language model, and conversations in which images stand."""

    title: str = "Stage 3: language"
    shows: str = "What is said of held-out images"
    fields: tuple[str, ...] = (
        "language.", "adapter.", "mmtp.", "expert.", "cross.", "video.", "memory.language.", "optim.adapter.",
        "optim.language.", "optim.expert.", "optim.cross.",
        "data.text_tokens_per_pack", "data.zh_fraction",
    )  # fmt: skip
    execution: tuple[str, ...] = ()
    reads: Reads = "conversations"
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    def towers(self, config: RunConfig) -> tuple[Tower, ...]:
        """The vision tower; `check` looks at the language model, whose shape is in a file."""
        return (vision_tower(config),)

    def check(self, config: RunConfig) -> None:
        """Check what images and sequences take, and the language model's layout. Errors: ConfigError."""
        data, own, pool = config.data, config.language, config.adapter.spatial_pool
        require(data.order == "planned", "--data.order sequential has no index, by which conversations are packed")
        _check_images(config)
        _check_parts(config)
        require(own.max_tokens >= 2, f"--language.max-tokens {own.max_tokens} must be at least 2")
        require(
            own.max_tokens <= data.text_tokens_per_pack,
            f"a sample of --language.max-tokens {own.max_tokens} does not fit"
            f" data.text_tokens_per_pack={data.text_tokens_per_pack}; raise that or lower it",
        )
        require(
            pool**2 <= own.max_patches <= data.tokens_per_pack,
            f"--language.max-patches {own.max_patches} must be from {pool**2} to"
            f" data.tokens_per_pack={data.tokens_per_pack}",
        )
        require(
            config.mmtp.depths < own.max_tokens,
            f"--mmtp.depths {config.mmtp.depths} must be below --language.max-tokens {own.max_tokens}",
        )
        shape, parallel = language_shape(config), config.parallel
        require(
            own.max_tokens <= shape.max_tokens,
            f"--language.max-tokens {own.max_tokens} is above the {shape.max_tokens} of {own.path}; lower it",
        )
        check_layout(shape, parallel.tp, parallel.pp)
        _check_family(config, shape)
        require(
            not parallel.sequence or data.text_tokens_per_pack % parallel.tp == 0,
            f"sequence parallelism splits data.text_tokens_per_pack: {data.text_tokens_per_pack} tokens over"
            f" tp={parallel.tp} do not divide",
        )

    def completed(self, config: RunConfig) -> RunConfig:
        """Nothing is left open; looks for --init and the tokenizer, for the errors that they may have."""
        from cogvit.training.restore import check_init
        from data_pipeline.talks import dialog_reader

        if config.init:
            begun = check_init(config)
            there = config.expert if begun is None or not begun.expert.every else begun.expert
            require(
                there == config.expert,
                f"--init {config.init} has visual experts in every {there.every}th block with"
                f" expert.qkv_bias={there.qkv_bias}; pass --expert.every {there.every} and --expert.qkv-bias"
                f" {str(there.qkv_bias).lower()}, or begin with an export of its encoder",
            )
            module = config.cross if begun is None or not begun.cross.image_size else begun.cross
            if module != config.cross:
                raise ConfigError(
                    f"--init {config.init} has a cross module, and not this one: {_difference(module, config.cross)};"
                    " pass the same --cross flags, or begin with an export of its encoder"
                )
        dialog_reader(config.language.path)
        return config

    def asks_actors(self, config: RunConfig) -> bool:
        """Nobody: a text is its own target."""
        return False

    def targets(self, config: RunConfig, corpus: Corpus, mesh: Mesh) -> Targets | None:
        """Nobody makes targets."""
        return None

    def build(self, config: RunConfig, mesh: Mesh, target_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
        """All three parts, of which some may be frozen, and the next-token loss."""
        from cogvit.model.eva import second_encoder
        from cogvit.objective.blindness import Watched
        from cogvit.objective.language import JointModel
        from cogvit.parallel.language import LanguageStage as LanguageModelStage
        from cogvit.parallel.whole import WholeLanguageStage
        from cogvit.training.build import fill_on_device, initial_weights, vision_stage
        from cogvit.training.joint import given_weights

        shape = language_shape(config)
        language: LanguageModelStage | WholeLanguageStage
        if isinstance(shape, LanguageConfig):
            tokens = config.data.text_tokens_per_pack
            language = LanguageModelStage(
                shape, mesh, config.parallel, config.memory.language, num_tokens=tokens, fusion=config.fusion
            )
            given = given_weights(config)
        else:
            language = WholeLanguageStage(shape, mesh, whole_language(config, mesh))
            given = given_weights(config, language)
        cross = second_encoder(config.cross) if config.cross.image_size else None
        model = JointModel(vision_stage(config, mesh), config.adapter, language, frozen_parts(config), cross)
        if model.cross is not None:
            model.cross.recompute = config.memory.vision.recompute != "none"
        fill_on_device(model, mesh, initial_weights(config, given, {}, {}))
        return model, Watched(config.adapter.spatial_pool, framed=model.framed)

    def loads(self, config: RunConfig) -> list[Load]:
        """The encoders and, where it is there, the language model with the adapter that its width decides."""
        from cogvit.stages.cost import adapter_load, cross_load, language_load, vision_load

        vision = vision_load(config)
        second = [cross_load(config)] if config.cross.image_size else []
        if not Path(config.language.path or "?").is_dir():
            return [vision, *second]
        shape = language_shape(config)
        language = language_load(config, shape)
        if vision.learned and not language.whole:  # its visual tokens have to be on the first stage, all of them
            vision = replace(vision, runs_first="in_pipelines")
        return [vision, *second, adapter_load(config, shape), language]

    def concern(self, config: RunConfig, step: int, values: dict[str, float]) -> str:
        """Say so where images are worth nothing once the rates are warm."""
        effect = values.get("image_effect")
        if effect is None or effect > 0.0 or step <= config.schedule.warmup_steps:
            return ""
        return (
            f"warning: step {step}: the model does not look: other images raise the loss by {effect:.4f} nats a token"
            " (image_effect); see whether images reach it (tools.view_batch) and whether the adapter learns"
        )

    def examples(self, subject: Subject) -> list[Example]:
        """What is said of held-out images."""
        from cogvit.evaluation.answers import answer_examples, exams
        from data_pipeline.token_counts import wording_of

        assert subject.joint is not None and subject.config is not None and subject.talks is not None
        found = exams(subject.talks, wording_of(subject.config))
        return answer_examples(subject.joint, list(found))

    def shade(self, pixels: NDArray[np.uint8], key: int, config: RunConfig) -> NDArray[np.uint8]:
        """The image as it is."""
        return pixels


def language_shape(config: RunConfig) -> LanguageShape:
    """Return the shape of a run's language model, with what grows on it: more heads, visual experts, a cross module.

    Errors: ConfigError when it is not there or no causal language model.
    """
    from cogvit.model import pretrained_language

    path = config.language.path
    require(bool(path), "--language.path DIR is needed: a causal language model of transformers with its tokenizer")
    require(
        Path(path).is_dir(),
        f"--language.path {path} does not exist; pass a directory that holds config.json, weights and a tokenizer",
    )
    try:
        shape = pretrained_language.language_shape(Path(path))
        _check_heads(config, shape)
        return replace(shape, mmtp=config.mmtp, expert=config.expert, cross=cross_of(config.cross))
    except CheckpointError as error:
        raise ConfigError(f"--language.path {path}: {error}") from None


def _check_heads(config: RunConfig, shape: LanguageShape) -> None:
    require(
        not config.cross.image_size or config.cross.dim % shape.num_heads == 0,
        f"--cross.dim {config.cross.dim} must be a multiple of the {shape.num_heads} heads of --language.path"
        f" {config.language.path}",
    )


def _difference(one: object, other: object) -> str:
    """The first field in which two of a kind differ, as it is there and here."""
    name = next(name for name, value in vars(one).items() if value != vars(other)[name])
    return f"{name} is {vars(one)[name]} there and {vars(other)[name]} here"


def whole_language(config: RunConfig, mesh: Mesh) -> PretrainedLanguage | None:
    """Return a run's language model of transformers on the last stage, nothing elsewhere.

    Errors: ConfigError, on all ranks.
    """
    from cogvit.model.pretrained_language import PretrainedLanguage

    language, failure = None, None
    try:
        if mesh.is_last_stage:
            language = PretrainedLanguage.from_pretrained(config.language.path)
    except CheckpointError as error:
        failure = ConfigError(f"--language.path: {error}")
    mesh.raise_together(failure)
    return language


def _check_images(config: RunConfig) -> None:
    """Check how large images are shown. Errors: ConfigError."""
    data, own, pool = config.data, config.language, config.adapter.spatial_pool
    square = data.sizing == "square"
    require(
        (square or data.sizing == "glm") and data.grid_multiple == pool,
        f"stage 3 needs --data.sizing glm and --data.grid-multiple {pool}, the adapter's spatial_pool; they are"
        f" {data.sizing} and {data.grid_multiple}",
    )
    require(
        not data.flip and data.crop == 1.0,
        "--data.flip and --data.crop change what stage 3's answers say of an image: its words, sides and boxes; leave"
        " them off",
    )
    rows, columns = config.vision.base_grid
    require(
        not square or (rows % pool == 0 and rows * columns <= own.max_patches),
        f"squares of vision.image_size={config.vision.image_size} px have {rows} x {columns} patches, which"
        f" adapter.spatial_pool={pool} must divide and --language.max-patches {own.max_patches} allow",
    )


def _check_parts(config: RunConfig) -> None:
    """Check which parts are trained. Errors: ConfigError."""
    trained, every = [part for part in PARTS if part not in frozen_parts(config)], config.expert.every
    require(
        not every or ("language" not in trained and config.optim.expert.lr_mult > 0.0),
        f"--expert.every {every} trains visual experts beside a language model that stays as it is: pass"
        " --optim.language.lr-mult 0 and an optim.expert.lr_mult above 0",
    )
    require(
        not config.cross.image_size or config.optim.cross.lr_mult > 0.0,
        f"--cross.image-size {config.cross.image_size} trains a cross module: pass an optim.cross.lr_mult above 0",
    )
    require(
        bool(trained or every or config.cross.image_size),
        "optim.vision.lr_mult, optim.adapter.lr_mult and optim.language.lr_mult are all 0: nothing is trained",
    )
    require(
        not config.mmtp.depths or "language" in trained,
        f"--mmtp.depths {config.mmtp.depths}: the heads learn with the language model, whose"
        " optim.language.lr_mult is 0",
    )


def _check_family(config: RunConfig, shape: LanguageShape) -> None:
    """Check what a language model keeps of its activations, and what grows on it. Errors: ConfigError."""
    memory, stages = config.memory.language, config.parallel.pp
    if isinstance(shape, LanguageConfig):
        blocks, depth = memory.recompute_blocks, shape.depth // stages
        require(
            blocks >= 1 and (memory.recompute != "full" or depth % blocks == 0),
            f"memory.language.recompute_blocks={blocks} must divide the {depth} blocks of a stage",
        )
        return
    path = config.language.path
    require(
        memory.recompute == "none" and not memory.offload,
        f"memory.language is of {', '.join(FAMILIES)}; --language.path {path} is a {shape.family} and keeps its"
        " activations",
    )
    for flag, value, what in (
        ("mmtp.depths", config.mmtp.depths, "heads"),
        ("expert.every", config.expert.every, "visual experts"),
        ("cross.image-size", config.cross.image_size, "cross modules"),
    ):
        require(
            not value,
            f"--{flag} {value}: {what} are of {', '.join(FAMILIES)}; --language.path {path} is a {shape.family}",
        )

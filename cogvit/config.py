"""The run configuration: one frozen tree of dataclasses, strict JSON in and out, one check for what spans fields.

What lives here: the fields, their meaning and the rules between them. Flags are read in `cogvit/flags.py`; presets are
functions in `configs/` that return a RunConfig.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from cogvit.errors import ConfigError
from cogvit.model.config import CogViTConfig, TextConfig

Node = TypeVar("Node")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it is sized and how much of it makes a step."""

    shards: str = option("", "glob, brace range or directory of webdataset shards, local or fsspec URL")
    eval_shards: str = option("", "held-out shards for --eval.every-steps")
    index_dir: str = option("", "where SHARD.parquet lies; beside the shard if empty")
    mixture: tuple[tuple[str, float], ...] = option((), "weights of the index's sources; by their sizes if empty")
    global_batch_images: int = option(256, "images of one optimizer step, over all ranks")
    tokens_per_pack: int = option(4096, "T: patch tokens of one microbatch on one rank")
    images_per_pack: int = option(64, "N: image slots of one microbatch on one rank")
    text_tokens_per_pack: int = option(4096, "L: caption tokens of one microbatch on one rank")
    sizing: Literal["square", "naflex"] = option("naflex", "resize to vision.image_size squares, or keep the aspect")
    max_patches: int = option(256, "naflex: the largest grid an image may have, in patches")
    enlarge: bool = option(False, "naflex: enlarge images that are smaller than max_patches")
    canonical_shares: int = option(8, "C: equal-cost shares of a global batch; fixed for the life of a run")
    lookahead_steps: int = option(16, "shuffle window of the plan, in steps")
    flip: bool = option(False, "mirror half of the images, seeded by sample and epoch")
    zh_fraction: float = option(0.5, "share of Chinese captions where a sample has both languages")
    tokenizer: str = option("byt5", "byt5 (bytes, needs no files), or a transformers tokenizer by name or path")
    prefetch_steps: int = option(2, "steps decoded ahead")
    decode_threads: int = option(1, "threads that decode images on each rank")
    max_bad_fraction: float = option(0.01, "stop when more of the images than this fail to decode")


@dataclass(frozen=True)
class TeacherConfig:
    """One frozen teacher."""

    name: str = option("", "its name in losses and logs")
    path: str = option("", "directory or hub name of a transformers checkpoint (siglip2, siglip or dinov3_vit)")
    weight: float = option(1.0, "weight of its loss")


@dataclass(frozen=True)
class TeachersConfig:
    """The frozen teachers of stage 1 and where their features come from."""

    members: tuple[TeacherConfig, ...] = option((), "the teachers; a member's flag is --teachers.members.NAME.path")
    source: Literal["online", "store", "store_then_online"] = option("online", "Ray actors, a feature store, or both")
    store: str = option("", "directory of tools/precompute_features")
    mask_ratio: float = option(0.35, "share of each image's patches that is masked, exact per image")
    actors_per_teacher: int = option(1, "Ray actors that serve each teacher")
    in_flight_steps: int = option(2, "steps whose features are requested ahead")
    max_wait_s: float = option(300.0, "how long a rank waits for features before the run stops")
    precision: Literal["fp32", "bf16"] = option("fp32", "of the teachers' forward")
    ray_address: str = option("", "cluster to join; starts one on this machine if empty")


@dataclass(frozen=True)
class ContrastConfig:
    """The sigmoid loss of stage 2."""

    loss: Literal["ring", "gather"] = option(
        "ring", "how ranks meet each other's texts: passed around, or all gathered"
    )
    chunk_pairs: int = option(1024, "rows and columns of the largest block of logits; bounds the memory of the loss")
    max_temperature: float = option(1000.0, "the learned temperature counts as this where it is higher")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; rates of the modules are multiples of lr."""

    name: Literal["muon", "adamw", "sgd"] = option("muon", "muon: Muon for matrices of blocks, AdamW for the rest")
    lr: float = option(1e-3, "rate of matrices (muon), or of everything (adamw, sgd)")
    adamw_lr: float = option(1e-3, "muon: rate of what Muon does not handle")
    weight_decay: float = option(0.05, "of every matrix; vectors, norms, biases and temperature have none")
    momentum: float = option(0.95, "muon and sgd")
    beta1: float = option(0.9, "adamw")
    beta2: float = option(0.95, "adamw")
    eps: float = option(1e-8, "adamw")
    clip_norm: float = option(1.0, "global gradient norm; 0 turns clipping off")
    vision_lr_mult: float = option(1.0, "rate of the vision tower")
    text_lr_mult: float = option(1.0, "rate of the text tower")
    projection_lr_mult: float = option(1.0, "rate of projections and distillation heads")
    temperature_lr_mult: float = option(1.0, "rate of the temperature and bias of the sigmoid loss")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning-rate schedule."""

    steps: int = option(1000, "optimizer steps of the run")
    warmup_steps: int = option(100, "linear warm-up from 0")
    kind: Literal["cosine", "linear", "constant"] = option("cosine", "decay after the warm-up")
    final_fraction: float = option(0.0, "rate at the end as a fraction of the peak")


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: a performance choice that never changes the numbers."""

    tp: int = option(1, "tensor-parallel ranks")
    pp: int = option(1, "pipeline stages")
    sequence: bool = option(False, "sequence parallelism over the tensor ranks")
    recompute: Literal["none", "full"] = option("none", "recompute every block's activations in backward")

    def place(self, rank: int) -> tuple[int, int, int]:
        """Return a rank's place on the tp, pp and dp axes: tp is the fastest, dp the slowest."""
        replica_rank, dp_rank = rank % (self.tp * self.pp), rank // (self.tp * self.pp)
        return replica_rank % self.tp, replica_rank // self.tp, dp_rank


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: int = option(1, "1: optimizer state is sharded over dp; 2: gradients too")


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and what is kept."""

    every_steps: int = option(1000, "0 saves at the end only")
    keep_last: int = option(2, "newest checkpoints that are kept (the best by evaluation is kept beside them)")
    keep_every_steps: int = option(0, "checkpoints of multiples of this are kept for good; 0 keeps none of them")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, on data.eval_shards."""

    every_steps: int = option(0, "0 turns it off")
    steps: int = option(2, "global batches of one evaluation")


@dataclass(frozen=True)
class LogConfig:
    """What is logged where; metrics.jsonl is always written."""

    every_steps: int = option(1, "steps between printed lines")
    wandb: Literal["auto", "off"] = option("auto", "auto: online when logged in, offline files otherwise")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    objective: Literal["distill", "contrast"] = option("distill", "stage 1 or stage 2")
    vision: CogViTConfig = field(default_factory=CogViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    proj_dim: int = option(768, "width of the shared image-text space (stage 2)")
    init_log_t: float = option(2.302585092994046, "log temperature at the start (stage 2)")
    init_bias: float = option(-10.0, "bias of the sigmoid loss at the start (stage 2)")
    data: DataConfig = field(default_factory=DataConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: Literal["fp32", "bf16"] = option("fp32", "bf16: fp32 parameters under autocast")
    out: str = option("", "run directory")
    init: str = option("", "run or export whose weights the run starts from")
    seed: int = option(0, "of weights, plan, masks and every other draw")

    def check(self, world_size: int) -> None:
        """Refuse, before any heavy import, what cannot run on world_size processes."""
        _check_layout(self, world_size)
        _check_data(self)
        _check_training(self)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_layout(config: RunConfig, world_size: int) -> None:
    tp, pp = config.parallel.tp, config.parallel.pp
    _require(tp >= 1 and pp >= 1, f"--parallel.tp {tp} and --parallel.pp {pp} must be at least 1")
    _require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into tp={tp} x pp={pp}; start a multiple of {tp * pp}",
    )
    towers: list[tuple[str, CogViTConfig | TextConfig]] = [("vision", config.vision)]
    if config.objective == "contrast":
        towers.append(("text", config.text))
    for name, tower in towers:
        _require(
            tower.num_heads % tp == 0,
            f"--parallel.tp {tp} does not divide {name}.num_heads={tower.num_heads}; use a divisor of it",
        )
        _require(tower.mlp_dim % tp == 0, f"--parallel.tp {tp} does not divide the {name} MLP width {tower.mlp_dim}")
        _require(
            tower.depth % pp == 0,
            f"--parallel.pp {pp} does not divide {name}.depth={tower.depth}; use a divisor of it",
        )
    _require(
        config.zero.stage in (1, 2),
        f"--zero.stage {config.zero.stage} is refused: 0 skips the reduction that the pipeline schedule needs and 3"
        " does not compose with Megatron's shards; use 1 or 2",
    )
    if config.parallel.sequence:
        _require(tp > 1, "--parallel.sequence needs --parallel.tp of 2 or more")
        cls = config.data.images_per_pack if config.vision.use_cls_token else 0
        for what, tokens in (
            ("data.tokens_per_pack", config.data.tokens_per_pack + cls),
            ("data.text_tokens_per_pack", config.data.text_tokens_per_pack),
        ):
            _require(
                tokens % tp == 0, f"sequence parallelism splits {what}: {tokens} tokens over tp={tp} do not divide"
            )


def _check_data(config: RunConfig) -> None:
    data = config.data
    for name in ("global_batch_images", "tokens_per_pack", "images_per_pack", "max_patches", "canonical_shares"):
        _require(getattr(data, name) >= 1, f"data.{name}={getattr(data, name)} must be at least 1")
    rows, columns = config.vision.base_grid
    largest = rows * columns if data.sizing == "square" else data.max_patches
    _require(
        largest <= data.tokens_per_pack,
        f"an image of {largest} patches does not fit data.tokens_per_pack={data.tokens_per_pack}; raise it or lower"
        " data.max_patches",
    )
    if config.objective == "contrast":
        contrast = config.contrast
        _require(contrast.chunk_pairs >= 1, f"contrast.chunk_pairs={contrast.chunk_pairs} must be at least 1")
        _require(
            0.0 < contrast.max_temperature < math.inf,
            f"contrast.max_temperature={contrast.max_temperature} must be positive and finite",
        )
        _require(
            config.text.max_tokens <= data.text_tokens_per_pack,
            f"a caption of text.max_tokens={config.text.max_tokens} does not fit"
            f" data.text_tokens_per_pack={data.text_tokens_per_pack}",
        )
    _require(0.0 <= data.zh_fraction <= 1.0, f"data.zh_fraction={data.zh_fraction} must be in [0, 1]")
    _require(0.0 <= data.max_bad_fraction < 1.0, f"data.max_bad_fraction={data.max_bad_fraction} must be in [0, 1)")


def _check_training(config: RunConfig) -> None:
    optim, schedule = config.optim, config.schedule
    for name in ("lr", "adamw_lr", "weight_decay", "clip_norm", "eps"):
        _require(getattr(optim, name) >= 0.0, f"optim.{name}={getattr(optim, name)} must not be negative")
    for name in ("momentum", "beta1", "beta2"):
        _require(0.0 <= getattr(optim, name) < 1.0, f"optim.{name}={getattr(optim, name)} must be in [0, 1)")
    _require(schedule.steps >= 1, f"--schedule.steps {schedule.steps} must be at least 1")
    _require(schedule.warmup_steps >= 0, f"schedule.warmup_steps={schedule.warmup_steps} must not be negative")
    _require(config.log.every_steps >= 1, f"--log.every-steps {config.log.every_steps} must be at least 1")
    if config.objective == "distill":
        teachers = config.teachers
        _require(bool(teachers.members), "stage 1 needs teachers.members: at least one teacher")
        names = [member.name for member in teachers.members]
        _require(len(set(names)) == len(names) and all(names), f"teacher names must be set and differ: {names}")
        _require(0.0 < teachers.mask_ratio < 1.0, f"teachers.mask_ratio={teachers.mask_ratio} must be in (0, 1)")
        _require(
            teachers.source != "store_then_online",
            "--teachers.source store_then_online is not built yet; use store or online",
        )
        _require(
            not (teachers.source == "store" and config.data.flip),
            "--teachers.source store holds features of images as they are; turn --data.flip off",
        )
        _require(
            teachers.source == "online" or bool(teachers.store),
            f"--teachers.source {teachers.source} needs --teachers.store DIR (make one with tools.precompute_features)",
        )


def to_json(config: Any) -> dict[str, Any]:
    """Return the tree as plain JSON values; `from_json` gives back an equal tree."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[Node], values: dict[str, Any]) -> Node:
    """Build a config dataclass from JSON values. Errors: ConfigError names unknown, missing or mistyped fields."""
    return _build(kind, values, where="")


def load_config(path: Path) -> RunConfig:
    """Read config.json of a run. Errors: ConfigError when it is missing or not JSON."""
    try:
        return from_json(RunConfig, json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is {path.parent} a run directory?") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the configuration'} must be an object, not {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"unknown configuration field {where}{unknown[0]}")
    try:
        return kind(**{name: coerce(hints[name], value, f"{where}{name}") for name, value in values.items()})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where.rstrip('.') or 'configuration'}: {error}") from None


def coerce(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against a field's type and return it as that type."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}={value!r} must be one of {', '.join(map(str, args))}")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            return tuple(coerce(i, v, f"{where}[{n}]") for n, (i, v) in enumerate(zip(items, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}={value!r} is not of type {getattr(hint, '__name__', hint)}")


# What may differ between a run and its resumption: how it is executed, never what it computes.
_EXECUTION = (
    "parallel.", "zero.", "checkpoint.", "eval.", "log.", "out",
    "data.index_dir", "data.eval_shards", "data.tokens_per_pack", "data.images_per_pack", "data.text_tokens_per_pack",
    "data.prefetch_steps", "data.decode_threads", "data.max_bad_fraction",
    "teachers.actors_per_teacher", "teachers.in_flight_steps", "teachers.max_wait_s", "teachers.ray_address",
    "teachers.source", "teachers.store", "contrast.loss", "contrast.chunk_pairs",
)  # fmt: skip


def recipe_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return "field: old -> new" for each difference that makes `new` another run than `old`."""
    before, after = _flatten(to_json(old)), _flatten(to_json(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(_EXECUTION)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

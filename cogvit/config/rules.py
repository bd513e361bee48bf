"""The rules between the fields that every stage has; a stage's own are in its room (`cogvit/stages`).

What cannot run is refused before any heavy import.

Errors: ConfigError with the value, the limit and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cogvit.config.execution import ActivationConfig
from cogvit.config.fields import DataConfig, RunConfig
from cogvit.errors import ConfigError
from cogvit.model.config import CogViTConfig, TextConfig


@dataclass(frozen=True)
class Tower:
    """A tower that Megatron splits over the tensor ranks and pipeline stages."""

    name: str  # of its part of the configuration
    shape: CogViTConfig | TextConfig
    memory: ActivationConfig
    pack_field: str  # which says how many tokens a pack of it has
    pack_tokens: int  # as the tower sees them


def vision_tower(config: RunConfig) -> Tower:
    """Return the vision tower, which every stage has; a CLS token stands before each image's patches."""
    cls = config.data.images_per_pack if config.vision.use_cls_token else 0
    tokens = config.data.tokens_per_pack + cls
    return Tower("vision", config.vision, config.memory.vision, "data.tokens_per_pack", tokens)


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with this message unless it holds."""
    if not holds:
        raise ConfigError(message)


def is_rate(value: float) -> bool:
    """Whether a value is finite and not negative."""
    return 0.0 <= value < math.inf


def check_layout(config: RunConfig, world_size: int, towers: Sequence[Tower]) -> None:
    """Check that world_size processes can be laid out as asked, and each tower over them."""
    tp, pp = config.parallel.tp, config.parallel.pp
    require(tp >= 1 and pp >= 1, f"--parallel.tp {tp} and --parallel.pp {pp} must be at least 1")
    require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into tp={tp} x pp={pp}; start a multiple of {tp * pp}",
    )
    for tower in towers:
        _check_tower(tower, tp, pp)
    dp = world_size // (tp * pp)
    batches = [(config.data.global_batch_images, "--data.global-batch-images")]
    batches += [(images, f"data.batch_schedule from step {step}") for step, images in config.data.batch_schedule]
    images, flag = min(batches)
    require(
        images < 1 or dp <= images,
        f"{dp} data-parallel ranks are more than the {images} images of a step ({flag}): some would have none; start at"
        f" most {images * tp * pp} processes, or raise it to {dp}",
    )
    group = config.contrast.group_ranks
    require(
        group < 1 or dp % group == 0,
        f"contrast.group_ranks={group} does not divide the {dp} dp ranks; 0 lets us choose",
    )
    require(
        config.zero.stage in (1, 2),
        f"--zero.stage {config.zero.stage} is refused: 0 skips the reduction that the pipeline schedule needs and 3"
        " does not compose with Megatron's shards; use 1 or 2",
    )
    for what in ("reduce_bucket_elements", "gather_bucket_elements"):
        require(getattr(config.zero, what) >= 1, f"zero.{what}={getattr(config.zero, what)} must be at least 1")
    require(
        config.parallel.pipeline_messages == "fp32" or config.precision == "bf16",
        "--parallel.pipeline-messages bf16 rounds what --precision fp32 keeps; pass --precision bf16 or leave it",
    )
    if config.parallel.sequence:
        require(tp > 1, "--parallel.sequence needs --parallel.tp of 2 or more")
        for tower in towers:
            what, count = tower.pack_field, tower.pack_tokens
            require(count % tp == 0, f"sequence parallelism splits {what}: {count} tokens over tp={tp} do not divide")


def _check_tower(tower: Tower, tp: int, pp: int) -> None:
    name, shape, memory = tower.name, tower.shape, tower.memory
    require(
        shape.qkv_bias and shape.proj_bias,
        f"{name}.qkv_bias and {name}.proj_bias false are for the plain model; Megatron's layers have all biases",
    )
    require(
        shape.num_heads % tp == 0,
        f"--parallel.tp {tp} does not divide {name}.num_heads={shape.num_heads}; use a divisor of it",
    )
    require(shape.mlp_dim % tp == 0, f"--parallel.tp {tp} does not divide the {name} MLP width {shape.mlp_dim}")
    require(
        shape.depth % pp == 0, f"--parallel.pp {pp} does not divide {name}.depth={shape.depth}; use a divisor of it"
    )
    blocks, depth = memory.recompute_blocks, shape.depth // pp
    require(
        blocks >= 1 and (memory.recompute != "full" or depth % blocks == 0),
        f"memory.{name}.recompute_blocks={blocks} must divide the {depth} blocks of a stage",
    )


def check_data(config: RunConfig) -> None:
    """Check sizes, budgets and shares of the data plane."""
    data = config.data
    for name in (
        "global_batch_images", "tokens_per_pack", "images_per_pack", "max_patches", "grid_multiple", "canonical_shares",
        "lookahead_steps", "decode_threads",
    ):  # fmt: skip
        require(getattr(data, name) >= 1, f"data.{name}={getattr(data, name)} must be at least 1")
    require(
        data.grid_multiple**2 <= data.max_patches,
        f"data.max_patches={data.max_patches} cannot hold one group of data.grid_multiple={data.grid_multiple} squared",
    )
    rows, columns = config.vision.base_grid
    largest = rows * columns if data.sizing == "square" else data.max_patches
    require(
        largest <= data.tokens_per_pack,
        f"an image of {largest} patches does not fit data.tokens_per_pack={data.tokens_per_pack}; raise it or lower"
        " data.max_patches",
    )
    require(
        0 <= data.min_patches <= data.max_patches,
        f"--data.min-patches {data.min_patches} must be from 0 to data.max_patches={data.max_patches}",
    )
    _check_schedules(data)
    _check_shards(data)
    for source, weight in data.mixture:
        require(0.0 < weight < math.inf, f"data.mixture gives {source!r} the weight {weight}; weights are positive")
    require(data.prefetch_steps >= 0, f"data.prefetch_steps={data.prefetch_steps} must not be negative")
    require(0.0 <= data.zh_fraction <= 1.0, f"data.zh_fraction={data.zh_fraction} must be in [0, 1]")
    require(0.0 < data.crop <= 1.0, f"--data.crop {data.crop} must be in (0, 1]: the smallest share of the area kept")
    require(0.0 <= data.color < 1.0, f"--data.color {data.color} must be in [0, 1); 0 turns it off")
    require(
        data.loading == "in_process" or not 0.0 < config.parallel.step_timeout_s <= data.max_wait_s,
        f"parallel.step_timeout_s={config.parallel.step_timeout_s} must be above data.max_wait_s={data.max_wait_s}: a"
        " step may wait that long for a batch of the server",
    )
    require(0.0 <= data.max_bad_fraction < 1.0, f"data.max_bad_fraction={data.max_bad_fraction} must be in [0, 1)")


def _check_schedules(data: DataConfig) -> None:
    """Check budgets, and what changes in the course of the run."""
    for name, schedule in (("batch", data.batch_schedule), ("budget", data.budget_schedule)):
        steps = [step for step, _ in schedule]
        require(
            steps == sorted(set(steps)) and min(steps, default=0) >= 0,
            f"data.{name}_schedule has the steps {steps}; they count from 0 and rise",
        )
    for step, images in data.batch_schedule:
        require(images >= 1, f"data.batch_schedule has {images} images from step {step}; at least 1")
    budgets = [("budgets_patches", data.budgets_patches)] if data.budgets_patches else []
    budgets += [("budget_schedule", of_step) for _, of_step in data.budget_schedule]
    require(
        data.sizing != "square" or not budgets,
        "data.budgets_patches and data.budget_schedule are of --data.sizing naflex and glm; squares have one size",
    )
    for name, patches in budgets:
        require(bool(patches), f"data.{name} has a step without budgets; name at least one")
        for budget in patches:
            require(
                data.grid_multiple**2 <= budget <= data.max_patches,
                f"data.{name} has {budget}; budgets are from {data.grid_multiple**2} to"
                f" data.max_patches={data.max_patches}",
            )


def _check_shards(data: DataConfig) -> None:
    require(0.0 < data.max_wait_s < math.inf, f"data.max_wait_s={data.max_wait_s} must be positive")
    require(data.cache_bytes >= 1, f"data.cache_bytes={data.cache_bytes} must be at least 1")
    planned = data.order == "planned"
    require(0.0 <= data.held_out < 1.0, f"--data.held-out {data.held_out} must be in [0, 1); 0 keeps nothing out")
    for name, default in (
        ("where", ""), ("held_out", 0.0), ("mixture", ()), ("loading", "in_process"), ("batch_schedule", ()),
        ("budget_schedule", ()),
    ):  # fmt: skip
        require(
            planned or getattr(data, name) == default,
            f"--data.order sequential has no index for data.{name}; leave that out, or index the shards",
        )
    for flag, shards, by_offset in (
        ("--data.shards", data.shards, planned), ("--data.eval-shards", data.eval_shards, True),
    ):  # fmt: skip
        require(
            not by_offset or not shards.startswith("pipe:") or bool(data.cache_dir),
            f"{flag} {shards} prints whole shards, and samples are read by offset; pass --data.cache-dir DIR",
        )


def check_training(config: RunConfig) -> None:
    """Check rates, schedule and guard."""
    optim, schedule = config.optim, config.schedule
    for name in ("lr", "adamw_lr", "weight_decay", "clip_norm"):
        require(is_rate(getattr(optim, name)), f"optim.{name}={getattr(optim, name)} must be finite and not negative")
    require(0.0 < optim.eps < 1.0, f"optim.eps={optim.eps} must be in (0, 1): AdamW divides by it where all is 0")
    for name in ("momentum", "beta1", "beta2"):
        require(0.0 <= getattr(optim, name) < 1.0, f"optim.{name}={getattr(optim, name)} must be in [0, 1)")
    for name in ("vision", "text", "projection", "temperature", "bias", "adapter", "language", "expert", "cross"):
        module = getattr(optim, name)
        for what, value in (("lr_mult", module.lr_mult), ("weight_decay", module.weight_decay)):
            require(value is None or is_rate(value), f"optim.{name}.{what}={value} must be finite and not negative")
        fraction = module.final_fraction
        require(fraction is None or 0.0 <= fraction <= 1.0, f"optim.{name}.final_fraction={fraction} must be in [0, 1]")
    require(schedule.steps >= 1, f"--schedule.steps {schedule.steps} must be at least 1")
    require(schedule.warmup_steps >= 0, f"schedule.warmup_steps={schedule.warmup_steps} must not be negative")
    fraction = schedule.final_fraction
    require(0.0 <= fraction <= 1.0, f"schedule.final_fraction={fraction} must be in [0, 1]")
    fraction = schedule.decay_fraction
    require(0.0 < fraction <= 1.0, f"schedule.decay_fraction={fraction} must be in (0, 1]")
    require(config.guard.max_skips >= 0, f"guard.max_skips={config.guard.max_skips} must not be negative")
    for what, value in (
        ("guard.spike_factor", config.guard.spike_factor),
        ("parallel.step_timeout_s", config.parallel.step_timeout_s),
        ("checkpoint.every_minutes", config.checkpoint.every_minutes),
    ):
        require(is_rate(value), f"{what}={value} must be finite and not negative; 0 turns it off")
    for what, count in (
        ("checkpoint.every_steps", config.checkpoint.every_steps),
        ("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps),
        ("eval.every_steps", config.eval.every_steps),
    ):
        require(count >= 0, f"{what}={count} must not be negative; 0 turns it off")
    require(config.eval.steps >= 1, f"eval.steps={config.eval.steps} must be at least 1")
    keep = config.checkpoint.keep_last
    require(keep >= 1, f"checkpoint.keep_last={keep} must be at least 1")
    require(config.log.every_steps >= 1, f"--log.every-steps {config.log.every_steps} must be at least 1")

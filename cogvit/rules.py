"""The rules between the fields of a run's configuration: what cannot run is refused before any heavy import.

Errors: ConfigError with the value, the limit and the way out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cogvit.errors import ConfigError
from cogvit.model.config import CogViTConfig, TextConfig

if TYPE_CHECKING:  # config.py imports this file
    from cogvit.config import DataConfig, RunConfig, TeacherConfig


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _is_rate(value: float) -> bool:
    return 0.0 <= value < math.inf


def check_layout(config: RunConfig, world_size: int) -> None:
    """Check that world_size processes can be laid out as asked."""
    tp, pp = config.parallel.tp, config.parallel.pp
    _require(tp >= 1 and pp >= 1, f"--parallel.tp {tp} and --parallel.pp {pp} must be at least 1")
    _require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into tp={tp} x pp={pp}; start a multiple of {tp * pp}",
    )
    towers: list[tuple[str, CogViTConfig | TextConfig]] = [("vision", config.vision)]
    if config.objective == "contrast" and not config.text_encoder.path:
        towers.append(("text", config.text))
    for name, tower in towers:
        _require(
            tower.qkv_bias and tower.proj_bias,
            f"{name}.qkv_bias and {name}.proj_bias false are for the plain model; Megatron's layers have all biases",
        )
        _require(
            tower.num_heads % tp == 0,
            f"--parallel.tp {tp} does not divide {name}.num_heads={tower.num_heads}; use a divisor of it",
        )
        _require(tower.mlp_dim % tp == 0, f"--parallel.tp {tp} does not divide the {name} MLP width {tower.mlp_dim}")
        _require(
            tower.depth % pp == 0,
            f"--parallel.pp {pp} does not divide {name}.depth={tower.depth}; use a divisor of it",
        )
    dp, images = world_size // (tp * pp), config.data.global_batch_images
    _require(
        config.data.order == "planned" or dp <= images,
        f"--data.order sequential deals data.global_batch_images={images} to {dp} ranks; raise it",
    )
    _require(
        config.zero.stage in (1, 2),
        f"--zero.stage {config.zero.stage} is refused: 0 skips the reduction that the pipeline schedule needs and 3"
        " does not compose with Megatron's shards; use 1 or 2",
    )
    for what in ("reduce_bucket_elements", "gather_bucket_elements"):
        _require(getattr(config.zero, what) >= 1, f"zero.{what}={getattr(config.zero, what)} must be at least 1")
    for name, tower in towers:
        memory = config.memory.vision if name == "vision" else config.memory.text
        blocks, depth = memory.recompute_blocks, tower.depth // pp
        _require(
            blocks >= 1 and (memory.recompute != "full" or depth % blocks == 0),
            f"memory.{name}.recompute_blocks={blocks} must divide the {depth} blocks of a stage",
        )
    if config.parallel.sequence:
        _require(tp > 1, "--parallel.sequence needs --parallel.tp of 2 or more")
        cls = config.data.images_per_pack if config.vision.use_cls_token else 0
        tokens = {"data.tokens_per_pack": config.data.tokens_per_pack + cls}
        if config.objective == "contrast" and not config.text_encoder.path:
            tokens["data.text_tokens_per_pack"] = config.data.text_tokens_per_pack
        for what, count in tokens.items():
            _require(count % tp == 0, f"sequence parallelism splits {what}: {count} tokens over tp={tp} do not divide")


def check_data(config: RunConfig) -> None:
    """Check sizes, budgets and shares of the data plane."""
    data = config.data
    for name in (
        "global_batch_images", "tokens_per_pack", "images_per_pack", "max_patches", "grid_multiple", "canonical_shares",
        "lookahead_steps", "decode_threads",
    ):  # fmt: skip
        _require(getattr(data, name) >= 1, f"data.{name}={getattr(data, name)} must be at least 1")
    _require(
        data.grid_multiple**2 <= data.max_patches,
        f"data.max_patches={data.max_patches} cannot hold one group of data.grid_multiple={data.grid_multiple} squared",
    )
    rows, columns = config.vision.base_grid
    largest = rows * columns if data.sizing == "square" else data.max_patches
    _require(
        largest <= data.tokens_per_pack,
        f"an image of {largest} patches does not fit data.tokens_per_pack={data.tokens_per_pack}; raise it or lower"
        " data.max_patches",
    )
    _check_schedules(data)
    _check_shards(data)
    for source, weight in data.mixture:
        _require(0.0 < weight < math.inf, f"data.mixture gives {source!r} the weight {weight}; weights are positive")
    _require(data.prefetch_steps >= 0, f"data.prefetch_steps={data.prefetch_steps} must not be negative")
    if config.objective == "contrast":
        contrast = config.contrast
        _require(config.proj_dim >= 1, f"--proj-dim {config.proj_dim} must be at least 1")
        for flag, start in (("--init-log-t", config.init_log_t), ("--init-bias", config.init_bias)):
            _require(math.isfinite(start), f"{flag} {start} must be finite")
        _require(contrast.chunk_pairs >= 1, f"contrast.chunk_pairs={contrast.chunk_pairs} must be at least 1")
        _require(
            0.0 < contrast.max_temperature < math.inf,
            f"contrast.max_temperature={contrast.max_temperature} must be positive and finite",
        )
        hottest = math.log(contrast.max_temperature)
        _require(
            config.init_log_t <= hottest,
            f"--init-log-t {config.init_log_t} is above {hottest:.4g}, the logarithm of"
            f" contrast.max_temperature={contrast.max_temperature}; lower the one or raise the other",
        )
        _require(
            config.text.max_tokens <= data.text_tokens_per_pack,
            f"a caption of text.max_tokens={config.text.max_tokens} does not fit"
            f" data.text_tokens_per_pack={data.text_tokens_per_pack}",
        )
    encoder, memory = config.text_encoder.path, config.memory.text
    _require(not encoder or config.objective == "contrast", f"--text-encoder.path {encoder} is of stage 2")
    _require(
        not encoder or (memory.recompute == "none" and not memory.offload),
        f"memory.text is of our own text tower; --text-encoder.path {encoder} keeps its activations",
    )
    _require(0.0 <= data.zh_fraction <= 1.0, f"data.zh_fraction={data.zh_fraction} must be in [0, 1]")
    _require(0.0 < data.crop <= 1.0, f"--data.crop {data.crop} must be in (0, 1]: the smallest share of the area kept")
    _require(0.0 <= data.color < 1.0, f"--data.color {data.color} must be in [0, 1); 0 turns it off")
    _require(
        data.loading == "in_process" or not 0.0 < config.parallel.step_timeout_s <= data.max_wait_s,
        f"parallel.step_timeout_s={config.parallel.step_timeout_s} must be above data.max_wait_s={data.max_wait_s}: a"
        " step may wait that long for a batch of the server",
    )
    _require(0.0 <= data.max_bad_fraction < 1.0, f"data.max_bad_fraction={data.max_bad_fraction} must be in [0, 1)")


def _check_schedules(data: DataConfig) -> None:
    """Check budgets, and what changes in the course of the run."""
    for name, schedule in (("batch", data.batch_schedule), ("budget", data.budget_schedule)):
        steps = [step for step, _ in schedule]
        _require(
            steps == sorted(set(steps)) and min(steps, default=0) >= 0,
            f"data.{name}_schedule has the steps {steps}; they count from 0 and rise",
        )
    for step, images in data.batch_schedule:
        _require(images >= 1, f"data.batch_schedule has {images} images from step {step}; at least 1")
    budgets = [("budgets_patches", data.budgets_patches)] if data.budgets_patches else []
    budgets += [("budget_schedule", of_step) for _, of_step in data.budget_schedule]
    _require(
        data.sizing == "naflex" or not budgets,
        "data.budgets_patches and data.budget_schedule are of --data.sizing naflex; squares have one size",
    )
    for name, patches in budgets:
        _require(bool(patches), f"data.{name} has a step without budgets; name at least one")
        for budget in patches:
            _require(
                data.grid_multiple**2 <= budget <= data.max_patches,
                f"data.{name} has {budget}; budgets are from {data.grid_multiple**2} to"
                f" data.max_patches={data.max_patches}",
            )


def _check_shards(data: DataConfig) -> None:
    _require(0.0 < data.max_wait_s < math.inf, f"data.max_wait_s={data.max_wait_s} must be positive")
    _require(data.cache_bytes >= 1, f"data.cache_bytes={data.cache_bytes} must be at least 1")
    planned = data.order == "planned"
    for name, default in (
        ("where", ""), ("mixture", ()), ("loading", "in_process"), ("batch_schedule", ()), ("budget_schedule", ()),
    ):  # fmt: skip
        _require(
            planned or getattr(data, name) == default,
            f"--data.order sequential has no index for data.{name}; leave that out, or index the shards",
        )
    for flag, shards, by_offset in (
        ("--data.shards", data.shards, planned), ("--data.eval-shards", data.eval_shards, True),
    ):  # fmt: skip
        _require(
            not by_offset or not shards.startswith("pipe:") or bool(data.cache_dir),
            f"{flag} {shards} prints whole shards, and samples are read by offset; pass --data.cache-dir DIR",
        )


def check_training(config: RunConfig) -> None:
    """Check rates, schedule, guard and teachers."""
    optim, schedule = config.optim, config.schedule
    for name in ("lr", "adamw_lr", "weight_decay", "clip_norm"):
        _require(_is_rate(getattr(optim, name)), f"optim.{name}={getattr(optim, name)} must be finite and not negative")
    _require(0.0 < optim.eps < 1.0, f"optim.eps={optim.eps} must be in (0, 1): AdamW divides by it where all is 0")
    for name in ("momentum", "beta1", "beta2"):
        _require(0.0 <= getattr(optim, name) < 1.0, f"optim.{name}={getattr(optim, name)} must be in [0, 1)")
    for name in ("vision", "text", "projection", "temperature", "bias"):
        module = getattr(optim, name)
        for what, value in (("lr_mult", module.lr_mult), ("weight_decay", module.weight_decay)):
            _require(value is None or _is_rate(value), f"optim.{name}.{what}={value} must be finite and not negative")
        fraction = module.final_fraction
        _require(
            fraction is None or 0.0 <= fraction <= 1.0, f"optim.{name}.final_fraction={fraction} must be in [0, 1]"
        )
    _require(schedule.steps >= 1, f"--schedule.steps {schedule.steps} must be at least 1")
    _require(schedule.warmup_steps >= 0, f"schedule.warmup_steps={schedule.warmup_steps} must not be negative")
    fraction = schedule.final_fraction
    _require(0.0 <= fraction <= 1.0, f"schedule.final_fraction={fraction} must be in [0, 1]")
    fraction = schedule.decay_fraction
    _require(0.0 < fraction <= 1.0, f"schedule.decay_fraction={fraction} must be in (0, 1]")
    _require(config.guard.max_skips >= 0, f"guard.max_skips={config.guard.max_skips} must not be negative")
    for what, value in (
        ("guard.spike_factor", config.guard.spike_factor),
        ("parallel.step_timeout_s", config.parallel.step_timeout_s),
        ("checkpoint.every_minutes", config.checkpoint.every_minutes),
    ):
        _require(_is_rate(value), f"{what}={value} must be finite and not negative; 0 turns it off")
    for what, count in (
        ("checkpoint.every_steps", config.checkpoint.every_steps),
        ("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps),
        ("eval.every_steps", config.eval.every_steps),
    ):
        _require(count >= 0, f"{what}={count} must not be negative; 0 turns it off")
    _require(config.eval.steps >= 1, f"eval.steps={config.eval.steps} must be at least 1")
    keep = config.checkpoint.keep_last
    _require(keep >= 1, f"checkpoint.keep_last={keep} must be at least 1")
    _require(config.log.every_steps >= 1, f"--log.every-steps {config.log.every_steps} must be at least 1")
    if config.objective == "distill":
        _check_teachers(config)


def _check_teachers(config: RunConfig) -> None:
    teachers = config.teachers
    _require(bool(teachers.members), "stage 1 needs teachers.members: at least one teacher")
    names = [member.name for member in teachers.members]
    _require(len(set(names)) == len(names) and all(names), f"teacher names must be set and differ: {names}")
    for member in teachers.members:
        _check_teacher(member)
    for name in ("actors_per_teacher", "in_flight_steps"):
        _require(getattr(teachers, name) >= 1, f"teachers.{name}={getattr(teachers, name)} must be at least 1")
    for name, holds in (("actor_cpus", teachers.actor_cpus > 0.0), ("actor_gpus", teachers.actor_gpus >= 0.0)):
        share = getattr(teachers, name)
        _require(
            holds and (share <= 1.0 or share.is_integer()),
            f"teachers.{name}={share} must be a share of one{'' if holds else ' above 0'}, or a whole number of them",
        )
    _require(
        teachers.max_in_flight_bytes >= 1,
        f"teachers.max_in_flight_bytes={teachers.max_in_flight_bytes} must be at least 1",
    )
    _require(0.0 < teachers.max_wait_s < math.inf, f"teachers.max_wait_s={teachers.max_wait_s} must be positive")
    _require(0.0 < teachers.mask_ratio < 1.0, f"teachers.mask_ratio={teachers.mask_ratio} must be in (0, 1)")
    _require(
        teachers.source == "store" or not 0.0 < config.parallel.step_timeout_s <= teachers.max_wait_s,
        f"parallel.step_timeout_s={config.parallel.step_timeout_s} must be above"
        f" teachers.max_wait_s={teachers.max_wait_s}: a step may wait that long for features",
    )
    _require(
        teachers.source == "online" or config.data.order == "planned",
        f"--teachers.source {teachers.source} finds features by the index, and --data.order sequential has none; pass"
        " --teachers.source online",
    )
    for name, off in (("flip", False), ("crop", 1.0), ("color", 0.0)):
        _require(
            teachers.source == "online" or getattr(config.data, name) == off,
            f"--teachers.source {teachers.source} holds features of images as they are, and --data.{name} shows the"
            f" student others; pass --data.{name} {str(off).lower()} or --teachers.source online",
        )
    _require(
        teachers.source == "online" or not (config.data.budgets_patches or config.data.budget_schedule),
        f"--teachers.source {teachers.source} holds features of one size of each image; leave data.budgets_patches and"
        " data.budget_schedule empty, or pass --teachers.source online",
    )
    _require(
        teachers.source == "online" or bool(teachers.store),
        f"--teachers.source {teachers.source} needs --teachers.store DIR (make one with tools.precompute_features)",
    )


def _check_teacher(member: TeacherConfig) -> None:
    _require(
        not member.name.endswith("_summary"), f"teacher {member.name!r}: names that end in _summary are of summaries"
    )
    for what, weight in (("weight", member.weight), ("summary_weight", member.summary_weight)):
        _require(_is_rate(weight), f"{what}={weight} of teacher {member.name!r} must be finite and not negative")
    _require(bool(member.parts), f"teacher {member.name!r} has no loss: weight and summary_weight are both 0")
    _require(member.layer < 0, f"layer={member.layer} of teacher {member.name!r} counts from the end: -1 is the last")

"""The rules of stage 4's fields. Errors: ConfigError with the value, the limit and the way out."""

from __future__ import annotations

import math

from cogvit.config import RunConfig
from cogvit.config.rules import require


def check_policy(config: RunConfig) -> None:
    """Check tasks, rollouts, loss and guard of a run. Errors: ConfigError."""
    _check_data(config)
    _check_rollouts(config)
    own = config.rl
    require(own.loss in ("grpo", "gspo"), f"--rl.loss {own.loss} must be grpo or gspo")
    require(0.0 < own.clip_low <= 1.0, f"rl.clip_low={own.clip_low} must be in (0, 1]")
    require(0.0 < own.clip_high < math.inf, f"rl.clip_high={own.clip_high} must be positive")
    require(
        own.dual_clip == 0.0 or 1.0 + own.clip_high < own.dual_clip < math.inf,
        f"--rl.dual-clip {own.dual_clip:g} must be above {1.0 + own.clip_high:g} (1 + rl.clip_high) and finite; 0 turns"
        " it off",
    )
    for name in ("kl_weight", "min_image_effect"):
        value = getattr(own, name)
        require(0.0 <= value < math.inf, f"rl.{name}={value} must be finite and not negative; 0 turns it off")
    gap = own.max_logprob_gap
    require(gap is None or gap > 0.0, f"rl.max_logprob_gap={gap} must be positive")
    require(
        config.vision.drop_path_rate == 0.0,
        f"vision.drop_path_rate={config.vision.drop_path_rate} trains another policy than the one that answered;"
        " pass 0",
    )
    require(
        config.expert.every == 0,
        f"expert.every={config.expert.every}: visual experts are not trained on answers; pass 0",
    )
    require(
        config.mmtp.depths == 0,
        f"mmtp.depths={config.mmtp.depths}: heads for more tokens are not trained on answers; pass 0",
    )


def _check_data(config: RunConfig) -> None:
    data = config.data
    require(
        not data.shards, f"--data.shards {data.shards} is of stages 1 to 3; stage 4 asks tasks: --rl.tasks NAME,..."
    )
    require(
        config.eval.every_steps == 0,
        f"--eval.every-steps {config.eval.every_steps}: every prompt of stage 4 is new, and its reward is that of"
        " held-out ones; pass 0",
    )
    require(data.loading == "in_process", f"--data.loading {data.loading} is of shards; stage 4 has none")
    require(not data.batch_schedule, "data.batch_schedule is of shards; stage 4 has one batch size")
    for field in ("mixture", "judge"):
        for name, weight in getattr(config.rl, field):
            require(0.0 < weight < math.inf, f"rl.{field} gives {name!r} the weight {weight}; weights are positive")


def _check_rollouts(config: RunConfig) -> None:
    own, answers = config.rl, config.data.global_batch_images
    require(bool(own.tasks), "--rl.tasks NAME,... is needed: what the policy is asked")
    for name in ("group", "max_new_tokens"):
        require(getattr(own, name) >= 1, f"rl.{name}={getattr(own, name)} must be at least 1")
    require(own.group >= 2, f"--rl.group {own.group} must be at least 2: answers are compared with each other")
    require(
        answers % own.group == 0,
        f"--rl.group {own.group} does not divide data.global_batch_images={answers}, the answers of a step",
    )
    require(own.actors >= 0, f"--rl.actors {own.actors} must not be negative; 0: the first rank answers")
    require(0.0 < own.temperature < math.inf, f"rl.temperature={own.temperature} must be positive")
    require(
        own.max_new_tokens < config.language.max_tokens,
        f"--rl.max-new-tokens {own.max_new_tokens} must be below --language.max-tokens {config.language.max_tokens}",
    )
    require(own.judges >= 1, f"rl.judges={own.judges} must be at least 1")
    for name, least in (("actor_cpus", own.actor_cpus > 0.0), ("actor_gpus", own.actor_gpus >= 0.0)):
        share = getattr(own, name)
        require(
            least and (share <= 1.0 or share.is_integer()),
            f"rl.{name}={share} must be a share of one, or a whole number of them",
        )
    require(0.0 < own.task_s < math.inf, f"rl.task_s={own.task_s} must be positive")
    require(own.max_staleness >= 0, f"--rl.max-staleness {own.max_staleness} must not be negative; 0 waits")
    require(
        own.max_staleness == 0 or own.actors > 0,
        f"--rl.max-staleness {own.max_staleness} needs --rl.actors: without any, nobody answers while a step trains",
    )
    require(
        0.0 <= own.abort_after_s < math.inf, f"--rl.abort-after-s {own.abort_after_s} must not be negative; 0: never"
    )
    fraction = own.abort_after_fraction
    require(0.0 < fraction <= 1.0, f"--rl.abort-after-fraction {fraction} must be in (0, 1]; 1: never")
    for flag, aborts in (
        ("--rl.abort-after-s", own.abort_after_s > 0.0),
        ("--rl.abort-after-fraction", fraction < 1.0),
    ):
        require(
            not aborts or own.max_staleness > 0,
            f"{flag} puts answers off, which are then older than a step: it needs --rl.max-staleness 1 or more",
        )

"""Stage 4's room: the model of stage 3 answers tasks, and learns from what its answers were worth."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cogvit.batch import Reads
from cogvit.config import RunConfig
from cogvit.config.recipe import prompts_hash
from cogvit.config.rules import Tower, require
from cogvit.errors import CogViTError, DataError
from cogvit.stages.language import LanguageStage
from cogvit.stages.policy_rules import check_policy

if TYPE_CHECKING:  # a configuration is checked before any of these is imported
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

    from cogvit.batch import DataPosition, StepBatch
    from cogvit.evaluation.examples import Example
    from cogvit.evaluation.subject import Subject
    from cogvit.parallel.mesh import Mesh
    from cogvit.rl.actors import Patience
    from cogvit.rl.judge import Judge
    from cogvit.rl.local import Player
    from cogvit.rl.rollout import RolloutEngine
    from cogvit.rl.rounds import Asking
    from cogvit.rl.speaker import PlainSpeaker
    from cogvit.stages.cost import Load
    from cogvit.teacher.targets import Targets
    from cogvit.training.engine import Engine
    from cogvit.training.feed import Corpus
    from cogvit.training.loop import Guard
    from cogvit.training.objective import Objective

_JOINT = LanguageStage()  # whose model it trains
_ANSWER_S = 600.0


@dataclass(frozen=True)
class PolicyStage:
    """Encoder, adapter and language model as a policy, and tasks that ask it."""

    title: str = "Stage 4: policy"
    shows: str = "What is said in new episodes, several times each, and what that is worth"
    fields: tuple[str, ...] = (
        "rl.", "language.", "adapter.", "memory.language.", "optim.adapter.", "optim.language.",
        "data.text_tokens_per_pack",
    )  # fmt: skip
    execution: tuple[str, ...] = (
        "rl.actors",
        "rl.actor_cpus",
        "rl.actor_gpus",
        "rl.judges",
        "rl.task_s",
        "rl.min_image_effect",
        "rl.max_logprob_gap",
        "rl.without_images",
    )
    reads: Reads = "answers"
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    def towers(self, config: RunConfig) -> tuple[Tower, ...]:
        """Those of stage 3."""
        return _JOINT.towers(config)

    def check(self, config: RunConfig) -> None:
        """Check the model as stage 3 does, and everything of the rollouts. Errors: ConfigError."""
        _JOINT.check(config)
        check_policy(config)

    def completed(self, config: RunConfig) -> RunConfig:
        """Nothing is left open; looks for the tasks, --init and the tokenizer, for the errors that they may have."""
        from cogvit.model.language_config import FAMILIES, LanguageConfig
        from cogvit.rl.judge import check_judges
        from cogvit.rl.prompts import weights_of
        from cogvit.rl.task import tasks_of
        from cogvit.stages.language import language_shape

        require(
            isinstance(language_shape(config), LanguageConfig),
            f"--language.path {config.language.path} is none of {', '.join(FAMILIES)}, which alone answer tasks",
        )
        check_judges([name for name, _ in config.rl.judge])
        sources = tuple(tasks_of(config.rl.tasks))
        for source in (*weights_of(config, sources), *config.rl.without_images):
            require(source in sources, f"{source!r} is no source of --rl.tasks {config.rl.tasks}: {', '.join(sources)}")
        return _JOINT.completed(config)

    def asks_actors(self, config: RunConfig) -> bool:
        """Where actors answer."""
        return config.rl.actors > 0

    def targets(self, config: RunConfig, corpus: Corpus, mesh: Mesh) -> Targets | None:
        """Nobody makes targets."""
        return None

    def build(self, config: RunConfig, mesh: Mesh, target_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
        """Stage 3's model, and the clipped loss of its own answers."""
        from cogvit.objective.policy import Clipping
        from cogvit.objective.reference import Earlier, Reference, check_room
        from cogvit.objective.reinforce import Reinforce
        from cogvit.rl.prompts import weights_of
        from cogvit.rl.task import tasks_of

        own = config.rl
        model, _ = _JOINT.build(config, mesh, target_dims)
        check_room(model, mesh, copies=(own.kl_weight > 0.0) + own.max_staleness)
        # Before a checkpoint is loaded: what the run began with.
        reference = Reference(model) if own.kl_weight > 0.0 else None
        clipping = Clipping(own.loss, own.clip_low, own.clip_high, own.kl_weight, own.dual_clip)
        sources = [*weights_of(config, [*tasks_of(own.tasks)])]
        earlier = Earlier(model, own.max_staleness) if own.max_staleness else None
        pool = config.adapter.spatial_pool
        return model, Reinforce(clipping, sources, own.temperature, pool, reference, earlier)

    def loads(self, config: RunConfig) -> list[Load]:
        """Those of stage 3; rollouts count with nothing."""
        return _JOINT.loads(config)

    def concern(self, config: RunConfig, step: int, values: dict[str, float]) -> str:
        """Nothing that does not stop the run."""
        return ""

    def guard(self, config: RunConfig) -> Guard:
        """A policy that does not look, or whose rollouts and training see different things."""
        from cogvit.rl.guard import PolicyGuard
        from cogvit.rl.prompts import weights_of
        from cogvit.rl.task import tasks_of

        return PolicyGuard(config, [*weights_of(config, [*tasks_of(config.rl.tasks)])]).check

    def examples(self, subject: Subject) -> list[Example]:
        """None: it is asked by its tasks."""
        return []

    def episodes(self, run: Path, config: RunConfig) -> list[Example]:
        """What it answers to prompts that no run has asked."""
        from cogvit.evaluation.episodes import episode_examples
        from cogvit.rl.local import LocalEngine
        from cogvit.rl.prompts import speech_of
        from cogvit.rl.speaker import PlainSpeaker
        from cogvit.rl.task import tasks_of
        from cogvit.training.joint import load_joint

        own, tasks = config.rl, tasks_of(config.rl.tasks)
        speaker = PlainSpeaker(load_joint(run))
        engine = LocalEngine(speaker, tasks, _judge(config), task_s=own.task_s, verify_s=own.task_s)
        engine.set_weights(0, {})
        return episode_examples(engine, tasks, speech_of(config), own.task_s)

    def shade(self, pixels: NDArray[np.uint8], key: int, config: RunConfig) -> NDArray[np.uint8]:
        """The image as it is."""
        return pixels

    @contextmanager
    def rounds(
        self, config: RunConfig, engine: Engine, start: DataPosition, leaving: Callable[[], bool]
    ) -> Iterator[Generator[StepBatch]]:
        """The policy's own answers, of which each step gets those to new prompts."""
        from cogvit.model.chat import image_token_id
        from cogvit.model.pretrained import load_tokenizer
        from cogvit.rl.lesson import Reader
        from cogvit.rl.packs import Packer
        from cogvit.rl.prompts import weights_of
        from cogvit.rl.rounds import rounds
        from cogvit.rl.task import tasks_of
        from cogvit.stages.language import language_shape
        from cogvit.training.joint import limits_of

        tasks, mesh = tasks_of(config.rl.tasks), engine.mesh
        tokenizer = load_tokenizer(Path(config.language.path))
        packer = Packer(
            config,
            Reader(tasks, tokenizer, limits_of(config), config.vision.patch_size, config.video),
            tuple(weights_of(config, [*tasks])),
            image_token_id(tokenizer),
            by_place=language_shape(config).mrope_section is not None,
            embeds=mesh.is_first_stage,
        )
        with ExitStack() as stack:
            asking, failure = None, None
            try:
                asking = _asking(config, start, mesh.device, leaving, stack) if mesh.is_writer else None
            except CogViTError as error:
                failure = error
            mesh.raise_together(failure)
            batches = rounds(engine.model, mesh, asking, packer, start)
            stack.callback(batches.close)
            yield batches


def _asking(
    config: RunConfig, start: DataPosition, device: torch.device, leaving: Callable[[], bool], stack: ExitStack
) -> Asking:
    """Return what the writer has; whoever answers ends with the stack."""
    from cogvit.rl.collect import Collector, Quota
    from cogvit.rl.prompts import prompts, weights_of
    from cogvit.rl.rounds import LEDGER, Asking, ended_requests
    from cogvit.rl.task import tasks_of

    own, ledger = config.rl, Path(config.out) / LEDGER
    if start.plan_hash != prompts_hash(config):
        raise DataError(
            f"--rl.tasks {own.tasks}: the code of a task or judge is not that with which {config.out} began; put it"
            f" back, or go on from its weights in another --out: --init {config.out}"
        )
    ended = ended_requests(ledger, start.step)
    engine = stack.enter_context(closing(_rollouts(config, device, leaving)))
    quota = Quota(
        prompts=config.data.global_batch_images // own.group,
        max_staleness=own.max_staleness,
        abort_after_fraction=own.abort_after_fraction,
        abort_after_s=own.abort_after_s,
    )
    asked = prompts(config, weights_of(config, [*tasks_of(own.tasks)]), ended)
    return Asking(engine, Collector(engine, asked, quota, leaving), ledger)


def _rollouts(config: RunConfig, device: torch.device, leaving: Callable[[], bool]) -> RolloutEngine:
    """Return who answers: this process on its device, or actors of the Ray cluster that it has joined."""
    from cogvit.rl.actors import RayRollouts
    from cogvit.rl.crew import Place
    from cogvit.rl.local import LocalEngine
    from cogvit.rl.task import tasks_of

    own = config.rl
    if not own.actors:
        speaker, tasks = _speaker(config, device), tasks_of(own.tasks)
        return LocalEngine(speaker, tasks, _judge(config), task_s=own.task_s, verify_s=own.task_s, stop=leaving)
    return RayRollouts(
        partial(_player, config),
        partial(_judge, config),
        Place(own.actors, own.actor_cpus, own.actor_gpus),
        Place(own.judges),
        versions_kept=own.max_staleness + 1,
        patience=patience_of(config),
    )


def patience_of(config: RunConfig) -> Patience:
    """Return how long one waits: half of a step's limit for an answer, so that another actor can take over in time."""
    from cogvit.rl.actors import Patience

    return Patience(config.parallel.step_timeout_s / 2 or _ANSWER_S, config.rl.task_s)


def _speaker(config: RunConfig, device: torch.device | str) -> PlainSpeaker:
    from cogvit.rl.speaker import PlainSpeaker
    from cogvit.training.joint import initial_joint

    return PlainSpeaker(initial_joint(config).to(device))


def _player(config: RunConfig) -> Player:
    """Return what an actor has."""
    from cogvit.rl.local import Player
    from cogvit.rl.task import tasks_of

    speaker = _speaker(config, "cuda" if config.rl.actor_gpus else "cpu")
    return Player(speaker, tasks_of(config.rl.tasks), config.rl.task_s)


def _judge(config: RunConfig) -> Judge:
    """Return what says what episodes are worth."""
    from cogvit.rl.judge import judge_of
    from cogvit.rl.task import tasks_of

    return judge_of(config.rl.judge, tasks_of(config.rl.tasks))

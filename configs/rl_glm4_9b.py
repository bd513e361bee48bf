"""Stage 4 at full size: a run of `stage3_glm4_9b` answers tasks on GPUs beside those that train.

sbatch launch/rl.sh rl_glm4_9b --init RUN_OF_STAGE_3 --language.path GLM4_9B --rl.tasks FILE.py:NAME,... --out OUT
"""

from cogvit.config import (
    ActivationConfig,
    CheckpointConfig,
    DataConfig,
    LanguageTowerConfig,
    MemoryConfig,
    ModuleConfig,
    OptimConfig,
    ParallelConfig,
    ReinforcementConfig,
    RunConfig,
    ScheduleConfig,
)
from cogvit.model.config import AdapterConfig
from configs.models import cogvit_l_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="policy",
        vision=cogvit_l_vision(),
        adapter=AdapterConfig("glm"),
        language=LanguageTowerConfig(max_tokens=4096, max_patches=4900),
        rl=ReinforcementConfig(
            group=16,
            max_new_tokens=1024,
            actors=16,
            actor_gpus=1.0,
            judges=8,
            max_staleness=1,
            abort_after_fraction=0.8,
            loss="gspo",
            clip_low=3e-4,
            clip_high=4e-4,
        ),
        data=DataConfig(
            global_batch_images=1024,
            tokens_per_pack=16384,
            images_per_pack=64,
            text_tokens_per_pack=8192,
            sizing="glm",
            min_patches=64,
            max_patches=1225,
            grid_multiple=2,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=1e-6,
            weight_decay=0.0,
            vision=ModuleConfig(lr_mult=0.0),
        ),
        schedule=ScheduleConfig(steps=2_000, warmup_steps=20, kind="constant"),
        parallel=ParallelConfig(tp=2, pp=4, sequence=True),
        memory=MemoryConfig(
            vision=ActivationConfig("full"),
            language=ActivationConfig("full"),
        ),
        checkpoint=CheckpointConfig(every_steps=50, every_minutes=30.0),
        precision="bf16",
    )

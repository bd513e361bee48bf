"""Stage 3 at full size: the 403M encoder meets GLM-4-9B, images up to 490 px on a side from step 10,000 on.

sbatch launch/stage3.sh stage3_glm4_9b --init RUN_OF_STAGE_2 --language.path GLM4_9B --data.shards PATTERN --out OUT
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
    RunConfig,
    ScheduleConfig,
)
from cogvit.model.config import AdapterConfig
from configs.models import cogvit_l_vision

AT_224_PX, AT_490_PX = 256, 1225  # patches of 14 px; whole groups of 2 x 2 below them


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="language",
        vision=cogvit_l_vision(),
        adapter=AdapterConfig("glm"),
        language=LanguageTowerConfig(max_tokens=4096, max_patches=4900),
        data=DataConfig(
            global_batch_images=1024,
            tokens_per_pack=16384,
            images_per_pack=64,
            text_tokens_per_pack=8192,
            sizing="glm",
            min_patches=64,
            max_patches=AT_490_PX,
            budget_schedule=((0, (AT_224_PX,)), (10_000, (AT_490_PX,))),
            grid_multiple=2,
            decode_threads=4,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=2e-5,
            weight_decay=0.0,
            vision=ModuleConfig(lr_mult=0.1),
            adapter=ModuleConfig(lr_mult=5.0),
        ),
        schedule=ScheduleConfig(steps=20_000, warmup_steps=600),
        parallel=ParallelConfig(tp=2, pp=4, sequence=True),
        memory=MemoryConfig(
            vision=ActivationConfig("full"),
            language=ActivationConfig("full"),
        ),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=30.0),
        precision="bf16",
    )

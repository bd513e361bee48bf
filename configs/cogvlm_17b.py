"""CogVLM-17B's second pretraining: captions and referring expressions, 224 px, 490 px from half of the steps on.

The first is the same with --schedule.steps 120000 --data.budget-schedule "[]" --data.max-patches 256, and captions
alone. Boxes stand in the texts as [[x0,y0,x1,y1]]; tools.index_shards leaves out what is longer than six times its
other side, as the published data does.

sbatch launch/stage3.sh cogvlm_17b --init RUN_OF_STAGE_2 --language.path VICUNA_7B --data.shards PATTERN --out OUT
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
from cogvit.model.config import AdapterConfig, ExpertConfig
from configs.models import eva2_clip_e_vision

AT_224_PX, AT_490_PX = 256, 1225  # patches of 14 px, each a token


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="language",
        vision=eva2_clip_e_vision(490),
        adapter=AdapterConfig("swiglu", spatial_pool=1),
        language=LanguageTowerConfig(max_tokens=2048, max_patches=AT_490_PX),
        expert=ExpertConfig(1),
        data=DataConfig(
            global_batch_images=8192,
            tokens_per_pack=9216,
            images_per_pack=40,
            text_tokens_per_pack=16384,
            sizing="glm",
            min_patches=AT_224_PX,
            max_patches=AT_490_PX,
            budget_schedule=((0, (AT_224_PX,)), (30_000, (AT_490_PX,))),
            decode_threads=4,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=1e-4,
            weight_decay=0.05,
            vision=ModuleConfig(lr_mult=0.0),
            language=ModuleConfig(lr_mult=0.0),
        ),
        schedule=ScheduleConfig(steps=60_000, warmup_steps=1000),
        parallel=ParallelConfig(tp=4, sequence=True),
        memory=MemoryConfig(vision=ActivationConfig("full"), language=ActivationConfig("full")),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=30.0),
        precision="bf16",
    )

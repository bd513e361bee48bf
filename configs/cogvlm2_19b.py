"""CogVLM2-19B's shapes, fine-tuned as CogVLM-Chat was: visual experts beside Llama 3, squares of 1344 px, 8K tokens.

python -m tools.plan cogvlm2_19b --nodes 1
sbatch launch/stage3.sh cogvlm2_19b --init RUN_OF_STAGE_2 --language.path LLAMA3_8B --data.shards PATTERN --out OUT
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

AT_1344_PX = 9216  # patches of 14 px; 2 x 2 of them are a token


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="language",
        vision=eva2_clip_e_vision(1344),
        adapter=AdapterConfig("conv"),
        # The shape alone; whoever trains passes a directory with weights and a tokenizer.
        language=LanguageTowerConfig(path="configs/llama3_8b", max_tokens=8192, max_patches=AT_1344_PX),
        expert=ExpertConfig(1, qkv_bias=True),
        data=DataConfig(
            global_batch_images=1024,
            tokens_per_pack=AT_1344_PX,
            images_per_pack=8,
            text_tokens_per_pack=8192,
            sizing="square",
            max_patches=AT_1344_PX,
            grid_multiple=2,
            decode_threads=4,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=1e-5,
            weight_decay=0.0,
            vision=ModuleConfig(lr_mult=0.1),
            language=ModuleConfig(lr_mult=0.0),
        ),
        schedule=ScheduleConfig(steps=6000, warmup_steps=100),
        parallel=ParallelConfig(tp=8, sequence=True),
        memory=MemoryConfig(vision=ActivationConfig("full"), language=ActivationConfig("full")),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=30.0),
        precision="bf16",
    )

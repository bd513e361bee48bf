"""Videos on a laptop's CPU: which of two shapes came first, and when one appeared, by a tiny language model.

python -m tools.make_demo_videos --out runs/demo/videos
python -m tools.index_shards 'runs/demo/videos/train/*.tar'
python -m tools.index_shards 'runs/demo/videos/heldout/*.tar'
launch/local.sh 2 demo_video --out runs/demo/video
"""

from dataclasses import replace

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LanguageTowerConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from cogvit.model.config import AdapterConfig, VideoConfig
from configs.models import demo_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="language",
        vision=replace(demo_vision(), depth=2),
        adapter=AdapterConfig("glm"),
        language=LanguageTowerConfig(path="runs/demo/videos/language", max_tokens=96, max_patches=24),
        video=VideoConfig(frames=6),
        data=DataConfig(
            shards="runs/demo/videos/train/*.tar",
            eval_shards="runs/demo/videos/heldout/*.tar",
            global_batch_images=64,
            tokens_per_pack=1728,
            images_per_pack=432,
            text_tokens_per_pack=4096,
            sizing="glm",
            min_patches=4,
            max_patches=4,  # one token a frame
            grid_multiple=2,
            canonical_shares=2,
            full_packs=False,
        ),
        optim=OptimConfig(lr=4e-3, adamw_lr=2e-3, weight_decay=0.01),
        schedule=ScheduleConfig(steps=300, warmup_steps=20),
        checkpoint=CheckpointConfig(every_steps=100),
        eval=EvalConfig(every_steps=50),
    )

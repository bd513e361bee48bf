"""Everything that defines a run: its fields, the rules between them, and how JSON and the command line spell them.

Presets are functions in `configs/` that return a RunConfig.
"""

from cogvit.config.execution import (
    ActivationConfig,
    CheckpointConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    MemoryConfig,
    ParallelConfig,
    ZeroConfig,
)
from cogvit.config.fields import (
    SUMMARY,
    ContrastConfig,
    DataConfig,
    LanguageTowerConfig,
    ModuleConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TeacherConfig,
    TeachersConfig,
    TextEncoderConfig,
)
from cogvit.config.reinforcement import ReinforcementConfig
from cogvit.config.tree import from_json, load_config, read_config, to_json

__all__ = [
    "SUMMARY",
    "ActivationConfig",
    "CheckpointConfig",
    "ContrastConfig",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "LanguageTowerConfig",
    "LogConfig",
    "MemoryConfig",
    "ModuleConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReinforcementConfig",
    "RunConfig",
    "ScheduleConfig",
    "TeacherConfig",
    "TeachersConfig",
    "TextEncoderConfig",
    "ZeroConfig",
    "from_json",
    "load_config",
    "read_config",
    "to_json",
]

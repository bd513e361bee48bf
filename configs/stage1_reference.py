"""Stage 1 with the reference build's encoder (303M); otherwise as stage1_cogvit_l."""

from dataclasses import replace

from cogvit.config import RunConfig
from configs.models import reference_vision
from configs.stage1_cogvit_l import config as cogvit_l_config


def config() -> RunConfig:
    """Return the preset."""
    return replace(cogvit_l_config(), vision=reference_vision())

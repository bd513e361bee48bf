"""What a run starts from where nobody says otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cogvit import build_param_groups
from cogvit.config import DataConfig, RunConfig, TeacherConfig, TeachersConfig
from cogvit.config.flags import load_preset
from cogvit.config.split import is_split
from cogvit.errors import ConfigError
from cogvit.parallel.mesh import start_mesh
from cogvit.stages import build, check_run, read_run
from cogvit.stages.contrast import first_bias
from cogvit.training.optim import module_config
from tests.dist.runs import Case, run_config
from tests.pool import Pool


def test_the_bias_starts_where_one_pair_in_a_batch_matches() -> None:
    data = DataConfig(global_batch_images=32_768)
    assert first_bias(RunConfig(data=data)) == pytest.approx(-math.log(32_768))
    assert first_bias(RunConfig(data=data, init_bias=-10.0)) == -10.0
    growing = DataConfig(global_batch_images=32_768, batch_schedule=((0, 512), (100, 1024)))
    assert first_bias(RunConfig(data=growing)) == pytest.approx(-math.log(512))


@pytest.mark.parametrize("preset", ["stage2_cogvit_l", "stage2_reference", "stage2_base"])
def test_an_encoder_of_stage_1_goes_on_at_a_lower_rate_and_is_looked_at(preset: str) -> None:
    config = load_preset(preset)
    assert module_config("vision", config.optim).lr_mult < 1 == module_config("text", config.optim).lr_mult
    assert config.eval.every_steps > 0 and is_split(config.data)
    stream = ["--data.order", "sequential", "--data.shards", "x"]
    assert read_run(preset, stream).eval.every_steps == 0  # nothing to split by
    assert read_run(preset, [*stream, "--data.eval-shards", "y"]).eval.every_steps == config.eval.every_steps


def heads_of(rank: int, world: int) -> dict[str, bool]:
    """Whether each head is zero at the start."""
    config = run_config(Case())
    members = (TeacherConfig("siglip2", "x"), TeacherConfig("dinov3", "y", error="cosine"))
    config = RunConfig(vision=config.vision, teachers=TeachersConfig(members=members))
    model, _ = build(config, start_mesh(config.parallel), {"siglip2": 8, "dinov3": 8})
    return {name: not p.any() for name, p in model.named_parameters() if name.startswith("heads.")}


def test_heads_guess_the_mean_at_first_unless_a_cosine_needs_a_direction(pool: Pool) -> None:
    (zero,) = pool.run(heads_of, 1)
    assert zero["heads.siglip2.weight"] and not zero["heads.dinov3.weight"]


def test_tables_are_not_decayed_by_plain_optimizers_either() -> None:
    tower = nn.ModuleDict({"token": nn.Embedding(9, 4), "proj": nn.Linear(4, 4)})
    groups = {group["name"]: group for group in build_param_groups(("text", tower, 1.0))}
    assert [p.shape for p in groups["text.decay"]["params"]] == [torch.Size([4, 4])]
    assert any(p is tower["token"].weight for p in groups["text.nodecay"]["params"])


def test_a_visible_weight_that_is_no_weight_is_refused() -> None:
    members = (TeacherConfig("siglip2", "x"),)
    with pytest.raises(ConfigError, match=r"teachers\.visible_weight=-1\.0"):
        check_run(RunConfig(teachers=TeachersConfig(members=members, visible_weight=-1.0)), 1)

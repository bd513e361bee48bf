"""A cross module on Megatron's layers is the plain model's: loss and every gradient; it begins as the identity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cogvit.config import ActivationConfig, ParallelConfig, ZeroConfig
from cogvit.model.cross import CrossRows, is_cross
from cogvit.model.init import init_tensor
from cogvit.model.language_config import CrossConfig, LanguageConfig, cross_of
from cogvit.parallel.convert import fill
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.mesh import start_mesh
from tests.packs import joint_batch
from tests.parity.test_expert_trunk import COGVLM2, CROSS, EVERYTHING, FROZEN, NO_IMAGE, SPARSE, Row, both_ways
from tests.pool import Pool

COGAGENT = replace(COGVLM2, num_kv_heads=4, cross=cross_of(CROSS))
NO_EXPERTS = replace(SPARSE, cross=cross_of(CROSS))  # beside a language model that learns, and one with a sandwich norm
SHARED = ParallelConfig(tp=2, sequence=True)
ROWS = {
    "sp2": Row(((COGAGENT, FROZEN), (NO_EXPERTS, EVERYTHING)), SHARED),
    "pp2": Row(((COGAGENT, FROZEN), (NO_EXPERTS, NO_IMAGE)), ParallelConfig(pp=2)),
    "one": Row(((COGAGENT, FROZEN), (NO_EXPERTS, EVERYTHING), (NO_EXPERTS, NO_IMAGE))),
    "tp2": Row(((COGAGENT, FROZEN),), ParallelConfig(tp=2)),
    "dp2-zero2": Row(((COGAGENT, FROZEN),), dp=2, zero=ZeroConfig(2, overlap=True)),
    "selective": Row(((COGAGENT, FROZEN),), memory=ActivationConfig("selective")),
    "tp2-pp2-sp-full": Row(
        ((COGAGENT, FROZEN),), ParallelConfig(tp=2, pp=2, sequence=True), memory=ActivationConfig("full", offload=True)
    ),
}
IN_CI = ("tp2-pp2-sp-full",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.long) for name in ROWS])
def test_the_trunk_trains_the_plain_models_cross_module(pool: Pool, name: str) -> None:
    row = ROWS[name]
    for (cfg, frozen), found in zip(row.cases, pool.run(both_ways, row.world, (row,), timeout_s=220.0)[0], strict=True):
        case = f"{cfg.family} frozen {frozen}"
        assert found.loss == pytest.approx(found.expected_loss, rel=1e-6), case
        assert abs(found.effect) > 1e-3 and found.text_is_the_language_models, case
        assert found.gradients.keys() == found.expected.keys()
        assert sum(map(is_cross, found.expected)) == 4 * cfg.depth, case
        assert any(part.startswith("cross.") for part in found.expected), case
        for part, gradient in found.expected.items():
            error = (found.gradients[part] - gradient).norm()
            noise = 1e-6 if part.endswith("qkv.bias") else 0.0
            assert error <= 1e-5 * gradient.norm() + noise, f"{case} {part}: {error / gradient.norm():.1e}"
            if is_cross(part) or part.startswith("cross."):
                assert gradient.any(), f"{case} {part}"


def new_and_without(rank: int, world: int, parallel: ParallelConfig) -> bool:
    """Whether a language model with a new cross module gives of a pack with images what it gives without one."""
    mesh = start_mesh(parallel)
    batch = joint_batch(1, "mixed", by_place=False, framed=True, sharp_patches=CROSS.rows_per_image)
    assert batch.sequence is not None and batch.sharp is not None
    row_EC = torch.randn(len(batch.sharp.patches), CROSS.embed_dim, generator=torch.Generator().manual_seed(0))
    visual_ED = torch.randn(96, COGAGENT.embed_dim, generator=torch.Generator().manual_seed(1))
    seen = []

    def given(cfg: LanguageConfig, cross: CrossRows | None) -> None:
        stage = LanguageStage(cfg, mesh, parallel, ActivationConfig(), num_tokens=96)
        fill(stage.to(mesh.device), mesh, lambda name, shape: init_tensor(name, shape, 0))
        with torch.no_grad():
            seen.append(stage(batch.sequence, visual_ED, cross))

    given(COGAGENT, CrossRows(row_EC, [count * CROSS.rows_per_image for count in batch.sharp.count]))
    given(replace(COGAGENT, cross=CrossConfig()), None)
    return torch.equal(*seen)


def test_a_new_cross_module_changes_nothing(pool: Pool) -> None:
    assert pool.run(new_and_without, 2, (SHARED,), timeout_s=100.0) == [True, True]

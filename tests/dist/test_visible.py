"""What the loss adds at the patches that the student sees: a mean over them, beside the mean over the masked ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cogvit.batch import TeacherTargets
from cogvit.objective.distill import Distill, target_error
from cogvit.objective.masking import mask_tokens
from cogvit.parallel.mesh import start_mesh
from tests.dist.runs import TERMS, Case, micro_of, run_config, start_engine
from tests.packs import MASK_RATIO
from tests.pool import Pool

WEIGHT = 0.5


@torch.no_grad()
def both_ways(rank: int, world: int) -> list[dict[str, float]]:
    """The objective's terms by weight 0 and WEIGHT, and the means of this rank's sums over all ranks' patches."""
    case = Case(world=world)
    mesh = start_mesh(run_config(case).parallel)
    engine, _ = start_engine(case, mesh)
    engine.model.eval()
    micro = micro_of(case, mesh)
    micro[1].images.weight[0] = 0.0
    generator = torch.Generator().manual_seed(rank)
    full, masked, sums = [], [], {}
    for batch in micro:
        mask_T, slot_T = mask_tokens(batch.images, MASK_RATIO), batch.images.segment()
        valid_T = slot_T < batch.images.num_slots
        dims = {name: features.shape[1] for name, features in batch.targets.features.items()}
        features = {name: torch.randn(int(valid_T.sum()), dim, generator=generator) for name, dim in dims.items()}
        full.append(replace(batch, targets=TeacherTargets(features)))
        chosen = {name: one[mask_T[valid_T]] for name, one in features.items()}
        masked.append(replace(batch, targets=TeacherTargets(chosen)))
        patch_TD = engine.model.vision(batch.images, mask_T).patch_TD
        weight_T = batch.images.weight[slot_T[valid_T]]
        for name, target in features.items():
            error_T = target_error(TERMS[name].error, engine.model.heads[name](patch_TD[valid_T]), target) * weight_T
            for what, where in (("", mask_T[valid_T]), ("_visible", ~mask_T[valid_T])):
                sum_and_count = torch.stack([error_T[where].sum(), weight_T[where].sum()])
                sums[name + what] = sums.get(name + what, 0) + sum_and_count
    for total in sums.values():
        torch.distributed.all_reduce(total)
    means = {f"loss_{name}": float(total[0] / total[1]) for name, total in sums.items()}
    objectives = ((Distill(TERMS, MASK_RATIO), masked), (Distill(TERMS, MASK_RATIO, WEIGHT), full))
    found = [objective.evaluate(engine.model, batches, engine.schedule) for objective, batches in objectives]
    return [{name: float(value) for name, value in terms.items()} for terms in found] + [means]


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_at_visible_patches_is_the_mean_over_them(pool: Pool, world: int) -> None:
    for without, terms, means in pool.run(both_ways, world, ()):
        for name, value in means.items():
            assert terms[name] == pytest.approx(value, rel=1e-5), name
        for name, term in TERMS.items():
            assert without[f"loss_{name}"] == pytest.approx(terms[f"loss_{name}"], rel=1e-5)
            assert f"loss_{name}_visible" not in without and term.weight > 0
        seen = sum(term.weight * terms[f"loss_{name}_visible"] for name, term in TERMS.items())
        assert terms["loss"] == pytest.approx(without["loss"] + WEIGHT * seen, rel=1e-5)

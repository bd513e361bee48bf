"""The loss of a teacher's summary is what its definition says, worked out image by image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogvit.objective.masking import mask_tokens
from cogvit.parallel.mesh import start_mesh
from tests.dist.runs import SUMMARY_TERMS, TERMS, Case, micro_of, run_config, start_engine
from tests.packs import MASK_RATIO
from tests.pool import Pool


@torch.no_grad()
def both_ways(rank: int, world: int, case: Case) -> tuple[dict[str, float], float]:
    """The objective's terms, and the mean over images of 1 - cos, where one image does not count."""
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    micro = micro_of(case, mesh)
    micro[1].images.weight[0] = 0.0
    engine.model.eval()
    terms = objective.evaluate(engine.model, micro, engine.schedule)
    errors = []
    for batch in micro:
        features = engine.model.vision(batch.images, mask_tokens(batch.images, MASK_RATIO))
        bounds = batch.images.cu_seqlens.tolist()
        present = [slot for slot, (rows, _) in enumerate(batch.images.grid_hw.tolist()) if rows]
        for target, slot in zip(batch.targets.features["dinov3_summary"], present, strict=True):
            if features.cls_ND is None:
                student = features.patch_TD[bounds[slot] : bounds[slot + 1]].mean(dim=0)
            else:
                student = features.cls_ND[slot]
            if batch.images.weight[slot]:
                errors.append(1.0 - F.cosine_similarity(engine.model.heads["dinov3_summary"](student), target, dim=0))
    return {name: float(term) for name, term in terms.items()}, float(torch.stack(errors).mean())


@pytest.mark.parametrize("family", ["reference", "cogvit_l"])
def test_a_summarys_loss_is_the_mean_over_images(pool: Pool, family: str) -> None:
    ((terms, expected),) = pool.run(both_ways, 1, (Case(family=family, summary=True),))
    assert terms["loss_dinov3_summary"] == pytest.approx(expected, rel=1e-5)
    total = sum(term.weight * terms[f"loss_{name}"] for name, term in (TERMS | SUMMARY_TERMS).items())
    assert terms["loss"] == pytest.approx(total, rel=1e-6)

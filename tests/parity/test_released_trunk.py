"""Released language models of the CogVLM family on Megatron's layers give the logits of the released code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from cogvit import CausalLM, VisionLanguageModel
from cogvit.batch import PackedSequence
from cogvit.config import ActivationConfig, ParallelConfig
from cogvit.model.image_input import pack_shown
from cogvit.model.layouts.released import LAYOUTS, Layout
from cogvit.model.sequence import expert_tokens, part_positions, parts_of_row
from cogvit.parallel.convert import fill
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.parallel.vocabulary import logits_of
from tests.cog import GOLDEN, cog_directory, cog_picture
from tests.pool import Pool

A, B = cog_picture(50, 70), cog_picture(56, 56, seed=1)


def pack_of(model: VisionLanguageModel, layout: Layout) -> tuple[PackedSequence, list[Image]]:
    """The golden prompt as training packs a sample."""
    ids, images = torch.tensor(GOLDEN[layout]["ids"]), [A, B] if layout == "cogvlm2" else [A]
    is_image = ids == model.image_token_id
    parts = parts_of_row(is_image.tolist(), [model.token_grid(image) for image in images], framed=True)
    sequence = PackedSequence(
        ids=ids,
        position=part_positions(parts, by_place=False, framed=True).to(torch.int32),
        cu_seqlens=torch.tensor([0, len(ids), len(ids)], dtype=torch.int32),
        visual_row=torch.where(is_image, is_image.cumsum(0) - 1, -1).to(torch.int32),
        labels=ids,
        weight=torch.zeros(len(ids)),
        key=torch.zeros(1, dtype=torch.int64),
        expert=expert_tokens(parts, framed=True),
    )
    return sequence, images


def logits_on(model: VisionLanguageModel, layout: Layout, parallel: ParallelConfig, mesh: Mesh) -> Tensor:
    """This rank's logits [S, V / tp] of the golden prompt; what it sees comes from the plain encoders."""
    assert isinstance(model.language, CausalLM)
    sequence, images = pack_of(model, layout)
    stage = LanguageStage(model.language.cfg, mesh, parallel, ActivationConfig(), num_tokens=len(sequence.ids))
    weights = {name: weight.detach() for name, weight in model.language.named_parameters()}
    fill(stage.to(mesh.device), mesh, lambda name, shape: weights[name])
    visual_ED = model.encode_images(pack_shown(images, model.limits, model.vision.cfg.patch_size, mesh.device))
    read = model.embedded([sequence.ids], [images])
    return logits_of(stage(sequence, visual_ED, read.cross), stage.head_weight)


@torch.no_grad()
def every_layout(rank: int, world: int, parallel: ParallelConfig, root: Path) -> dict[Layout, Tensor]:
    mesh = start_mesh(parallel)
    models = {layout: VisionLanguageModel.from_pretrained(root / layout) for layout in LAYOUTS}
    return {layout: logits_on(model, layout, parallel, mesh) for layout, model in models.items()}


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(tp=2, sequence=True)],
    ids=("tp1", "tp2", "tp2-sp"),
)
def test_logits_are_those_of_the_released_code(pool: Pool, tmp_path: Path, parallel: ParallelConfig) -> None:
    for layout in LAYOUTS:
        cog_directory(layout, tmp_path / layout)
    shares = pool.run(every_layout, parallel.tp, (parallel, tmp_path), timeout_s=120.0)
    for layout in LAYOUTS:
        logits = torch.cat([share[layout] for share in shares], dim=-1)
        assert (logits - torch.tensor(GOLDEN[layout]["logits"])).abs().max() <= 1e-5, layout

"""Stage 2: the sigmoid loss over every image-text pair of the global batch.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343), divided by the number of
pairs on the diagonal. Pairs whose captions are equal or translations of one another are not negatives and are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvit.batch import Batch
from cogvit.config import ContrastConfig
from cogvit.model.tokens import PackedFeatures, pool_mean
from cogvit.objective.distill import reduce_terms
from cogvit.objective.pairwise import Groups, Pairs, SigmoidGradients, sigmoid_gradients
from cogvit.parallel.encoder import TextStage, VisionStage, WholeTextStage
from cogvit.parallel.schedule import Schedule
from cogvit.parallel.stage import TrunkStage


class ContrastModel(nn.Module):
    """This rank's stages of both towers; projections, temperature and bias live on the last stage.

    text: None where the text tower lies whole on another stage.
    """

    def __init__(
        self, vision: VisionStage, text: TextStage | WholeTextStage | None, proj_dim: int, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.vision, self.text, self.recompute = vision, text, recompute
        if vision.trunk.mesh.is_last_stage:
            assert text is not None, "the last stage has a text tower"
            self.vision_proj = nn.Linear(vision.cfg.embed_dim, proj_dim)
            self.text_proj = nn.Linear(text.dim, proj_dim)
            # Shape [1]: DeepSpeed's broadcast cannot take 0-dim parameters.
            self.log_t = nn.Parameter(torch.zeros(1))
            self.bias = nn.Parameter(torch.zeros(1))

    def pool_image(self, features: PackedFeatures, batch: Batch) -> Tensor:
        """[N, D] means over each image's patches, fp32."""
        return pool_mean(features.patch_TD, batch.images.segment(), batch.images.num_slots)

    def embed_image(self, pooled_ND: Tensor) -> Tensor:
        """[N, E] unit vectors."""
        return self._project(self.vision_proj, pooled_ND)

    def embed_text(self, pooled_ND: Tensor) -> Tensor:
        """[N, E] unit vectors."""
        return self._project(self.text_proj, pooled_ND)

    def _project(self, linear: nn.Linear, pooled_ND: Tensor) -> Tensor:
        def unit(x_ND: Tensor) -> Tensor:
            return F.normalize(linear(x_ND), dim=-1)

        x_ND = pooled_ND.float()
        return checkpoint(unit, x_ND, use_reentrant=False) if self.recompute else unit(x_ND)


@dataclass(frozen=True)
class _Tower:
    """One tower on the microbatches of a step, as the passes see it."""

    trunk: TrunkStage | None  # None where the tower lies whole on the last stage
    forward: Callable[[int], Any]
    pool: Callable[[Any, int], Tensor]  # what the last stage gives for a microbatch to [N, D]
    embed: Callable[[Tensor], Tensor]  # [N, D] to unit vectors [N, E]


@dataclass(frozen=True)
class Contrast:
    """The sigmoid objective on two towers: one pass where one microbatch meets one stage, else two.

    Two passes: the first computes all embeddings without gradients, the loss turns them into embedding gradients, the
    second backs those through the towers, so the result is that of the global batch for any number of microbatches.
    A locked tower has the first pass alone; its projection still learns.
    """

    config: ContrastConfig
    groups: Groups
    locked: tuple[Literal["vision", "text"], ...] = ()

    def train(self, model: ContrastModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Leave the gradients of one step on the parameters; returns the global loss (0-dim tensor)."""
        if schedule.mesh.pp_size == 1 and len(micro) == 1 and not self.locked:
            local = self._one_pass(model, micro, schedule)
        else:
            local = self._two_passes(model, micro, schedule)
        return _terms(model, local, schedule, self.config)

    def evaluate(self, model: ContrastModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the loss without gradients."""
        towers = _towers(model, micro)
        pooled = [_pooled(tower, len(micro), schedule) for tower in towers.values()]
        local = torch.zeros((), device=schedule.mesh.device)
        if schedule.mesh.is_last_stage:
            image, text = (tower.embed(x) for tower, x in zip(towers.values(), pooled, strict=True))
            local = self._compare(model, image, text, micro, schedule).loss
        return _terms(model, local, schedule, self.config)

    def _compare(
        self, model: ContrastModel, image_nE: Tensor, text_nE: Tensor, micro: Sequence[Batch], schedule: Schedule
    ) -> SigmoidGradients:
        return sigmoid_gradients(
            image_nE, text_nE, _pairs(micro), model.log_t, model.bias, schedule.mesh, self.groups, self.config
        )

    def _one_pass(self, model: ContrastModel, micro: Sequence[Batch], schedule: Schedule) -> Tensor:
        towers = _towers(model, micro).values()

        def forward(index: int) -> list[Any]:
            return [tower.forward(index) for tower in towers]

        def loss(outputs: list[Any], index: int) -> tuple[Tensor, Tensor]:
            image, text = (tower.embed(tower.pool(out, index)) for tower, out in zip(towers, outputs, strict=True))
            g = self._compare(model, image, text, micro, schedule)
            return (image * g.image).sum() + (text * g.text).sum() + _surrogate(g, model), g.loss

        return schedule.forward_backward(model.vision.trunk, forward, 1, loss)[0]

    def _two_passes(self, model: ContrastModel, micro: Sequence[Batch], schedule: Schedule) -> Tensor:
        towers = _towers(model, micro)
        pooled = {name: _pooled(tower, len(micro), schedule) for name, tower in towers.items()}
        loss = torch.zeros((), device=schedule.mesh.device)
        gradients: dict[str, Tensor] = {}
        if schedule.mesh.is_last_stage:
            with torch.no_grad():
                image, text = (towers[name].embed(pooled[name]) for name in ("vision", "text"))
            found = self._compare(model, image, text, micro, schedule)
            _back(_surrogate(found, model), schedule)
            loss, gradients = found.loss, {"vision": found.image, "text": found.text}
        for name, tower in towers.items():
            if name not in self.locked:
                _train_tower(tower, gradients.get(name), len(micro), schedule)
            elif schedule.mesh.is_last_stage:
                _back((tower.embed(pooled[name]) * gradients[name]).sum(), schedule)
        return loss


def _towers(model: ContrastModel, micro: Sequence[Batch]) -> dict[str, _Tower]:
    text: Any = model.text
    return {
        "vision": _Tower(
            model.vision.trunk,
            forward=lambda index: model.vision(micro[index].images),
            pool=lambda features, index: model.pool_image(features, micro[index]),
            embed=model.embed_image,
        ),
        "text": _Tower(
            None if text is None else text.trunk,
            forward=lambda index: text(micro[index].text, micro[index].images.key),
            pool=lambda pooled_ND, index: pooled_ND,
            embed=model.embed_text,
        ),
    }


def _pooled(tower: _Tower, num_micro: int, schedule: Schedule) -> Tensor:
    """The first pass of a tower: [n, D] over all microbatches, nothing on stages that hold no loss."""
    pooled = schedule.forward_only(tower.trunk, tower.forward, num_micro, tower.pool)
    return torch.cat(pooled) if pooled else torch.empty(0)


def _train_tower(tower: _Tower, d_embed_nE: Tensor | None, num_micro: int, schedule: Schedule) -> None:
    """The second pass of a tower, which backs the embeddings' gradients through it."""

    def loss(output: Any, index: int) -> tuple[Tensor, None]:
        assert d_embed_nE is not None, "the last stage has gradients"
        embed_NE = tower.embed(tower.pool(output, index))
        slots = len(embed_NE)  # of every pack
        return (embed_NE * d_embed_nE[index * slots : (index + 1) * slots]).sum(), None

    schedule.forward_backward(tower.trunk, tower.forward, num_micro, loss)


def _back(share: Tensor, schedule: Schedule) -> None:
    """Back this rank's share of the global loss through what no schedule runs; DeepSpeed averages it over dp."""
    (share * schedule.mesh.dp_size).backward()


def _pairs(micro: Sequence[Batch]) -> Pairs:
    texts = [batch.text for batch in micro if batch.text is not None]
    assert len(texts) == len(micro), "stage 2 needs captions"
    return Pairs(
        torch.cat([text.caption_id for text in texts]),
        torch.cat([text.concept_id for text in texts]),
        torch.cat([b.images.weight * text.weight for b, text in zip(micro, texts, strict=True)]),
    )


def _surrogate(gradients: SigmoidGradients, model: ContrastModel) -> Tensor:
    """A scalar whose gradient is that of the temperature and bias."""
    return (model.log_t * gradients.log_t).sum() + (model.bias * gradients.bias).sum()


def _terms(model: ContrastModel, local: Tensor, schedule: Schedule, config: ContrastConfig) -> dict[str, Tensor]:
    mesh = schedule.mesh
    share = torch.stack([local, torch.zeros_like(local), torch.zeros_like(local)])
    if mesh.is_last_stage and mesh.dp_rank == 0:
        share[1] = model.log_t.detach().exp().clamp(max=config.max_temperature)[0]
        share[2] = model.bias.detach()[0]
    loss, temperature, bias = reduce_terms(share, schedule)
    return {"loss": loss, "temperature": temperature, "bias": bias}

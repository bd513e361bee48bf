"""Stage 2: the sigmoid loss over every image-text pair of the global batch.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343), divided by the number of
pairs on the diagonal. Pairs whose captions are equal or translations of one another are not negatives and are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvit.batch import Batch
from cogvit.config import ContrastConfig
from cogvit.model.tokens import PackedFeatures, pool_mean
from cogvit.objective.distill import reduce_terms
from cogvit.objective.pairwise import Pairs, SigmoidGradients, sigmoid_gradients
from cogvit.parallel.encoder import TextStage, VisionStage
from cogvit.parallel.schedule import Schedule


class ContrastModel(nn.Module):
    """This rank's stages of both towers; projections, temperature and bias live on the last stage."""

    def __init__(self, vision: VisionStage, text: TextStage, proj_dim: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.vision, self.text, self.recompute = vision, text, recompute
        if vision.trunk.mesh.is_last_stage:
            self.vision_proj = nn.Linear(vision.cfg.embed_dim, proj_dim)
            self.text_proj = nn.Linear(text.cfg.embed_dim, proj_dim)
            # Shape [1]: DeepSpeed's broadcast cannot take 0-dim parameters.
            self.log_t = nn.Parameter(torch.zeros(1))
            self.bias = nn.Parameter(torch.zeros(1))

    def embed_image(self, features: PackedFeatures, batch: Batch) -> Tensor:
        """[N, E] unit vectors, mean-pooled over each image's patches."""
        images = batch.images
        return self._project(self.vision_proj, pool_mean(features.patch_TD, images.segment(), images.num_slots))

    def embed_text(self, pooled_ND: Tensor) -> Tensor:
        """[N, E] unit vectors."""
        return self._project(self.text_proj, pooled_ND)

    def _project(self, linear: nn.Linear, pooled_ND: Tensor) -> Tensor:
        def unit(x_ND: Tensor) -> Tensor:
            return F.normalize(linear(x_ND), dim=-1)

        x_ND = pooled_ND.float()
        return checkpoint(unit, x_ND, use_reentrant=False) if self.recompute else unit(x_ND)


@dataclass(frozen=True)
class Contrast:
    """The sigmoid objective on two towers: one pass where one microbatch meets one stage, else two.

    Two passes: the first computes all embeddings without gradients, the loss turns them into embedding gradients, the
    second backs those through the towers, so the result is that of the global batch for any number of microbatches.
    """

    config: ContrastConfig

    def train(self, model: ContrastModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Leave the gradients of one step on the parameters; returns the global loss (0-dim tensor)."""
        if schedule.mesh.pp_size == 1 and len(micro) == 1:
            local = _one_pass(model, micro[0], schedule, self.config)
        else:
            local = _two_passes(model, micro, schedule, self.config)
        return _terms(model, local, schedule, self.config)

    def evaluate(self, model: ContrastModel, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the loss without gradients."""
        gradients = _embed_and_compare(model, micro, schedule, self.config)
        local = torch.zeros((), device=schedule.mesh.device) if gradients is None else gradients.loss
        return _terms(model, local, schedule, self.config)


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


def _one_pass(model: ContrastModel, batch: Batch, schedule: Schedule, config: ContrastConfig) -> Tensor:
    def forward(index: int) -> tuple[PackedFeatures, Tensor]:
        return model.vision(batch.images), model.text(batch.text, batch.images.key)

    def loss(towers: tuple[PackedFeatures, Tensor], index: int) -> tuple[Tensor, Tensor]:
        image, text = model.embed_image(towers[0], batch), model.embed_text(towers[1])
        g = sigmoid_gradients(image, text, _pairs([batch]), model.log_t, model.bias, schedule.mesh, config)
        return (image * g.image).sum() + (text * g.text).sum() + _surrogate(g, model), g.loss

    return schedule.forward_backward(model.vision.trunk, forward, 1, loss)[0]


def _embed_and_compare(
    model: ContrastModel, micro: Sequence[Batch], schedule: Schedule, config: ContrastConfig
) -> SigmoidGradients | None:
    """The first pass; None on stages that hold no loss."""
    images = schedule.forward_only(
        model.vision.trunk,
        lambda i: model.vision(micro[i].images),
        len(micro),
        lambda out, i: model.embed_image(out, micro[i]),
    )
    texts = schedule.forward_only(
        model.text.trunk,
        lambda i: model.text(micro[i].text, micro[i].images.key),
        len(micro),
        lambda out, i: model.embed_text(out),
    )
    if not schedule.mesh.is_last_stage:
        return None
    return sigmoid_gradients(
        torch.cat(images), torch.cat(texts), _pairs(micro), model.log_t, model.bias, schedule.mesh, config
    )


def _two_passes(model: ContrastModel, micro: Sequence[Batch], schedule: Schedule, config: ContrastConfig) -> Tensor:
    gradients = _embed_and_compare(model, micro, schedule, config)
    slots = micro[0].images.num_slots

    def image_loss(features: PackedFeatures, index: int) -> tuple[Tensor, None]:
        assert gradients is not None
        d_image = gradients.image[index * slots : (index + 1) * slots]
        value = (model.embed_image(features, micro[index]) * d_image).sum()
        return (value + _surrogate(gradients, model) if index == 0 else value), None

    def text_loss(pooled_ND: Tensor, index: int) -> tuple[Tensor, None]:
        assert gradients is not None
        d_text = gradients.text[index * slots : (index + 1) * slots]
        return (model.embed_text(pooled_ND) * d_text).sum(), None

    schedule.forward_backward(model.vision.trunk, lambda i: model.vision(micro[i].images), len(micro), image_loss)
    schedule.forward_backward(
        model.text.trunk, lambda i: model.text(micro[i].text, micro[i].images.key), len(micro), text_loss
    )
    return torch.zeros((), device=schedule.mesh.device) if gradients is None else gradients.loss


def _terms(model: ContrastModel, local: Tensor, schedule: Schedule, config: ContrastConfig) -> dict[str, Tensor]:
    mesh = schedule.mesh
    share = torch.stack([local, torch.zeros_like(local), torch.zeros_like(local)])
    if mesh.is_last_stage and mesh.dp_rank == 0:
        share[1] = model.log_t.detach().exp().clamp(max=config.max_temperature)[0]
        share[2] = model.bias.detach()[0]
    loss, temperature, bias = reduce_terms(share, schedule)
    return {"loss": loss, "temperature": temperature, "bias": bias}

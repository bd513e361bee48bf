"""A language model of transformers as the last stage of a pipeline: no stage and no tensor rank shares it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cogvit.batch import PackedSequence
from cogvit.model.cross import CrossRows
from cogvit.model.language import place_visual
from cogvit.model.language_config import LanguageShape, check_layout
from cogvit.model.pretrained_language import PretrainedLanguage, WholeLanguage
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.vocabulary import loss_in_chunks


class WholeLanguageStage(WholeLanguage):
    """What `LanguageStage` is to a language model of ours, with everything on the last stage and nothing elsewhere.

    Args:
        cfg: its sizes.
        mesh: without tensor ranks.
        language: the model, on the last stage.

    Errors: ConfigError when the layout would divide it.
    """

    trunk = None

    def __init__(self, cfg: LanguageShape, mesh: Mesh, language: PretrainedLanguage | None) -> None:
        check_layout(cfg, mesh.tp_size, mesh.pp_size)
        super().__init__(cfg, None if language is None else language.model)
        self.mesh = mesh

    def forward(
        self, sequence: PackedSequence, visual_ED: Tensor | None = None, cross: CrossRows | None = None
    ) -> Tensor:
        """Return what the head reads [S, D]; on the last stage.

        Args:
            sequence: the pack; its ids are of the vocabulary, which is not looked at here.
            visual_ED: the adapter's output: `sequence.visual_row` names its rows.
            cross: none.
        """
        x_SD = place_visual(self.embed(sequence.ids), visual_ED, sequence.visual_row)
        return self.hidden(x_SD, sequence.position)

    def losses(self, hidden_SD: Tensor, sequence: PackedSequence, visual_ED: Tensor | None = None) -> Tensor:
        """Return the sum over the pack's labels of weight times cross entropy in nats, [1] fp32.

        Args:
            hidden_SD: what `forward` gave.
            sequence: the pack.
            visual_ED: of no use: there are no heads for more tokens.
        """
        count = None if sequence.host is None else sequence.host.labels
        return loss_in_chunks(self._chunk_loss, hidden_SD, sequence.labels, sequence.weight, count).unsqueeze(0)

    def _chunk_loss(self, hidden_RD: Tensor, label_R: Tensor, weight_R: Tensor) -> Tensor:
        loss_R = F.cross_entropy(self.logits(hidden_RD).float(), label_R, reduction="none")
        return (loss_R * weight_R).sum()

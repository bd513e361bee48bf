"""A causal language model of transformers as it is: any family that ours does not build.

Samples of a pack are told apart by their positions, from which transformers makes the mask of a packed row. What a
family makes of that is not taken on trust: a model is tried out when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvit.batch import PackedSequence
from cogvit.errors import CheckpointError
from cogvit.model.attention import Segments
from cogvit.model.config import ExpertConfig
from cogvit.model.cross import CrossRows
from cogvit.model.decoder import KeyValueCache
from cogvit.model.drafting import Drafted, Prompt
from cogvit.model.expert import ExpertRows
from cogvit.model.generation import Sampling, check_width, next_tokens
from cogvit.model.language import CausalLM, place_visual
from cogvit.model.language_config import FAMILIES, LanguageShape
from cogvit.model.layouts.causal_lm import read_generation, read_ids, read_shape
from cogvit.model.layouts.files import CONFIG, read_json
from cogvit.model.pretrained import inspect_causal_lm, load_causal_lm

_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
_NO_LIMIT = 2**31 - 1  # tokens of a model that names none
_TRIED = (9, 6)  # tokens of the two samples that a model is tried out with
_ROUNDING = 1e-3  # of the largest logit


class WholeLanguage(nn.Module):
    """A causal language model of transformers on packs; it has no dropout, as none of the models.

    Attributes:
        cfg: its sizes.
        model: of transformers, in eval mode always; None on stages of a pipeline that have no part of it.
    """

    def __init__(self, cfg: LanguageShape, model: Any) -> None:
        """Take a model of transformers and what is known of it."""
        super().__init__()
        self.cfg = cfg
        self.model: Any = None if model is None else model.eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module, not of the model."""
        self.training = mode
        return self

    @property
    def embed(self) -> nn.Embedding:
        """The table of its vocabulary, with what a family does to what it gives."""
        table: nn.Embedding = self.model.get_input_embeddings()
        return table

    def hidden(
        self,
        x_SD: Tensor,
        position_3S: Tensor,
        segments: Segments | None = None,
        cache: KeyValueCache | None = None,
        expert: ExpertRows | None = None,
        cross: CrossRows | None = None,
    ) -> Tensor:
        """Return what the head reads of a pack, [S, D].

        Args:
            x_SD: embedded tokens.
            position_3S: as in `CausalLM`; each sample counts from 0, which tells them apart.
            segments: as in `CausalLM`, like what follows; nothing of these is asked for here.
            cache: none.
            expert: none.
            cross: none.
        """
        read = self.model.base_model(
            inputs_embeds=x_SD.unsqueeze(0), position_ids=position_3S[:1].long(), use_cache=False
        )
        hidden_SD: Tensor = read.last_hidden_state[0]
        return hidden_SD

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [..., V] of what `hidden` gave."""
        config, logits = self.model.config, self.model.get_output_embeddings()(hidden)
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        if cap:
            logits = torch.tanh(logits / cap) * cap
        factor, divisor = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        scaled: Tensor = logits * factor / divisor  # Cohere; Granite
        return scaled


class PretrainedLanguage(WholeLanguage):
    """A causal language model of transformers with the calls of `CausalLM`.

    Attributes:
        mtp: None, it has no heads for more tokens.
    """

    mtp = None

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Return [..., D]. Errors: ValueError when an id is not of the vocabulary."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.cfg.vocab_size:
            low, high = int(ids.min()), int(ids.max())
            raise ValueError(f"token ids are {low} to {high}; expected 0 to {self.cfg.vocab_size - 1}")
        embedded: Tensor = self.embed(ids)
        return embedded

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits [B, T, V] of token ids [B, T] without padding, as transformers gives them."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def forward_packed(
        self, sequence: PackedSequence, visual_ED: Tensor | None = None, cross: CrossRows | None = None
    ) -> Tensor:
        """Return what the head reads of a pack, [S, D], as `CausalLM` does. Errors: ValueError for an unknown id."""
        return self.hidden(
            place_visual(self.embed_ids(sequence.ids), visual_ED, sequence.visual_row), sequence.position
        )

    def stream(
        self,
        x_SD: Tensor,
        position_3S: Tensor,
        segments: Segments,
        sampling: Sampling,
        expert: ExpertRows | None = None,
        cross: CrossRows | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next id of every prompt of a pack, [B], until all have ended; each is answered by itself.

        The arguments are those of `CausalLM.stream`. Errors: ValueError when a prompt is empty or prompt and answer
        exceed `cfg.max_tokens`.
        """
        lengths = segments.lengths[: segments.num_valid]
        check_width(lengths, sampling, self.cfg.max_tokens)
        answers = [self._answer(x_TD, sampling, row) for row, x_TD in enumerate(x_SD.split(lengths))]
        ended = [False] * len(answers)
        for _ in range(sampling.max_new_tokens):
            ids = [self.cfg.fill_id if end else int(next(one)) for one, end in zip(answers, ended, strict=True)]
            yield torch.tensor(ids, device=x_SD.device)
            ended = [end or id_ in self.cfg.eos_ids for id_, end in zip(ids, ended, strict=True)]
            if all(ended):
                return

    @torch.no_grad()
    def _answer(self, x_TD: Tensor, sampling: Sampling, row: int) -> Iterator[Tensor]:
        cache = None
        for step in range(sampling.max_new_tokens):
            read = self.model.base_model(inputs_embeds=x_TD.unsqueeze(0), past_key_values=cache, use_cache=True)
            cache = read.past_key_values
            id_1 = next_tokens(self.logits(read.last_hidden_state[0, -1:]), sampling, step, row)
            yield id_1
            x_TD = self.embed(id_1)

    def stream_drafted(self, prompt: Prompt, sampling: Sampling, drafted: Drafted) -> Iterator[Tensor]:
        """Errors: ValueError, for it has no heads that draft."""
        raise ValueError("the model has no heads that predict more tokens; they are trained with --mmtp.depths")

    def with_experts(self, expert: ExpertConfig) -> CausalLM:
        """Errors: ValueError, for visual experts are of ours alone."""
        raise ValueError(f"a language model of family {self.cfg.family} cannot be given visual experts")

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set all parameters by their names. Errors: CheckpointError when they are not those of the model."""
        own = dict(self.named_parameters())
        wrong = own.keys() ^ weights.keys() or {n for n, p in own.items() if p.shape != weights[n].shape}
        if wrong:
            raise CheckpointError(f"the weights are not of this {type(self.model).__name__}: {min(wrong)} differs")
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what `from_pretrained` and transformers read."""
        self.model.save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> PretrainedLanguage:
        """Read a causal language model of transformers in fp32, and try it out.

        Errors: CheckpointError when it is none, files are missing or damaged, samples of a pack would see each other or
        what follows them, or it has something behind its head that is not known here.
        """
        root = Path(directory)
        config = inspect_causal_lm(root)
        language = cls(shape_of(root, config), load_causal_lm(root, config))
        try_out(language, root)
        return language


def language_shape(directory: Path) -> LanguageShape:
    """Return the shape of a causal language model, of a family of ours or of transformers; reads no weights.

    Errors: CheckpointError when it is none, or one of ours with an option that ours does not have.
    """
    if read_json(directory / CONFIG).get("model_type") in FAMILIES:
        return read_shape(directory)
    return shape_of(directory, inspect_causal_lm(directory))


def load_language(directory: Path) -> CausalLM | PretrainedLanguage:
    """Read a causal language model: ours where the family is, else transformers'. Errors: CheckpointError."""
    if read_json(directory / CONFIG).get("model_type") in FAMILIES:
        return CausalLM.from_pretrained(directory)
    return PretrainedLanguage.from_pretrained(directory)


def shape_of(directory: Path, config: Any) -> LanguageShape:
    """Return the sizes in a configuration of transformers. Errors: CheckpointError when it lacks one."""
    try:
        width, heads = config.hidden_size, config.num_attention_heads
        return LanguageShape(
            family=config.model_type,
            vocab_size=config.vocab_size,
            embed_dim=width,
            depth=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or width // heads,
            mlp_dim=next((size for name in _MLP_WIDTHS if (size := getattr(config, name, None))), 4 * width),
            max_tokens=getattr(config, "max_position_embeddings", None) or _NO_LIMIT,
            **read_ids(config.to_dict() | read_generation(directory)),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory} of type {config.model_type!r} says no size that is needed: {error}"
        ) from None


@torch.no_grad()
def try_out(language: PretrainedLanguage, directory: Path) -> None:
    """Read two samples in a pack, and the beginning of each by itself. Errors: CheckpointError when they differ."""
    kind = f"{directory}: a model of type {language.cfg.family!r}"
    width = language.embed.embedding_dim
    if width != language.cfg.embed_dim:
        raise CheckpointError(f"{kind} whose embeddings have {width} channels and its layers {language.cfg.embed_dim}")
    samples = [1 + torch.arange(length) * 7 % (language.cfg.vocab_size - 1) for length in _TRIED]
    position_S = torch.cat([*map(torch.arange, _TRIED), torch.zeros(3, dtype=torch.int64)])
    ids_S = F.pad(torch.cat(samples), (0, 3))
    try:
        packed = language.logits(language.hidden(language.embed_ids(ids_S), position_S.expand(3, -1)))
        alone = [language(ids[:-2].unsqueeze(0))[0] for ids in samples]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{kind} that does not read a pack of embedded tokens: {reason}") from None
    parts = [part[:-2] for part in packed.split((*_TRIED, 3))[:2]]
    for part, expected in zip(parts, alone, strict=True):
        if not torch.allclose(part, expected, rtol=0.0, atol=_ROUNDING * float(expected.abs().max())):
            raise CheckpointError(
                f"{kind} that reads a sample in a pack otherwise than its beginning alone; take one that tells samples"
                f" apart by their positions, such as {', '.join(FAMILIES)}"
            )

"""A causal language model on packs of sequences and on batches, read from and written for transformers.

A batch is a pack too: there is one path, whose sequences cannot see each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from cogvit.batch import PackedSequence, TokensAhead
from cogvit.model.attention import Segments, segments_of
from cogvit.model.blocks import RMSNorm
from cogvit.model.config import ExpertConfig
from cogvit.model.cross import CrossRows
from cogvit.model.decoder import CausalLayout, DecoderBlock, KeyValueCache, rotary_1d
from cogvit.model.drafting import Drafted, Drafter, Prompt
from cogvit.model.expert import ExpertRows, expert_rows, is_expert, with_expert_weights
from cogvit.model.generation import Draft, Sampling, check_width, next_tokens
from cogvit.model.init import init_model
from cogvit.model.language_config import LanguageConfig
from cogvit.model.layouts.causal_lm import read_causal_lm, write_causal_lm
from cogvit.model.mtp import MtpHeads


class CausalLM(nn.Module):
    """A decoder of the Llama, GLM, GLM-4 or Qwen3 family.

    Initial weights follow torch's default generator (`torch.manual_seed`).

    Attributes:
        cfg: the shape and options that it was built with.
        recompute: set it to compute each block again in the backward pass instead of keeping its activations.
    """

    def __init__(self, cfg: LanguageConfig) -> None:
        """Build a language model with new weights."""
        super().__init__()
        self.cfg = cfg
        self.recompute = False
        self.embed = nn.Embedding(cfg.vocab_size, cfg.embed_dim)
        self.blocks = nn.ModuleList(DecoderBlock(cfg, layer) for layer in range(cfg.depth))
        self.norm = RMSNorm(cfg.embed_dim, eps=cfg.eps)
        self.head = None if cfg.tied else nn.Linear(cfg.embed_dim, cfg.vocab_size, bias=False)
        self.mtp = MtpHeads(cfg) if cfg.mmtp.depths else None
        init_model(self, int(torch.randint(2**62, (), device="cpu")))

    def hidden(
        self,
        x_SD: Tensor,
        position_3S: Tensor,
        segments: Segments | None,
        cache: KeyValueCache | None = None,
        expert: ExpertRows | None = None,
        cross: CrossRows | None = None,
    ) -> Tensor:
        """Return what the head reads, [S, D].

        Args:
            x_SD: embedded tokens.
            position_3S: by time, row and column; equal for text.
            segments: the sequences of a pack; None for tokens that each follow a row of the cache.
            cache: gets the keys and values.
            expert: tokens that go through the visual experts.
            cross: what cross attention looks at.
        """
        layout = CausalLayout(segments, *rotary_1d(position_3S, self.cfg), expert, cross)
        recompute = self.recompute and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            x_SD = checkpoint(block, x_SD, layout, use_reentrant=False) if recompute else block(x_SD, layout, cache)
        return self.norm(x_SD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [..., V] of what `hidden` or `forward_packed` gave."""
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Return [..., D]. Errors: ValueError when an id is not of the vocabulary."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.cfg.vocab_size:
            low, high = int(ids.min()), int(ids.max())
            raise ValueError(f"token ids are {low} to {high}; expected 0 to {self.cfg.vocab_size - 1}")
        return self.embed(ids)

    def forward_packed(
        self, sequence: PackedSequence, visual_ED: Tensor | None = None, cross: CrossRows | None = None
    ) -> Tensor:
        """Return what the head reads of a pack, [S, D]: the same as for its sequences one by one.

        Args:
            sequence: the pack.
            visual_ED: the adapter's output, whose rows `sequence.visual_row` names; None where there is no image.
            cross: what cross attention looks at.

        Errors: ValueError when an id is not of the vocabulary, or the model has experts and the pack does not say whose
        tokens are theirs.
        """
        if self.cfg.expert.every and sequence.expert is None:
            raise ValueError("the language model has visual experts; the pack must say which tokens go through them")
        x_SD = place_visual(self.embed_ids(sequence.ids), visual_ED, sequence.visual_row)
        expert = expert_rows(sequence.expert) if self.cfg.expert.every and sequence.expert is not None else None
        return self.hidden(x_SD, sequence.position, segments_of(sequence.cu_seqlens), None, expert, cross)

    def forward_ahead(
        self, hidden_SD: Tensor, sequence: PackedSequence, ahead: TokensAhead, visual_ED: Tensor | None = None
    ) -> list[Tensor]:
        """Return what the output matrix reads for the tokens after the next one, [S, D] for each depth of `mtp`.

        Args:
            hidden_SD: what `forward_packed` gave.
            sequence: the pack.
            ahead: of the pack.
            visual_ED: as in `forward_packed`.
        """
        assert self.mtp is not None, "the model has no heads for more tokens"
        embedded_SD = self.embed(sequence.ids)
        x_SD = place_visual(embedded_SD, visual_ED, sequence.visual_row)
        seen_SD = self.mtp.seen(embedded_SD, x_SD, ahead.slot)
        return self.mtp(hidden_SD, seen_SD, sequence.position, segments_of(sequence.cu_seqlens), ahead)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits [B, T, V] of token ids [B, T] without padding.

        Errors: ValueError when the ids are not [B, T] or one is not of the vocabulary.
        """
        _check_ids(input_ids)
        x_SD, batch = self.embed_ids(input_ids.flatten()), input_ids.shape
        return self.logits(
            self.hidden(x_SD, text_positions(batch, x_SD.device), rows_of(batch, x_SD.device))
        ).unflatten(0, batch)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        draft: Draft = "none",
    ) -> Tensor:
        """Return the prompts with their answers behind them, [B, T + up to max_new_tokens], as transformers does.

        It ends when every row has reached one of `cfg.eos_ids`; what stands behind the end of a row is `cfg.fill_id`.

        Args:
            input_ids: prompts [B, T] without padding.
            max_new_tokens: of an answer, its end included.
            temperature: 0 takes the most likely token; above 0 it draws.
            top_p: draws among the most likely tokens that have this much of the probability together.
            seed: of the draws.
            draft: `mtp` lets the heads propose tokens, row by row, which gives the same answers in fewer passes, and
                prints the accepted length.

        Errors: ValueError when the ids are not [B, T], one is not of the vocabulary, a number is out of range, prompt
        and answer exceed `cfg.max_tokens` or the model has no heads to draft with.
        """
        _check_ids(input_ids)
        with torch.no_grad():
            x_SD, batch = self.embed_ids(input_ids.flatten()), input_ids.shape
        position_3S, segments = text_positions(batch, x_SD.device), rows_of(batch, x_SD.device)
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        if draft == "none":
            answers = list(self.stream(x_SD, position_3S, segments, sampling))
            return torch.cat([input_ids, torch.stack(answers, dim=1)], dim=1)
        drafted, rows = Drafted(), x_SD.split(batch[1])
        texts = [
            torch.cat([*self.stream_drafted(self.text_prompt(x_SD, row), sampling, drafted)])
            for row, x_SD in enumerate(rows)
        ]
        print(drafted, file=sys.stderr)
        return torch.cat([input_ids, pad_sequence(texts, batch_first=True, padding_value=self.cfg.fill_id)], dim=1)

    def text_prompt(self, x_SD: Tensor, row: int) -> Prompt:
        """Return one embedded prompt without images, for `stream_drafted`; row is its number among those answered."""
        return Prompt(
            x_SD, x_SD, torch.full_like(x_SD[:, 0], -1), text_positions(torch.Size((1, len(x_SD))), x_SD.device), row
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
        """Yield the next id of every sequence of a pack, [B], until all have ended.

        Args:
            x_SD: the embedded prompts, whole in the pack, without padding.
            position_3S: as in `hidden`.
            segments: the prompts.
            sampling: how answers are drawn.
            expert: tokens of the prompts that go through the visual experts; answers are the language model's.
            cross: what cross attention looks at.

        Errors: ValueError when a prompt is empty or prompt and answer exceed `cfg.max_tokens`.
        """
        lengths = segments.lengths[: segments.num_valid]
        return self._stream(
            x_SD, position_3S, segments, sampling, check_width(lengths, sampling, self.cfg.max_tokens), expert, cross
        )

    def stream_drafted(self, prompt: Prompt, sampling: Sampling, drafted: Drafted) -> Iterator[Tensor]:
        """Yield the next id, [1], of one prompt until it ends: those of `stream`, in fewer passes; counts in drafted.

        Errors: as `stream`, and ValueError when the model has no heads.
        """
        if self.mtp is None:
            raise ValueError("the model has no heads that predict more tokens; they are trained with --mmtp.depths")
        width = check_width((len(prompt.x_SD),), sampling, self.cfg.max_tokens)
        return self._stream_drafted(prompt, Drafter(self.mtp, prompt, width), sampling, drafted, width)

    @torch.no_grad()
    def _stream(
        self,
        x_SD: Tensor,
        position_3S: Tensor,
        segments: Segments,
        sampling: Sampling,
        width: int,
        expert: ExpertRows | None,
        cross: CrossRows | None,
    ) -> Iterator[Tensor]:
        lengths = segments.lengths[: segments.num_valid]
        cache = KeyValueCache(self.cfg, lengths, width, x_SD)
        last_B = cache.length_B.cumsum(0) - 1
        hidden_BD = self.hidden(x_SD, position_3S, segments, cache, expert, cross)[last_B]
        position_B = torch.stack([row.max() + 1 for row in position_3S.split(lengths, dim=1)])
        eos = torch.tensor(self.cfg.eos_ids, dtype=torch.int64, device=x_SD.device)
        ended_B = torch.zeros(len(lengths), dtype=torch.bool, device=x_SD.device)
        for step in range(sampling.max_new_tokens):
            id_B = next_tokens(self.logits(hidden_BD), sampling, step)
            id_B = torch.where(ended_B, self.cfg.fill_id, id_B)
            yield id_B
            ended_B = ended_B | torch.isin(id_B, eos)
            if step + 1 == sampling.max_new_tokens or bool(ended_B.all()):
                return
            cache.append()
            hidden_BD = self.hidden(self.embed(id_B), (position_B + step).expand(3, -1), None, cache, None, cross)

    def with_experts(self, expert: ExpertConfig) -> CausalLM:
        """Return the model with visual experts that begin as copies of it; its own weights are frozen there.

        Errors: ValueError when it has some already.
        """
        if self.cfg.expert.every:
            raise ValueError(f"the model has visual experts in every {self.cfg.expert.every}th block already")
        cfg = replace(self.cfg, expert=expert)
        weights = with_expert_weights({name: weight.clone() for name, weight in self.state_dict().items()}, cfg)
        model = CausalLM.from_weights(cfg, weights)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_expert(name))
        return model.train(self.training)

    @torch.no_grad()
    def _stream_drafted(
        self, prompt: Prompt, drafter: Drafter, sampling: Sampling, drafted: Drafted, width: int
    ) -> Iterator[Tensor]:
        length, step = len(prompt.x_SD), 0
        cache = KeyValueCache(self.cfg, (length,), width, prompt.x_SD)
        segments = rows_of(torch.Size((1, length)), prompt.x_SD.device)
        drafts: list[Tensor] = []
        hidden_SD = self.hidden(prompt.x_SD, prompt.position_3S, segments, cache, prompt.expert, prompt.cross)
        drafter.hear(hidden_SD[:-1])
        hidden_SD = hidden_SD[-1:]
        while True:
            for place, logits_V in enumerate(self.logits(hidden_SD)):
                chosen = next_tokens(logits_V.unsqueeze(0), sampling, step, prompt.row)
                yield chosen
                drafted.tokens += step > 0
                step += 1
                if step == sampling.max_new_tokens or int(chosen) in self.cfg.eos_ids:
                    return
                if place == len(drafts) or not torch.equal(chosen, drafts[place]):
                    break
            drafter.hear(hidden_SD[: place + 1])
            drafter.say(self.embed(torch.cat([*drafts[:place], chosen])))
            cache.truncate(drafter.heard)
            drafts = self._drafts(drafter, sampling, step, prompt.row)
            cache.append(1 + len(drafts))
            said_SD = self.embed(torch.cat([chosen, *drafts]))
            hidden_SD = self.hidden(said_SD, drafter.positions(len(said_SD)), None, cache, None, prompt.cross)
            drafted.passes += 1

    def _drafts(self, drafter: Drafter, sampling: Sampling, step: int, row: int) -> list[Tensor]:
        """Guesses, [1] each, of the tokens after the one that was said last."""
        drafts = []
        for depth in range(self.cfg.mmtp.depths):
            drafts.append(next_tokens(self.logits(drafter.deepen(depth)), sampling, step + depth, row))
            drafter.guess(self.embed(drafts[-1]))
        return drafts[: sampling.max_new_tokens - step - 1]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, generation_config.json and model.safetensors for transformers, into a directory.

        Errors: CheckpointError when it has visual experts or cross attention, which no such layout holds.
        """
        write_causal_lm(Path(directory), self.cfg, self.state_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> CausalLM:
        """Read a Llama, GLM-4 or Qwen3 of transformers: config.json and safetensors, whole or in parts; fp32.

        Errors: CheckpointError when a file is missing or damaged, the family or an option is not ours, a weight is no
        float, NaN or infinite, or names every missing, extra and misshaped weight.
        """
        return cls.from_weights(*read_causal_lm(Path(directory)))

    @classmethod
    def from_weights(cls, cfg: LanguageConfig, weights: dict[str, Tensor]) -> CausalLM:
        """Build a model of given weights, without drawing new ones first."""
        with torch.device("meta"):
            model = cls(cfg)
        model.load_state_dict(weights, assign=True)
        return model


def place_visual(x_SD: Tensor, visual_ED: Tensor | None, visual_row_S: Tensor) -> Tensor:
    """Return embedded tokens with rows of visual_ED where visual_row_S names one; -1 keeps the token.

    Rows that nobody names, or none at all, still carry zero gradients to what made them.
    """
    if visual_ED is None:
        return x_SD
    if not len(visual_ED):
        return x_SD + visual_ED.sum().to(x_SD.dtype)
    visual_SD = visual_ED[visual_row_S.clamp(min=0).long()].to(x_SD.dtype)
    return torch.where((visual_row_S >= 0).unsqueeze(1), visual_SD, x_SD)


def rows_of(batch: torch.Size, device: torch.device) -> Segments:
    """Return the segments of a batch [B, T] laid out as a pack."""
    rows, length = batch
    bounds = torch.tensor([*range(0, rows * length + 1, length), rows * length], dtype=torch.int32)
    return Segments(bounds.to(device), (length,) * rows + (0,), rows)


def text_positions(batch: torch.Size, device: torch.device) -> Tensor:
    """Return the positions [3, B * T] of a batch of text."""
    return torch.arange(batch[1], device=device).repeat(batch[0]).expand(3, -1)


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected (B, T), both at least 1")

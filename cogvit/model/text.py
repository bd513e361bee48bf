"""The text tower: the vision tower's blocks over token embeddings with learned positions, on packed captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvit.batch import PackedText
from cogvit.draws import mix
from cogvit.model.attention import segments_of
from cogvit.model.blocks import Block, make_norm, random_keys, run_blocks
from cogvit.model.config import TextConfig
from cogvit.model.init import init_model
from cogvit.model.tokens import PackedLayout, PackedTokens, pool_mean, token_order

_TEXT_SALT = 0x74657874  # "text": an image and its caption share a key but not their draws


def text_layout(text: PackedText, key_N: Tensor | None = None) -> PackedLayout:
    """Return the layout of a pack's captions.

    Args:
        text: the pack.
        key_N: the slots' keys (`PackedImages.key`), which seed stochastic depth; by default the captions' ids, whose
            draws never change.
    """
    order = token_order(segments_of(text.cu_seqlens, text.host), cls=False)
    index_L = torch.arange(len(text.ids), device=text.cu_seqlens.device, dtype=torch.int32)
    slot_L = torch.searchsorted(text.cu_seqlens[1:-1].contiguous(), index_L, right=True)
    key_N = text.caption_id if key_N is None else key_N
    return PackedLayout(order, None, None, order.arrange(slot_L), mix(key_N, _TEXT_SALT))


class TextEmbedding(nn.Module):
    """What the text tower has outside its blocks."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embed = nn.Embedding(cfg.vocab_size, cfg.embed_dim)
        self.pos_embed = nn.Embedding(cfg.max_tokens, cfg.embed_dim)
        self.norm = make_norm(cfg, cfg.embed_dim)

    def embed_packed(self, text: PackedText, key_N: Tensor | None = None) -> PackedTokens:
        """Embed a pack of captions; `key_N` as in `text_layout`."""
        layout = text_layout(text, key_N)
        x_LD = self.token_embed(text.ids) + self.pos_embed(text.position)
        return PackedTokens(layout.order, None, None, layout.slot_S, layout.key_N, layout.order.arrange(x_LD))


class TextTower(TextEmbedding):
    """A bidirectional text encoder whose captions are mean-pooled.

    Initial weights follow torch's default generator (`torch.manual_seed`).

    Attributes:
        cfg: the shape and options that it was built with.
        recompute: set it to compute each block again in the backward pass instead of keeping its activations.
    """

    def __init__(self, cfg: TextConfig) -> None:
        """Build a text tower with new weights."""
        super().__init__(cfg)
        self.recompute = False
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        init_model(self, int(torch.randint(2**62, (), device="cpu")), layer_scale=cfg.layer_scale_init)

    def forward_packed(self, text: PackedText, key_N: Tensor | None = None) -> Tensor:
        """Return the mean over each caption's tokens, [N, D]; zeros where a caption is absent."""
        tokens = self.embed_packed(text, key_N)
        x_SD = self.norm(run_blocks(self.blocks, tokens, self.recompute and torch.is_grad_enabled()))
        return pool_mean(x_SD, tokens.slot_S, len(text.caption_id))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean over each caption's tokens, [B, D]; the text encoder of `CogViTForContrastive`.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L], nonzero where a token belongs to the caption.

        Errors: ValueError when the shapes differ, an id is not of the vocabulary or a caption exceeds max_tokens.
        """
        if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must share (B, L)"
            )
        vocab_size = self.cfg.vocab_size
        if bool(((input_ids < 0) | (input_ids >= vocab_size)).any()):
            low, high = int(input_ids.min()), int(input_ids.max())
            raise ValueError(f"token ids are {low} to {high}; expected 0 to {vocab_size - 1}")
        text = _pack_captions(input_ids, attention_mask.bool())
        if text.position.numel() and int(text.position.max()) >= self.cfg.max_tokens:
            raise ValueError(
                f"a caption has {int(text.position.max()) + 1} tokens; truncate to max_tokens={self.cfg.max_tokens}"
            )
        key_N = random_keys(len(input_ids), input_ids.device) if self.training and self.cfg.drop_path_rate else None
        return self.forward_packed(text, key_N)


def _pack_captions(ids: Tensor, valid: Tensor) -> PackedText:
    length_B = valid.sum(1)
    bounds = torch.cat([length_B.new_zeros(1), length_B, length_B.new_zeros(1)]).cumsum(0)
    return PackedText(
        ids=ids[valid],
        position=(valid.cumsum(1) - 1)[valid].to(torch.int32),
        cu_seqlens=bounds.to(torch.int32),
        caption_id=torch.zeros(len(ids), dtype=torch.int64, device=ids.device),
        concept_id=torch.zeros(len(ids), dtype=torch.int64, device=ids.device),
        weight=(length_B > 0).float(),
    )

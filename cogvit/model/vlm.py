"""The vision encoder and a language model as one: images and text in one sequence, answers as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogvit.batch import PackedImages, PackedSequence
from cogvit.errors import CheckpointError
from cogvit.model.adapter import GlmAdapter, PatchGroups, adapter_config, fitted_adapter, make_adapter
from cogvit.model.attention import Segments, segments_of
from cogvit.model.chat import Message, image_token_id, read_prompt
from cogvit.model.config import AdapterConfig
from cogvit.model.drafting import Drafted, Prompt
from cogvit.model.generation import Draft, Sampling
from cogvit.model.image_input import ImageLimits, open_image, pack_shown
from cogvit.model.interop import load_checked
from cogvit.model.language import CausalLM, place_visual
from cogvit.model.layouts import glm_ocr_full, vision_language
from cogvit.model.packing import Grid
from cogvit.model.pretrained import load_tokenizer
from cogvit.model.sequence import part_positions, parts_of_row, slots_of_images
from cogvit.model.vit import CogViT

if TYPE_CHECKING:
    from PIL.Image import Image


class VisionLanguageModel(nn.Module):
    """A vision encoder, an adapter and a causal language model that reads images and text in one sequence.

    Attributes:
        vision: the encoder.
        adapter: from its features to the language model's width.
        language: the decoder.
        image_token_id: what stands in token ids where an image's features go.
        limits: how large images are shown.
        tokenizer: of transformers, with a chat template; None where nobody asks for text.
    """

    def __init__(
        self,
        vision: CogViT,
        adapter: PatchGroups,
        language: CausalLM,
        image_token_id: int,
        limits: ImageLimits,
        tokenizer: Any = None,
    ) -> None:
        """Put three modules together.

        Errors: ValueError when their widths, the image token or the units of images do not fit.
        """
        super().__init__()
        vision_dim, llm_dim, vocab_size = vision.cfg.embed_dim, language.cfg.embed_dim, language.cfg.vocab_size
        if (adapter.vision_dim, adapter.llm_dim) != (vision_dim, llm_dim):
            raise ValueError(
                f"the adapter maps {adapter.vision_dim} to {adapter.llm_dim} channels; the encoder has {vision_dim} and"
                f" the language model {llm_dim}"
            )
        if not 0 <= image_token_id < vocab_size:
            raise ValueError(f"image_token_id={image_token_id} must be in the vocabulary, 0 to {vocab_size - 1}")
        if tokenizer is not None and max(tokenizer.get_vocab().values()) >= vocab_size:
            raise ValueError(
                f"the tokenizer has ids to {max(tokenizer.get_vocab().values())}; the language model's vocab_size is"
                f" {vocab_size}"
            )
        if limits.unit_px != vision.cfg.patch_size * adapter.spatial_pool:
            unit_px = vision.cfg.patch_size * adapter.spatial_pool
            raise ValueError(f"unit_px={limits.unit_px} must be the patch times spatial_pool, {unit_px}")
        if vision.cfg.in_chans != 3:
            raise ValueError(f"the encoder takes images of {vision.cfg.in_chans} channels; expected 3")
        self.vision, self.adapter, self.language = vision, adapter, language
        self.image_token_id, self.limits, self.tokenizer = image_token_id, limits, tokenizer

    @classmethod
    def joined(
        cls,
        vision: CogViT,
        language: CausalLM,
        tokenizer: Any,
        adapter: AdapterConfig,
        min_pixels: float,
        max_pixels: float,
    ) -> VisionLanguageModel:
        """Join an encoder and a language model by a new adapter.

        Args:
            vision: the encoder.
            language: the decoder.
            tokenizer: of transformers, with the image token and a chat template.
            adapter: which one; its hidden width is by default the language model's for swiglu and conv.
            min_pixels: a smaller image is enlarged.
            max_pixels: a larger image is made smaller.

        Errors: DataError when the tokenizer has no image token, ValueError when something does not fit.
        """
        made = fitted_adapter(adapter, vision.cfg.embed_dim, language.cfg)
        limits = ImageLimits(vision.cfg.patch_size * made.spatial_pool, min_pixels, max_pixels)
        return cls(vision, made, language, image_token_id(tokenizer), limits, tokenizer)

    def token_grid(self, image: Image | Tensor | str | Path) -> Grid:
        """Return the rows and columns of tokens that an image has in the sequence. Errors: DataError."""
        opened = open_image(image)
        height_px, width_px = self.limits.size_px(opened.height, opened.width)
        return height_px // self.limits.unit_px, width_px // self.limits.unit_px

    def num_visual_tokens(self, image: Image | Tensor | str | Path) -> int:
        """Return how many image tokens stand for an image (PIL, uint8 [3, H, W] or a path). Errors: DataError."""
        rows, columns = self.token_grid(image)
        return rows * columns

    def encode_images(self, images: PackedImages) -> Tensor:
        """Return the embeddings of a pack's images end to end, [E, D of the language model]."""
        grids = [(rows, columns) for rows, columns in images.grid_hw.tolist()]
        return self.adapter.forward_packed(self.vision.forward_packed(images).patch_TD, grids)

    def forward_packed(self, images: PackedImages, sequence: PackedSequence) -> Tensor:
        """Return what the language model's head reads of a pack, [S, D]: the same as for its samples one by one.

        Args:
            images: of the samples; the encoder runs even where all of it is padding.
            sequence: whose `visual_row` names rows of the images' embeddings.
        """
        return self.language.forward_packed(sequence, self.encode_images(images))

    def forward(
        self, input_ids: Tensor, images: Sequence[Sequence[Image | Tensor | str | Path]] | None = None
    ) -> Tensor:
        """Return logits [B, T, V].

        Args:
            input_ids: [B, T] without padding; each image is a run of `image_token_id` as long as `num_visual_tokens`
                says, anywhere in a row.
            images: of each row, in order: PIL images, uint8 [3, H, W] or paths; none at all if None.

        Errors: ValueError when the ids are not [B, T], one is not of the vocabulary or a row's image tokens are not its
        images'; DataError when an image does not decode.
        """
        shown = [[]] * len(input_ids) if images is None else [[open_image(image) for image in row] for row in images]
        if input_ids.ndim != 2 or len(shown) != len(input_ids):
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)} and there are images of {len(shown)} rows; expected"
                " (B, T) and B"
            )
        x_SD, position_3S, segments = self._embedded(list(input_ids), shown)
        return self.language.logits(self.language.hidden(x_SD, position_3S, segments)).unflatten(0, input_ids.shape)

    def _embedded(self, rows: Sequence[Tensor], images: Sequence[Sequence[Image]]) -> tuple[Tensor, Tensor, Segments]:
        """Rows of token ids with their images as a pack: tokens [S, D], positions [3, S] and segments."""
        ids_S, by_place = torch.cat(list(rows)), self.language.cfg.mrope_section is not None
        positions = []
        for number, (row, own) in enumerate(zip(rows, images, strict=True)):
            try:
                parts = parts_of_row((row == self.image_token_id).tolist(), [self.token_grid(image) for image in own])
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            positions.append(part_positions(parts, by_place=by_place))
        x_SD, together = self.language.embed_ids(ids_S), [image for own in images for image in own]
        if together:
            patch_px = self.vision.cfg.patch_size
            packed = pack_shown(together, self.limits, patch_px, x_SD.device)
            is_image_S = ids_S == self.image_token_id
            row_S = torch.where(is_image_S, is_image_S.cumsum(0) - 1, -1)
            x_SD = place_visual(x_SD, self.encode_images(packed), row_S)
        bounds = torch.tensor([0, *map(len, rows), 0]).cumsum(0).to(torch.int32)
        return x_SD, torch.cat(positions, dim=1).to(x_SD.device), segments_of(bounds.to(x_SD.device))

    def generate(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        draft: Draft = "none",
    ) -> str:
        """Return the answer to a conversation as text, without special tokens.

        Args:
            messages: OpenAI-style, `{"role": "user", "content": text or parts}`; a part is `{"type": "text", "text":
                ...}`, `{"type": "image", "image": PIL image or path}` or `{"type": "image_url", "image_url": path or
                data URL}`.
            max_new_tokens: of the answer, its end included.
            temperature: 0 takes the most likely token; above 0 it draws.
            top_p: draws among the most likely tokens that have this much of the probability together.
            seed: of the draws.
            draft: `mtp` lets the heads propose tokens, which gives the same answer in fewer passes, and prints the
                accepted length.

        Errors: DataError when a message, image, chat template or image token is wrong or missing; ValueError when a
        number is out of range, prompt and answer exceed the language model's max_tokens or it has no heads to draft
        with.
        """
        drafted = Drafted() if draft == "mtp" else None
        answer = "".join(self.stream(messages, Sampling(max_new_tokens, temperature, top_p, seed), drafted))
        if drafted is not None:
            print(drafted, file=sys.stderr)
        return answer

    def stream(self, messages: Sequence[Message], sampling: Sampling, drafted: Drafted | None = None) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece; messages and errors are those of `generate`.

        drafted: the heads propose tokens, and it counts them; None leaves the heads alone.
        """
        answer: list[int] = []
        text = said = ""
        for id_B in self._next_ids(*self.prompt(messages), sampling, drafted):
            answer.append(int(id_B))
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes are not all there
                yield text[len(said) :]
                said = text
        yield text[len(said) :]

    def generate_many(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Return the greedy answers to several conversations, each as `generate` gives it alone."""
        prompts = [self.prompt(messages) for messages in conversations]
        with torch.no_grad():
            embedded = self._embedded([ids for ids, _ in prompts], [images for _, images in prompts])
        answers = torch.stack(list(self.language.stream(*embedded, Sampling(max_new_tokens))), dim=1)
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers.tolist()]

    def hidden_rows(self, rows: Sequence[Tensor], images: Sequence[Sequence[Image]]) -> Tensor:
        """Return what the head reads of rows of token ids end to end, [S, D].

        images: of each row, as in `forward`. Errors: as `forward`.
        """
        device = self.language.embed.weight.device
        return self.language.hidden(*self._embedded([row.to(device) for row in rows], images))

    @torch.no_grad()
    def _next_ids(
        self, ids_S: Tensor, images: list[Image], sampling: Sampling, drafted: Drafted | None
    ) -> Iterator[Tensor]:
        x_SD, position_3S, segments = self._embedded([ids_S], [images])
        if drafted is None:
            return self.language.stream(x_SD, position_3S, segments, sampling)
        is_image_S = ids_S == self.image_token_id
        row_S = torch.where(is_image_S, is_image_S.cumsum(0) - 1, -1)
        sizes = [self.num_visual_tokens(image) for image in images]
        slot_S = slots_of_images(row_S, sizes, self.language.cfg.mmtp.tokens)
        prompt = Prompt(x_SD, self.language.embed_ids(ids_S), slot_S, position_3S)
        return self.language.stream_drafted(prompt, sampling, drafted)

    def prompt(self, messages: Sequence[Message]) -> tuple[Tensor, list[Image]]:
        """Return a conversation as token ids [T], each image as a run of its length, and its images.

        Errors: as `generate`.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; give it one, or ask it for logits")
        prompt = read_prompt(self.tokenizer, messages)
        lengths = iter([self.num_visual_tokens(image) for image in prompt.images])
        ids = [[token] * (next(lengths) if token == self.image_token_id else 1) for token in prompt.ids]
        device = self.language.embed.weight.device
        return torch.tensor([token for run in ids for token in run], device=device), prompt.images

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory of `vision`, `adapter` and `language`, which loads alone, also in transformers."""
        root = Path(directory)
        self.vision.save_pretrained(root / vision_language.VISION)
        self.language.save_pretrained(root / vision_language.LANGUAGE)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(root / vision_language.LANGUAGE)
        adapter = adapter_config(self.adapter)
        vision_language.write(root, self.image_token_id, self.limits, adapter, self.adapter.state_dict())

    def save_glm_ocr_full(self, directory: str | Path) -> None:
        """Write one directory for transformers' GlmOcrForConditionalGeneration and its processor.

        Errors: CheckpointError names what GLM-OCR cannot hold: an encoder not of the `cogvit_l` family, another adapter
        than GLM-OCR's, a language model that is not GLM-4 without biases, a tokenizer without its image tokens.
        """
        if not isinstance(self.adapter, GlmAdapter):
            kind = adapter_config(self.adapter).kind
            raise CheckpointError(f"the layout of GLM-OCR cannot hold an adapter of kind {kind}; expected glm")
        glm_ocr_full.write(
            Path(directory),
            (self.vision.cfg, self.vision.state_dict()),
            self.adapter.state_dict(),
            (self.language.cfg, self.language.state_dict()),
            self.limits,
            self.tokenizer,
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> VisionLanguageModel:
        """Read what `save_pretrained` or `save_glm_ocr_full` wrote, or a GLM-OCR checkpoint of transformers.

        The model is in eval mode, so that answers are the same every time.

        Errors: CheckpointError when a file is missing or damaged, or names every missing, extra or misshaped weight.
        """
        root = Path(directory)
        read = _read_glm_ocr if vision_language.model_type(root) == glm_ocr_full.MODEL_TYPE else _read_ours
        try:
            return cls(*read(root)).eval()
        except ValueError as error:
            raise CheckpointError(f"{root}: {error}") from None


_Built = tuple[CogViT, PatchGroups, CausalLM, int, ImageLimits, Any]


def _read_glm_ocr(root: Path) -> _Built:
    cfg, weights, token_id, limits = glm_ocr_full.read(root)
    language, adapter = CausalLM.from_weights(cfg, weights), GlmAdapter.from_pretrained(root)
    return CogViT.from_pretrained(root), adapter, language, token_id, limits, load_tokenizer(root)


def _read_ours(root: Path) -> _Built:
    joint = vision_language.read(root)
    vision = CogViT.from_pretrained(root / vision_language.VISION)
    language = CausalLM.from_pretrained(root / vision_language.LANGUAGE)
    adapter = make_adapter(joint.adapter, vision.cfg.embed_dim, language.cfg.embed_dim)
    load_checked(adapter, joint.weights)
    limits = ImageLimits(vision.cfg.patch_size * adapter.spatial_pool, joint.min_pixels, joint.max_pixels)
    tokenizer = load_tokenizer(root / vision_language.LANGUAGE)
    return vision, adapter, language, joint.image_token_id, limits, tokenizer

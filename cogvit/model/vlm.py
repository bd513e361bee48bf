"""The vision encoder and a language model as one: images and text in one sequence, answers as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogvit.batch import PackedImages, PackedSequence
from cogvit.errors import CheckpointError
from cogvit.model.adapter import PatchGroups, fitted_adapter
from cogvit.model.attention import Segments, segments_of
from cogvit.model.chat import Message, image_token_id, read_prompt
from cogvit.model.config import AdapterConfig, ExpertConfig, VideoConfig
from cogvit.model.cross import CrossRows
from cogvit.model.drafting import Drafted, Prompt
from cogvit.model.eva import EvaEncoder
from cogvit.model.expert import ExpertRows, expert_rows
from cogvit.model.frame import ImageFrame
from cogvit.model.generation import Draft, Sampling
from cogvit.model.hub import dtype_of
from cogvit.model.image_input import ImageLimits, ImageSize, SquareImages, pack_shown, rgb_image
from cogvit.model.images import ImageLike
from cogvit.model.language import CausalLM, place_visual
from cogvit.model.layouts.released import Layout, Released
from cogvit.model.packing import Grid
from cogvit.model.pretrained_language import PretrainedLanguage
from cogvit.model.questions import Questions, read_questions
from cogvit.model.sequence import expert_tokens, num_tokens, part_positions, parts_of_row, slots_of_images
from cogvit.model.vit import CogViT
from cogvit.model.vlm_files import VlmParts, read_parts, save_glm_ocr_full, save_ours, save_released

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Embedded:
    """Rows of text and images as a pack that the language model reads."""

    x_SD: Tensor
    position_3S: Tensor
    segments: Segments
    expert: ExpertRows | None
    cross: CrossRows | None


class VisionLanguageModel(nn.Module):
    """A vision encoder, an adapter and a causal language model that reads images and text in one sequence.

    Attributes:
        vision: the encoder.
        adapter: from its features to the language model's width.
        language: the decoder, ours or one of transformers.
        image_token_id: what stands in token ids where an image's features go.
        limits: how large images are shown.
        tokenizer: of transformers, with a chat template; None where nobody asks for text.
        frame: learned tokens around each image, whose tokens then share one position; None without.
        cross: a second encoder, whose rows the language model's cross attention looks at; None without.
        questions: how conversations are read where it is not by a chat template.
        released: the files that it came from, where these are of a released layout.
        video: which frames of videos are shown.
    """

    def __init__(
        self,
        vision: CogViT | EvaEncoder,
        adapter: PatchGroups,
        language: CausalLM | PretrainedLanguage,
        image_token_id: int,
        limits: ImageSize,
        tokenizer: Any = None,
        frame: ImageFrame | None = None,
        cross: EvaEncoder | None = None,
        questions: Questions | None = None,
        released: Released | None = None,
        video: VideoConfig | None = None,
    ) -> None:
        """Put the modules together.

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
        cross_dim = 0 if cross is None else cross.cfg.embed_dim
        if cross_dim != language.cfg.cross.encoder_dim:
            raise ValueError(
                f"the second encoder has {cross_dim} channels; the language model's cross attention looks at"
                f" {language.cfg.cross.encoder_dim}"
            )
        if frame is not None and isinstance(language, PretrainedLanguage):
            raise ValueError(f"a language model of family {language.cfg.family} takes no learned tokens around images")
        if vision.cfg.in_chans != 3:
            raise ValueError(f"the encoder takes images of {vision.cfg.in_chans} channels; expected 3")
        self.vision, self.adapter, self.language = vision, adapter, language
        self.image_token_id, self.limits, self.tokenizer = image_token_id, limits, tokenizer
        self.frame, self.cross, self.questions, self.released = frame, cross, questions, released
        self.video = video or VideoConfig()

    @classmethod
    def joined(
        cls,
        vision: CogViT,
        language: CausalLM | PretrainedLanguage,
        tokenizer: Any,
        adapter: AdapterConfig,
        min_pixels: float,
        max_pixels: float,
        expert: ExpertConfig | None = None,
    ) -> VisionLanguageModel:
        """Join an encoder and a language model by a new adapter.

        Args:
            vision: the encoder.
            language: the decoder.
            tokenizer: of transformers, with the image token and a chat template.
            adapter: which one; its hidden width is by default the language model's for swiglu and conv.
            min_pixels: a smaller image is enlarged.
            max_pixels: a larger image is made smaller.
            expert: gives the language model, which is frozen then, visual experts that begin as copies of it, and
                images learned tokens around them.

        Errors: DataError when the tokenizer has no image token, ValueError when something does not fit.
        """
        made = fitted_adapter(adapter, vision.cfg.embed_dim, language.cfg)
        limits = ImageLimits(vision.cfg.patch_size * made.spatial_pool, min_pixels, max_pixels)
        grown = language if expert is None else language.with_experts(expert)
        frame = None if expert is None else ImageFrame(language.cfg.embed_dim)
        return cls(vision, made, grown, image_token_id(tokenizer), limits, tokenizer, frame)

    def token_grid(self, image: ImageLike) -> Grid:
        """Return the rows and columns of tokens that an image has in the sequence. Errors: DataError."""
        opened = rgb_image(image)
        height_px, width_px = self.limits.size_px(opened.height, opened.width)
        return height_px // self.limits.unit_px, width_px // self.limits.unit_px

    def num_visual_tokens(self, image: ImageLike) -> int:
        """Return how many image tokens stand for an image (PIL, uint8 [3, H, W] or a path). Errors: DataError."""
        return num_tokens(self.token_grid(image), framed=self.frame is not None)

    def encode_images(self, images: PackedImages) -> Tensor:
        """Return the embeddings of a pack's images end to end, [E, D of the language model]."""
        grids, pool = [(rows, columns) for rows, columns in images.grid_hw.tolist()], self.adapter.spatial_pool
        visual_ED = self.adapter.forward_packed(self.vision.forward_packed(images).patch_TD, grids)
        if self.frame is None:
            return visual_ED
        return self.frame(visual_ED, [-(-rows // pool) * -(-columns // pool) for rows, columns in grids])

    def forward_packed(self, images: PackedImages, sequence: PackedSequence, cross: CrossRows | None = None) -> Tensor:
        """Return what the language model's head reads of a pack, [S, D]: the same as for its samples one by one.

        Args:
            images: of the samples; the encoder runs even where all of it is padding.
            sequence: whose `visual_row` names rows of the images' embeddings.
            cross: what cross attention looks at.
        """
        return self.language.forward_packed(sequence, self.encode_images(images), cross)

    def forward(self, input_ids: Tensor, images: Sequence[Sequence[ImageLike]] | None = None) -> Tensor:
        """Return logits [B, T, V].

        Args:
            input_ids: [B, T] without padding; each image is a run of `image_token_id` as long as `num_visual_tokens`
                says, anywhere in a row.
            images: of each row, in order: PIL images, uint8 [3, H, W] or paths; none at all if None.

        Errors: ValueError when the ids are not [B, T], one is not of the vocabulary or a row's image tokens are not its
        images'; DataError when an image does not decode.
        """
        shown = [[]] * len(input_ids) if images is None else [[rgb_image(image) for image in row] for row in images]
        if input_ids.ndim != 2 or len(shown) != len(input_ids):
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)} and there are images of {len(shown)} rows; expected"
                " (B, T) and B"
            )
        return self.language.logits(self.hidden_rows(list(input_ids), shown)).unflatten(0, input_ids.shape)

    def embedded(self, rows: Sequence[Tensor], images: Sequence[Sequence[Image]]) -> Embedded:
        """Return rows of token ids with their images as a pack. Errors: as `forward`."""
        ids_S, by_place = torch.cat(list(rows)), self.language.cfg.mrope_section is not None
        framed, device = self.frame is not None, self.language.embed.weight.device
        positions, experts = [], []
        for number, (row, own) in enumerate(zip(rows, images, strict=True)):
            try:
                grids = [self.token_grid(image) for image in own]
                parts = parts_of_row((row == self.image_token_id).tolist(), grids, framed=framed)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            positions.append(part_positions(parts, by_place=by_place, framed=framed))
            experts.append(expert_tokens(parts, framed=framed))
        x_SD, together = self.language.embed_ids(ids_S), [image for own in images for image in own]
        expert, cross = None, None
        if together:
            packed = pack_shown(together, self.limits, self.vision.cfg.patch_size, device)
            is_image_S = ids_S == self.image_token_id
            row_S = torch.where(is_image_S, is_image_S.cumsum(0) - 1, -1)
            x_SD = place_visual(x_SD, self.encode_images(packed), row_S)
            cross = self._cross_rows(images, device)
            if self.language.cfg.expert.every:
                expert = expert_rows(torch.cat(experts).to(device))
        bounds = torch.tensor([0, *map(len, rows), 0]).cumsum(0).to(torch.int32)
        return Embedded(x_SD, torch.cat(positions, 1).to(device), segments_of(bounds.to(device)), expert, cross)

    def _cross_rows(self, images: Sequence[Sequence[Image]], device: torch.device) -> CrossRows | None:
        """What cross attention looks at: the images of each row, whole."""
        if self.cross is None:
            return None
        cfg, together = self.cross.cfg, [image for own in images for image in own]
        packed = pack_shown(together, SquareImages(cfg.patch_size, cfg.image_size), cfg.patch_size, device)
        counts = [len(own) * cfg.side_patches**2 for own in images]
        return CrossRows(self.cross.forward_packed(packed).patch_TD, counts, keep=not torch.is_grad_enabled())

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
                ...}`, `{"type": "image", "image": PIL image or path}`, `{"type": "image_url", "image_url": path or
                data URL}` or `{"type": "video", "video": path}`.
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
            read = self.embedded([ids for ids, _ in prompts], [images for _, images in prompts])
        sampling = Sampling(max_new_tokens)
        spoken = self.language.stream(read.x_SD, read.position_3S, read.segments, sampling, read.expert, read.cross)
        answers = torch.stack(list(spoken), dim=1)
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers.tolist()]

    def hidden_rows(self, rows: Sequence[Tensor], images: Sequence[Sequence[Image]]) -> Tensor:
        """Return what the head reads of rows of token ids end to end, [S, D].

        images: of each row, as in `forward`. Errors: as `forward`.
        """
        device = self.language.embed.weight.device
        read = self.embedded([row.to(device) for row in rows], images)
        return self.language.hidden(read.x_SD, read.position_3S, read.segments, None, read.expert, read.cross)

    @torch.no_grad()
    def _next_ids(
        self, ids_S: Tensor, images: list[Image], sampling: Sampling, drafted: Drafted | None
    ) -> Iterator[Tensor]:
        read = self.embedded([ids_S], [images])
        if drafted is None:
            return self.language.stream(read.x_SD, read.position_3S, read.segments, sampling, read.expert, read.cross)
        is_image_S = ids_S == self.image_token_id
        row_S = torch.where(is_image_S, is_image_S.cumsum(0) - 1, -1)
        sizes = [self.num_visual_tokens(image) for image in images]
        slot_S = slots_of_images(row_S, sizes, self.language.cfg.mmtp.tokens)
        embedded_SD = self.language.embed_ids(ids_S)
        prompt = Prompt(read.x_SD, embedded_SD, slot_S, read.position_3S, 0, read.expert, read.cross)
        return self.language.stream_drafted(prompt, sampling, drafted)

    def prompt(self, messages: Sequence[Message]) -> tuple[Tensor, list[Image]]:
        """Return a conversation as token ids [T], each image as a run of its length, and its images.

        Errors: as `generate`.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; give it one, or ask it for logits")
        if self.questions is None:
            prompt = read_prompt(self.tokenizer, messages, self.video)
        else:
            prompt = read_questions(self.tokenizer, messages, self.questions, self.image_token_id)
        lengths = iter([self.num_visual_tokens(image) for image in prompt.images])
        ids = [[token] * (next(lengths) if token == self.image_token_id else 1) for token in prompt.ids]
        device = self.language.embed.weight.device
        return torch.tensor([token for run in ids for token in run], device=device), prompt.images

    def save_pretrained(self, directory: str | Path, layout: Layout | None = None) -> None:
        """Write a directory that `from_pretrained` reads.

        Args:
            directory: where to; it is made.
            layout: cogvlm, cogvlm2, cogagent or glm4v_9b write what was released under these names, a model read from
                there as it was, to the byte. None is the model's own: one of these where the encoder is theirs, else a
                directory of `vision`, `adapter` and `language`, which loads alone, also in transformers.

        Errors: CheckpointError names what a layout cannot hold.
        """
        if layout is not None or isinstance(self.vision, EvaEncoder):
            save_released(Path(directory), self._parts(), layout)
        else:
            save_ours(Path(directory), self._parts())

    def _parts(self) -> VlmParts:
        return VlmParts(
            self.vision,
            self.adapter,
            self.language,
            self.image_token_id,
            self.limits,
            self.tokenizer,
            self.frame,
            self.cross,
            self.questions,
            self.released,
            self.video,
        )

    def save_glm_ocr_full(self, directory: str | Path) -> None:
        """Write one directory for transformers' GlmOcrForConditionalGeneration and its processor.

        Errors: CheckpointError names what GLM-OCR cannot hold: an encoder not of the `cogvit_l` family, another adapter
        than GLM-OCR's, a language model that is not GLM-4 without biases, a tokenizer without its image tokens.
        """
        save_glm_ocr_full(Path(directory), self._parts())

    @property
    def causal(self) -> CausalLM:
        """The language model, which is one of ours. Errors: ValueError for one of transformers."""
        if not isinstance(self.language, CausalLM):
            raise ValueError(f"the language model is a {type(self.language).__name__}, and not a CausalLM")
        return self.language

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: str | torch.dtype = torch.float32) -> VisionLanguageModel:
        """Read what `save_pretrained` or `save_glm_ocr_full` wrote, a GLM-OCR of transformers, or a released CogVLM.

        CogVLM2 and CogAgent are read too, file by file, without holding weights twice. The model is in eval mode, so
        that answers are the same every time.

        Args:
            directory: of the checkpoint.
            dtype: of the weights: a torch dtype or its name (bfloat16, bf16).

        Errors: CheckpointError when a file is missing or damaged, or names every missing, extra or misshaped weight;
        ConfigError for an unknown dtype.
        """
        wanted = dtype_of(dtype)
        try:
            return cls(*read_parts(Path(directory), wanted)).to(wanted).eval()
        except ValueError as error:
            raise CheckpointError(f"{directory}: {error}") from None

"""Conversations as the tokens of a prompt, by the chat template of a transformers tokenizer.

Messages are OpenAI-style: {"role": "user", "content": text or parts}; a part is {"type": "text", "text": ...},
{"type": "image", "image": PIL image or path}, {"type": "image_url", "image_url": path or data URL, or {"url": ...}} or
{"type": "video", "video": path}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from cogvit.errors import DataError
from cogvit.model.config import VideoConfig
from cogvit.model.image_input import rgb_image
from cogvit.model.video import shown_parts

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_TOKEN = "<|image|>"
_AROUND = ("<|begin_of_image|>", "<|end_of_image|>")  # where a tokenizer has them
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """The tokens of a conversation, one image token where each image stands, and the images in order."""

    ids: list[int]
    images: list[Image]


def image_token_id(tokenizer: Any) -> int:
    """Return the id of the image token. Errors: DataError when the tokenizer has none."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise DataError(
            f"the tokenizer has no {IMAGE_TOKEN}; add it (tokenizer.add_tokens([{IMAGE_TOKEN!r}], special_tokens=True))"
        )
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def read_prompt(tokenizer: Any, messages: Sequence[Message], video: VideoConfig) -> Prompt:
    """Return a conversation as the prompt of its next answer.

    video: which frames of videos are shown.
    Errors: DataError when there is no message, one or a part of it is none, an image or video cannot be read, a text
    holds the image token, or the tokenizer has no image token or no chat template that takes the conversation.
    """
    check_template(tokenizer)
    token_id, images = image_token_id(tokenizer), []
    plain: list[dict[str, Any]] = []
    if not messages:
        raise DataError("a conversation without messages asks nothing")
    for message in messages:
        parts = [one for part in message_parts(message) for one in shown_parts(part, video)]
        images += [rgb_image(part["image"]) for part in parts if part["type"] == "image"]
        shown = [{"type": "image"} if part["type"] == "image" else part for part in parts]
        plain.append(in_plain_parts(tokenizer, message["role"], shown))
    text = rendered(tokenizer, plain, asks=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids.count(token_id) != len(images):
        raise DataError(
            f"the prompt has {ids.count(token_id)} {IMAGE_TOKEN} for {len(images)} images; images go into parts of"
            " their own, and texts must not spell the token"
        )
    return Prompt(ids, images)


def rendered(tokenizer: Any, plain: Sequence[Mapping[str, Any]], *, asks: bool) -> str:
    """Return messages as the chat template writes them; asks: with what stands before the next answer.

    Errors: DataError when the template refuses them, as many do a system message or two questions in a row.
    """
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # a template is a program: it raises what jinja2 has, and what Python has
        reason = str(error).partition("\n")[0]
        raise DataError(f"the chat template refuses the conversation: {reason}") from None


def check_template(tokenizer: Any) -> None:
    """Errors: DataError when a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; put one beside it as chat_template.jinja")


def in_plain_parts(tokenizer: Any, role: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a message as the tokenizer's template takes it: parts where it places images itself, else one text.

    parts: texts, and images without content.
    """
    has_image = any(part["type"] == "image" for part in parts)
    placed = has_image and IMAGE_TOKEN in tokenizer.chat_template
    return {"role": role, "content": list(parts) if placed else "".join(_spelt(part, tokenizer) for part in parts)}


def message_parts(message: Message) -> Iterator[dict[str, Any]]:
    """Yield the parts of a message in one form. Errors: DataError when it is none."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DataError(f"{str(message)[:60]!r} is no message; expected {{'role': ..., 'content': ...}}")
    content = message["content"]
    if not isinstance(message["role"], str) or not isinstance(content, Sequence):
        raise DataError(f"{str(message)[:60]!r} is no message; its role must be text, and its content text or parts")
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        match part:
            case {"type": "text", "text": str(text)}:
                yield {"type": "text", "text": _encodable(text)}
            case {"type": "image", "image": image}:
                yield {"type": "image", "image": image}
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
                yield {"type": "image", "image": url}
            case {"type": "video", "video": str() | PathLike() as path}:
                yield {"type": "video", "video": path}
            case _:
                raise DataError(
                    f"{str(part)[:60]!r} is no part of a message; expected a text, image, image_url or video part"
                )


def _encodable(text: str) -> str:
    """Return a text. Errors: DataError when it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{text[:60]!r} is no text that UTF-8 has; it holds half a surrogate pair") from None
    return text


def _spelt(part: Mapping[str, Any], tokenizer: Any) -> str:
    """A part as text, for templates that take nothing else."""
    if part["type"] == "text":
        return str(part["text"])
    unknown = (None, tokenizer.unk_token_id)  # its whole vocabulary would be copied for each part that is asked about
    there = all(tokenizer.convert_tokens_to_ids(token) not in unknown for token in _AROUND)
    before, after = _AROUND if there else ("", "")
    return f"{before}{IMAGE_TOKEN}{after}"

r"""Conversations: turns of text and images, as a sample's json holds them in the forms that people write.

LLaVA's {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": ...}]}, or
OpenAI's {"messages": [{"role": "user", "content": text or parts}, ...]}, whose texts may hold <image> too. A json that
has either is a conversation, and captions in it are not read.
"""

from __future__ import annotations

from typing import Any

from cogvit.errors import DataError
from cogvit.model.dialog import Conversation, Role, Turn
from data_pipeline.caption import is_encodable

Names = tuple[str, ...]

_FIELDS = ("messages", "conversations")
_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
_MARK = "<image>"  # where an image stands in a text
_TOKEN = "<|image|>"  # of the tokenizers that we know: a text that spells it would be taken for an image
_IMAGE_FIELDS = ("images", "image")
ASK = 1  # bytes that a turn of no text counts for, so that none is free


def is_conversation(metadata: dict[str, Any]) -> bool:
    """Whether a sample's json is a conversation, be it a good one or not."""
    return any(field in metadata for field in _FIELDS)


def conversation_of(metadata: dict[str, Any], num_images: int) -> Conversation:
    """Return the turns of a sample that has so many images.

    Errors: DataError with a reason to count by, when it is no conversation that can be trained on.
    """
    turns = metadata.get("messages", metadata.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise DataError("a conversation that is no list of turns")
    found = tuple(_turn(one) for one in turns)
    answers = [turn for turn in found if turn.role == "assistant"]
    if not answers:
        raise DataError("a conversation without an answer")
    for turn in answers:
        if None in turn.parts:
            raise DataError("a conversation with an image in an answer")
        if not "".join(part or "" for part in turn.parts).strip():
            raise DataError("a conversation with an empty answer")
    places = sum(turn.parts.count(None) for turn in found)
    if places != num_images:
        raise DataError("a conversation with more or fewer places for images than images")
    return found


def image_names(metadata: dict[str, Any]) -> Names:
    """Return what a conversation's json calls its images, in their order; nothing where it does not name them.

    Errors: DataError with a reason to count by.
    """
    named = [_names(metadata[field]) for field in _IMAGE_FIELDS if metadata.get(field)]
    if not named:
        turns = metadata.get("messages")
        contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        parts = [part for content in contents if isinstance(content, list) for part in content]
        own = [name for part in parts if isinstance(part, dict) and (name := _name_in(part))]
        named = [own] if own else []
    return tuple(named[0]) if named else ()


def asked_about(prompt: str, caption: str) -> Conversation:
    """Return a captioned image as a conversation: the image, what is asked, and the caption."""
    return Turn("user", (None, prompt) if prompt else (None,)), Turn("assistant", (caption,))


def spelt_bytes(conversation: Conversation) -> int:
    """Return the UTF-8 bytes of what is said."""
    return ASK + sum(len(part.encode()) for turn in conversation for part in turn.parts if part is not None)


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise DataError("a conversation whose images are not named by text")
    return names


def _name_in(part: dict[str, Any]) -> str:
    """What a part calls its image, if it does: data URLs are no names."""
    value = part.get("image_url", part.get("image"))
    value = value.get("url") if isinstance(value, dict) else value
    return value if isinstance(value, str) and not value.startswith("data:") else ""


def _turn(one: Any) -> Turn:
    if not isinstance(one, dict):
        raise DataError("a conversation with a turn that is no object")
    role = one.get("role", one.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError("a conversation with a role that is none of system, user (human) and assistant (gpt)")
    content = one.get("content", one.get("value"))
    parts: list[str | None] = []
    for part in content if isinstance(content, list) else [content]:
        match part:
            case str(text) | {"type": "text", "text": str(text)}:
                parts += _marked(text)
            case {"type": "image"} | {"type": "image_url"}:
                parts.append(None)
            case _:
                raise DataError("a conversation with a part that is neither text nor image")
    return Turn(_ROLES[role], tuple(parts))


def _marked(text: str) -> list[str | None]:
    """A text as parts, cut at the marks of images; a line break beside a mark belongs to it."""
    if not is_encodable(text) or _TOKEN in text:
        raise DataError(f"a conversation whose text spells {_TOKEN} or is not UTF-8")
    parts: list[str | None] = []
    first, *others = text.split(_MARK)
    parts += [first] if first.strip() or not others else []
    for other in others:
        parts.append(None)
        parts += [other.removeprefix("\n")] if other.strip() else []
    return parts

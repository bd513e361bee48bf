r"""Conversations: turns of text, images and videos, as a sample's json holds them in the forms that people write.

LLaVA's {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": ...}]}, or
OpenAI's {"messages": [{"role": "user", "content": text or parts}, ...]}, whose texts may hold <image> too; <video>
likewise. A json that has either is a conversation, and captions in it are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Any

from cogvit.errors import DataError
from cogvit.model.dialog import Conversation, Role, Turn
from data_pipeline.caption import is_encodable

Names = tuple[str, ...]


class Mark(Enum):
    """Where something is shown in a text."""

    IMAGE = "<image>"
    VIDEO = "<video>"


Part = str | Mark

_FIELDS = ("messages", "conversations")
_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
_MARKS = re.compile("(<image>|<video>)")
_TOKEN = "<|image|>"  # of the tokenizers that we know: a text that spells it would be taken for an image
ASK = 1  # bytes that a turn of no text counts for, so that none is free


def is_conversation(metadata: dict[str, Any]) -> bool:
    """Whether a sample's json is a conversation, be it a good one or not."""
    return any(field in metadata for field in _FIELDS)


def conversation_of(metadata: dict[str, Any], num_images: int, videos: Sequence[Sequence[str]] = ()) -> Conversation:
    """Return the turns of a sample that has so many images, a video being its frames as images with their times.

    videos: for each video the texts before its frames, which may be empty.
    Errors: DataError with a reason to count by, when it is no conversation that can be trained on.
    """
    frames = iter(videos)

    def shown(part: Part) -> tuple[str | None, ...]:
        match part:
            case Mark.IMAGE:
                return (None,)
            case Mark.VIDEO:
                return tuple(one for text in next(frames) for one in ((text, None) if text else (None,)))
            case text:
                return (text,)

    turns = _turns(metadata, num_images, len(videos))
    return tuple(Turn(role, tuple(one for part in parts for one in shown(part))) for role, parts in turns)


def marks_of(metadata: dict[str, Any], num_images: int, num_videos: int) -> list[Mark]:
    """Return the order in which a sample's images and videos are shown. Errors: as `conversation_of`."""
    return [part for _, parts in _turns(metadata, num_images, num_videos) for part in parts if isinstance(part, Mark)]


def file_names(metadata: dict[str, Any], mark: Mark) -> Names:
    """Return what a conversation's json calls its images or videos, in order; nothing where it does not name them.

    Errors: DataError with a reason to count by.
    """
    kind = mark.name.lower()
    named = [_names(metadata[field]) for field in (f"{kind}s", kind) if metadata.get(field)]
    if not named:
        turns = metadata.get("messages")
        contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        parts = [part for content in contents if isinstance(content, list) for part in content]
        own = [name for part in parts if isinstance(part, dict) and (name := _name_in(part, kind))]
        named = [own] if own else []
    return tuple(named[0]) if named else ()


def asked_about(prompt: str, caption: str) -> Conversation:
    """Return a captioned image as a conversation: the image, what is asked, and the caption."""
    return Turn("user", (None, prompt) if prompt else (None,)), Turn("assistant", (caption,))


def spelt_bytes(conversation: Conversation) -> int:
    """Return the UTF-8 bytes of what is said."""
    return ASK + sum(len(part.encode()) for turn in conversation for part in turn.parts if part is not None)


def _turns(metadata: dict[str, Any], num_images: int, num_videos: int) -> list[tuple[Role, list[Part]]]:
    """The turns of a conversation that can be trained on. Errors: as `conversation_of`."""
    turns = metadata.get("messages", metadata.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise DataError("a conversation that is no list of turns")
    found = [_turn(one) for one in turns]
    answers = [parts for role, parts in found if role == "assistant"]
    if not answers:
        raise DataError("a conversation without an answer")
    for parts in answers:
        if not all(isinstance(part, str) for part in parts):
            raise DataError("a conversation with an image in an answer, or a video")
        if not "".join(part for part in parts if isinstance(part, str)).strip():
            raise DataError("a conversation with an empty answer")
    places = {mark: sum(parts.count(mark) for _, parts in found) for mark in Mark}
    if not num_images and places == {Mark.IMAGE: num_videos, Mark.VIDEO: 0}:  # as LLaVA-Video marks its videos
        found = [(role, [Mark.VIDEO if part is Mark.IMAGE else part for part in parts]) for role, parts in found]
        places = {Mark.IMAGE: 0, Mark.VIDEO: num_videos}
    for mark, number in ((Mark.IMAGE, num_images), (Mark.VIDEO, num_videos)):
        if places[mark] != number:
            kind = mark.name.lower()
            raise DataError(f"a conversation with more or fewer places for {kind}s than {kind}s")
    return found


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise DataError("a conversation whose images or videos are not named by text")
    return names


def _name_in(part: dict[str, Any], kind: str) -> str:
    """What a part calls its image or video, if it does: data URLs are no names."""
    value = part.get(f"{kind}_url", part.get(kind))
    value = value.get("url") if isinstance(value, dict) else value
    return value if isinstance(value, str) and not value.startswith("data:") else ""


def _turn(one: Any) -> tuple[Role, list[Part]]:
    if not isinstance(one, dict):
        raise DataError("a conversation with a turn that is no object")
    role = one.get("role", one.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError("a conversation with a role that is none of system, user (human) and assistant (gpt)")
    content = one.get("content", one.get("value"))
    parts: list[Part] = []
    for part in content if isinstance(content, list) else [content]:
        match part:
            case str(text) | {"type": "text", "text": str(text)}:
                parts += _marked(text)
            case {"type": "image" | "image_url"}:
                parts.append(Mark.IMAGE)
            case {"type": "video" | "video_url"}:
                parts.append(Mark.VIDEO)
            case _:
                raise DataError("a conversation with a part that is neither text nor image nor video")
    return _ROLES[role], parts


def _marked(text: str) -> list[Part]:
    """A text as parts, cut at the marks of images and videos; a line break beside a mark belongs to it."""
    if not is_encodable(text) or _TOKEN in text:
        raise DataError(f"a conversation whose text spells {_TOKEN} or is not UTF-8")
    first, *others = _MARKS.split(text)
    parts: list[Part] = [first] if first.strip() or not others else []
    for mark, other in zip(others[::2], others[1::2], strict=True):
        parts.append(Mark(mark))
        parts += [other.removeprefix("\n")] if other.strip() else []
    return parts

"""Conversations as the CogVLM family was taught to read them, which has no chat template.

CogVLM's and CogAgent's are a text (`Question: ... Answer:`) behind all images. GLM-4V's are turns behind control
tokens, images in front of the text of their turn.

Source: `_history_to_prompt` of the released modeling_cogvlm.py and modeling_cogagent.py; `apply_chat_template` of the
tokenizer of the released glm-4v-9b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from cogvit.errors import DataError
from cogvit.model.chat import Message, Prompt, message_parts
from cogvit.model.image_input import rgb_image

if TYPE_CHECKING:
    from PIL.Image import Image

Template = Literal["base", "chat", "chat_old", "vqa"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
Words = Literal["cogvlm", "cogagent", "glm4v"]
_KNOWN: dict[Words, tuple[Template, ...]] = {
    "cogvlm": ("base", "chat", "vqa"),
    "cogagent": TEMPLATES,
    "glm4v": ("base", "chat"),
}
_BEGIN = ("[gMASK]", "<sop>")  # of GLM-4V


@dataclass(frozen=True)
class Questions:
    """How a conversation becomes text.

    Attributes:
        template: base is the question alone; chat asks for an answer and vqa for a short one.
        words: whose.

    Errors: ValueError when the template is none of the model's.
    """

    template: Template = "chat"
    words: Words = "cogvlm"

    def __post_init__(self) -> None:
        known = _KNOWN[self.words]
        if self.template not in known:
            raise ValueError(f"template={self.template!r} must be one of {', '.join(known)}")

    @property
    def by_turns(self) -> bool:
        """Whether turns stand behind control tokens, and are no text."""
        return self.words == "glm4v" and self.template == "chat"

    def text(self, history: Sequence[tuple[str, str]], question: str) -> str:
        """Return the text whose continuation is the answer; base, and CogAgent's vqa, leave the history out.

        Args:
            history: questions and answers before.
            question: that is asked.
        """
        if self.template == "base":
            return question
        if self.words == "cogvlm":
            asks = "Short answer:" if self.template == "vqa" else "Answer:"
            turns = [f"Question: {asked} {asks} {said}\n" for asked, said in history]
            return "".join(turns) + f"Question: {question} {asks}"
        if self.template == "chat":
            return " [INST] " + "".join(f"{a} [/INST] {b} [INST] " for a, b in history) + f"{question} [/INST] "
        if self.template == "vqa":
            return f"<EOI>Question: {question} Short answer:"
        return "<EOI>Question: " + "".join(f"{a} Answer: {b}\nQuestion: " for a, b in history) + f"{question} Answer:"


@dataclass(frozen=True)
class _Turn:
    role: str
    text: str
    images: tuple[Image, ...]


def read_questions(tokenizer: Any, messages: Sequence[Message], questions: Questions, image_token_id: int) -> Prompt:
    """Return a conversation as the prompt of its next answer.

    Errors: DataError when a message or part is none, an image cannot be read, turns of user and assistant do not
    alternate, a text spells the image token, or the tokenizer has no token that stands before a turn.
    """
    turns = [_read(message) for message in messages]
    first = 1 if questions.by_turns and turns and turns[0].role == "system" else 0
    for number, turn in enumerate(turns[first:]):
        if turn.role != ("user", "assistant")[number % 2]:
            place = (
                "a system message stands before them"
                if questions.by_turns
                else "there is no place for a system message"
            )
            raise DataError(
                f"message {first + number} is of {turn.role!r}; questions of the user and answers of the assistant must"
                f" alternate, and {place}"
            )
    if len(turns[first:]) % 2 == 0:
        raise DataError("a conversation ends with a question of the user")
    images = [image for turn in turns for image in turn.images]
    if questions.by_turns:
        return Prompt(_turns_ids(tokenizer, turns, image_token_id), images)
    said = [turn.text for turn in turns]
    text = questions.text(list(zip(said[:-1:2], said[1::2], strict=True)), said[-1])
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Prompt([*begin, *[image_token_id] * len(images), *_text_ids(tokenizer, text, image_token_id)], images)


def _read(message: Message) -> _Turn:
    texts, images = [], []
    for part in message_parts(message):
        if part["type"] == "image":
            images.append(rgb_image(part["image"]))
        elif part["type"] == "video":
            raise DataError(f"{part['video']} is a video; they are shown to models with a chat template")
        else:
            texts.append(str(part["text"]))
    return _Turn(message["role"], "".join(texts), tuple(images))


def _text_ids(tokenizer: Any, text: str, image_token_id: int, **options: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"]
    if image_token_id in ids:
        raise DataError(f"a text spells token {image_token_id}, which stands for images")
    return ids


def _turns_ids(tokenizer: Any, turns: Sequence[_Turn], image_token_id: int) -> list[int]:
    """The tokens of GLM-4V's turns: a text that spells a control token stays text."""
    names = (*_BEGIN, *(f"<|{role}|>" for role in (*(turn.role for turn in turns), "assistant")))
    known = tokenizer.get_vocab()
    if missing := [name for name in names if name not in known]:
        raise DataError(
            f"the tokenizer has no {missing[0]}, by which this model tells turns; template base asks plainly"
        )
    ids = [known[name] for name in _BEGIN]
    for turn in turns:
        text = turn.text.removeprefix("\n") if turn.role == "assistant" else turn.text  # which its answers begin with
        before = [known[f"<|{turn.role}|>"], *_text_ids(tokenizer, "\n", image_token_id)]
        ids += [*before, *[image_token_id] * len(turn.images)]
        ids += _text_ids(tokenizer, text, image_token_id, split_special_tokens=True)
    return [*ids, known["<|assistant|>"]]

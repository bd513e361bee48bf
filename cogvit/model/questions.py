"""Conversations as the CogVLM family was taught to read them: no chat template, but `Question: ... Answer:`.

All images stand in front, then comes the text of all turns.

Source: `_history_to_prompt` of the released modeling_cogvlm.py and modeling_cogagent.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cogvit.errors import DataError
from cogvit.model.chat import Message, Prompt, message_parts
from cogvit.model.image_input import rgb_image

Template = Literal["base", "chat", "chat_old", "vqa"]
TEMPLATES: tuple[Template, ...] = get_args(Template)


@dataclass(frozen=True)
class Questions:
    """How a conversation becomes text.

    Attributes:
        template: base is the question alone; chat asks for an answer and vqa for a short one.
        instruct: CogAgent's words instead of CogVLM's; it alone has chat_old.

    Errors: ValueError when the template is none of the model's.
    """

    template: Template = "chat"
    instruct: bool = False

    def __post_init__(self) -> None:
        known = [name for name in TEMPLATES if self.instruct or name != "chat_old"]
        if self.template not in known:
            raise ValueError(f"template={self.template!r} must be one of {', '.join(known)}")

    def text(self, history: Sequence[tuple[str, str]], question: str) -> str:
        """Return the text whose continuation is the answer; base, and CogAgent's vqa, leave the history out.

        Args:
            history: questions and answers before.
            question: that is asked.
        """
        if self.template == "base":
            return question
        if not self.instruct:
            asks = "Short answer:" if self.template == "vqa" else "Answer:"
            turns = [f"Question: {asked} {asks} {said}\n" for asked, said in history]
            return "".join(turns) + f"Question: {question} {asks}"
        if self.template == "chat":
            return " [INST] " + "".join(f"{a} [/INST] {b} [INST] " for a, b in history) + f"{question} [/INST] "
        if self.template == "vqa":
            return f"<EOI>Question: {question} Short answer:"
        return "<EOI>Question: " + "".join(f"{a} Answer: {b}\nQuestion: " for a, b in history) + f"{question} Answer:"


def read_questions(tokenizer: Any, messages: Sequence[Message], questions: Questions, image_token_id: int) -> Prompt:
    """Return a conversation as the prompt of its next answer.

    Errors: DataError when a message or part is none, an image cannot be read, turns of user and assistant do not
    alternate, or a text spells the image token.
    """
    turns, images = [], []
    for number, message in enumerate(messages):
        texts = []
        for part in message_parts(message):
            if part["type"] == "image":
                images.append(rgb_image(part["image"]))
            elif part["type"] == "video":
                raise DataError(f"{part['video']} is a video; they are shown to models with a chat template")
            else:
                texts.append(str(part["text"]))
        if message["role"] != ("user", "assistant")[number % 2]:
            raise DataError(
                f"message {number} is of {message['role']!r}; questions of the user and answers of the assistant must"
                " alternate, and there is no place for a system message"
            )
        turns.append("".join(texts))
    if len(turns) % 2 == 0:
        raise DataError("a conversation ends with a question of the user")
    history = list(zip(turns[:-1:2], turns[1::2], strict=True))
    ids = tokenizer(questions.text(history, turns[-1]), add_special_tokens=False)["input_ids"]
    if image_token_id in ids:
        raise DataError(f"a text spells token {image_token_id}, which stands for images")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Prompt([*begin, *[image_token_id] * len(images), *ids], images)

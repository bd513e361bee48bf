"""Prompts of zero-shot classification: the classes' names in templates, in each language."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvit.errors import ConfigError
from data_pipeline.caption import LANGUAGES

TEMPLATES = {
    "en": (
        "{}",
        "a photo of a {}.",
        "a photo of the {}.",
        "a picture of a {}.",
        "a drawing of a {}.",
        "a close-up photo of a {}.",
        "this is a {}.",
    ),
    "zh": (
        "{}",
        "\u4e00\u5f20{}\u7684\u7167\u7247\u3002",  # a photo of {}
        "\u4e00\u5f20{}\u7684\u56fe\u7247\u3002",  # a picture of {}
        "\u4e00\u5e45{}\u7684\u753b\u3002",  # a drawing of {}
        "{}\u7684\u7279\u5199\u7167\u7247\u3002",  # a close-up photo of {}
        "\u8fd9\u662f{}\u3002",  # this is {}
    ),
}


@dataclass(frozen=True)
class Prompts:
    """What the classes are called in one language, and the sentences their names go into."""

    classes: tuple[tuple[str, ...], ...]  # the names of each label, in the labels' order
    templates: tuple[str, ...]  # each with one {}

    def texts(self) -> tuple[list[str], list[int]]:
        """Return every prompt and its label."""
        pairs = [
            (template.replace("{}", name), label)
            for label, names in enumerate(self.classes)
            for name in names
            for template in self.templates
        ]
        return [text for text, _ in pairs], [label for _, label in pairs]


def read_prompts(path: Path) -> dict[str, Prompts]:
    """Read {language: {"classes": [name or [names], ...], "templates": [...]}}, TEMPLATES where it names none.

    Errors: ConfigError when the file is missing or holds something else.
    """
    try:
        found = json.loads(path.read_text())
        return {language: _prompts(language, entry) for language, entry in found.items()}
    except OSError as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--prompts {path} does not hold {{language: {{classes: [...], templates: [...]}}}}: {error!r}"
        ) from None


def _prompts(language: str, entry: Any) -> Prompts:
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is none of {', '.join(LANGUAGES)}")
    classes = [[name] if isinstance(name, str) else name for name in entry["classes"]]
    templates = entry.get("templates", TEMPLATES[language])
    if not classes or not all(names and all(isinstance(name, str) for name in names) for names in classes):
        raise ValueError("every class needs a name")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must have one {{}}")
    return Prompts(tuple(tuple(names) for names in classes), tuple(templates))

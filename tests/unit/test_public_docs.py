"""What `python -m pydoc cogvit` shows: every public name explains itself, in words of its own."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc

import pytest
from torch import nn

import cogvit


@pytest.fixture(scope="module")
def page() -> str:
    return pydoc.plain(pydoc.render_doc(cogvit))


@pytest.mark.parametrize("name", cogvit.__all__)
def test_public_names_document_themselves_and_their_members(name: str, page: str) -> None:
    public = getattr(cogvit, name)
    text = public.__doc__ or ""
    assert len(text) > 20 and not text.startswith(f"{name}("), "dataclasses bring a signature, no explanation"
    assert text.splitlines()[0].strip() in page
    if not inspect.isclass(public):
        return
    members = {
        key: value
        for key, value in vars(public).items()
        if (callable(value) or isinstance(value, (property, classmethod, staticmethod))) and not key.startswith("_")
    }
    if issubclass(public, nn.Module):
        members["__init__"] = public.__init__
    for key, value in members.items():
        assert getattr(value, "__doc__", None) or getattr(value, "__func__", value).__doc__, f"{name}.{key}"
    if dataclasses.is_dataclass(public):
        # What a class has from another is explained there.
        explained = "".join((one.__doc__ or "").partition("Attributes:")[2] for one in public.__mro__)
        fields = {field.name for field in dataclasses.fields(public)}
        known = {field.name for field in dataclasses.fields(cogvit.CogViTConfig)} if name == "TextConfig" else set()
        assert [field for field in fields - known if f"        {field}: " not in explained] == []


def test_the_page_tells_errors_and_names_everything(page: str) -> None:
    overview = page.partition("PACKAGE CONTENTS")[0]
    assert [name for name in cogvit.__all__ if name not in overview] == []
    assert "Initialize internal Module state" not in page  # torch's words, where a class has none of its own
    for name in cogvit.__all__:
        public = getattr(cogvit, name)
        documented = inspect.getsource(public)
        if "raise ValueError" in documented or "raise CheckpointError" in documented:
            assert "Errors:" in documented, name


def test_the_example_of_the_page_runs() -> None:
    indented = (cogvit.__doc__ or "").partition("What is here")[0].splitlines()
    code = "\n".join(line[4:] for line in indented if line.startswith("    "))
    code = code.replace("CogViTConfig()", "CogViTConfig(depth=1, embed_dim=64, num_heads=4)")
    scope: dict[str, object] = {}
    exec(code, scope)
    features, pack = scope["features"], scope["pack"]
    assert isinstance(features, cogvit.PackedFeatures) and isinstance(pack, cogvit.PackedImages)
    assert features.patch_TD.shape == (pack.num_tokens, 64)

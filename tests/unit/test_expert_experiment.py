"""The experiment on visual experts: what its command refuses, its table, and its way from boxes to figures."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvit import CogViT
from cogvit.config.arguments import read_arguments
from cogvit.errors import ConfigError
from configs.models import demo_vision
from tools.bench._record import flags_of
from tools.demo_corpus import digits, pictograms
from tools.demo_corpus.sample import write_shard
from tools.experiments.expert import PAPER, Arguments, drawn, names, read_rows, report
from tools.experiments.expert_record import Row, picture, record
from tools.experiments.expert_runs import KINDS, Found, Place, boxes_of

FOUND = Found(
    captions=(0.5, 0.1),
    boxes=(0.25, 0.125),
    nats={"en": (1.0, 1.0)},
    trained=1000,
    cpu_s=60.0,
    curve=[(step, 2.0) for step in range(1, 11)],
    seeing=[(5, 0.5), (10, 1.0)],
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (Arguments(run="nose"), "--run nose is no part"),
        (Arguments(steps="few"), "--steps few must be a whole number"),
        (Arguments(language_steps="-1"), "--language-steps -1 must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(report(arguments))


def test_a_record_names_the_flags_that_reproduce_it() -> None:
    arguments = Arguments(language_steps="7", out="")
    assert read_arguments(Arguments, flags_of(arguments).split()) == arguments


def test_texts_that_are_said_to_the_bit_as_before_are_called_equal() -> None:
    forgot = replace(FOUND, nats={"en": (2.0, 1.0)})
    lines = list(record([Row("expert", (FOUND, FOUND)), Row("full", (FOUND, forgot))]))
    assert any(
        line.startswith("| expert | 50.0% ± 0.0% (10.0%) | 25.0% ± 0.0% (12.5%) | equal (2.72)") for line in lines
    )
    assert any("5.05 ± 3.30 (2.72)" in line for line in lines if line.startswith("| full"))
    assert picture([Row("expert", (FOUND, FOUND)), Row("full", (FOUND, forgot))]).count("<path") >= 4


def test_a_drawn_box_lies_where_its_answer_says() -> None:
    for seed in range(40):
        solved = drawn(seed)
        pixels = np.asarray(Image.open(io.BytesIO(solved.images[0])).convert("RGB"))
        rows, columns = np.nonzero((pixels != PAPER).any(axis=-1))
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        (named,) = boxes_of(solved.messages[1]["content"])
        assert named == pytest.approx(seen, abs=0.05)  # a thousandth of 48 px


@pytest.mark.long
def test_every_kind_is_trained_once_and_examined(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for part, number in (("train", 0), ("train", 1), ("heldout", 2)):
        indices = digits.split(0)[0][40 * number :][:40]
        write_shard(corpus / part / f"digits-{number % 2:05d}.tar", digits.drawings(0, number, indices))
    write_shard(corpus / "train/pictograms-00000.tar", list(pictograms.drawings(0, 0))[:60])
    CogViT(demo_vision()).save_pretrained(tmp_path / "encoder")
    shown = Arguments(str(corpus), str(tmp_path / "encoder"), str(tmp_path / "work"), "", "100", "4", "2")
    for name in names()[: 1 + len(KINDS)]:
        assert list(report(replace(shown, run=name))) == []
    place = Place(Path(shown.corpus), Path(shown.init), Path(shown.work))
    found = {row.kind: row.found[0] for row in read_rows(place)}
    assert set(found) == set(KINDS)
    same = {kind: all(after == before for after, before in one.nats.values()) for kind, one in found.items()}
    assert same == {"adapter": True, "expert": True, "full": False}
    assert found["adapter"].trained < found["expert"].trained and found["adapter"].trained < found["full"].trained
    assert sum(line.startswith("| ") for line in report(shown)) > 0

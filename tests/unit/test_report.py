"""The report: well-formed, complete, self-contained; its charts show the values they are given."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fontTools.ttLib import TTFont
from hypothesis import given
from hypothesis import strategies as st

from cogvit.batch import DataPosition
from cogvit.config import LogConfig, RunConfig, ScheduleConfig, TeacherConfig, TeachersConfig, to_json
from cogvit.errors import CogViTError
from cogvit.report.chart import (
    HEIGHT,
    WIDTH,
    Series,
    line_chart,
    linear_axis,
    log_axis,
    number,
    running_mean,
    svg_picture,
)
from cogvit.report.figures import evaluation_table
from cogvit.report.font import FAMILY
from cogvit.report.page import report_page, write_report
from cogvit.report.style import HEAD
from cogvit.training.chrono import Chrono
from cogvit.training.meter import Meter
from cogvit.training.state import TrainState, state_to_json

CONFIG = RunConfig(
    schedule=ScheduleConfig(steps=40),
    teachers=TeachersConfig(members=(TeacherConfig("dino<v3>"),)),
    log=LogConfig(wandb="off"),
)
EVALUATION = {
    "zeroshot_digits_en": {"accuracy": {"value": 0.913, "chance": 0.1}},
    "fit": {"r2": {"value": -1, "chance": 0}},
}
PNG = bytes.fromhex("89504e470d0a1a0a") + b"picture"
VOID_TAGS = {"meta", "img", "br", "line", "wbr"}


class WellFormed(HTMLParser):
    """Fails on a tag that is not closed in order; collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_TAGS:
            assert self.open.pop() == tag


def make_run(directory: Path, config: RunConfig, num_steps: int) -> Path:
    with Meter(directory, config, writer=True, start_step=0) as meter:
        for step in range(1, num_steps + 1):
            meter.record(step, {"loss": 2.0 / step, "loss_<b>": 1.0, "lr": 1e-3, "images": 8.0, "seconds": 90.0})
    (directory / "config.json").write_text(json.dumps(to_json(config)))
    return directory


@pytest.fixture
def page(tmp_path: Path) -> str:
    first = make_run(tmp_path / "stage1", CONFIG, 40)
    second = make_run(tmp_path / "stage2", replace(CONFIG, objective="contrast"), 0)
    write_report(tmp_path / "deep" / "report.html", [first, second], EVALUATION, {"Patch features & images": PNG})
    return (tmp_path / "deep" / "report.html").read_text()


def test_page_is_well_formed_and_refers_to_nothing_outside(page: str) -> None:
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    assert all(reference.startswith("data:image/png;base64,") for reference in parser.references)
    assert not re.search(r'https?://|url\((?!"data:)|@import', page)


def test_names_from_outside_are_escaped(page: str) -> None:
    assert "loss_<b>" not in page and "loss_&lt;b&gt;" in page
    assert "dino<v3>" not in page and "dino&lt;v3&gt;" in page


def test_page_has_evaluation_with_chance_pictures_settings_and_versions(page: str) -> None:
    row = next(row for row in page.replace("<wbr>", "").split("<tr>") if "zeroshot_digits_en" in row)
    assert "91.3&#8239;%" in row and "10.0&#8239;%" in row
    assert "width:91.3%" in row and "left:10.0%" in row
    assert base64.b64encode(PNG).decode() in page and "Patch features &amp; images" in page
    settings = page.partition("Settings that differ from the defaults")[2].partition("<details>")[0]
    assert "schedule.steps" in settings and "optim.lr" not in settings
    assert "Complete configuration" in page and "megatron-core" in page
    assert "Stage 1: distillation" in page and "Stage 2: image-text alignment" in page


def test_every_baseline_stands_in_a_column_of_its_figure() -> None:
    figure = {"value": 0.06, "chance": 0.004}
    table = evaluation_table(
        {
            "distill_dinov3": {"explained_all": figure, "explained_all_place": {"value": 0.128, "chance": 0.0}},
            "retrieval_x_en": {"r5": figure, "r5_color": {"value": 0.022, "chance": 0.004}, "r5_usual": figure},
        }
    )
    retrieval, distill = table.replace("<wbr>", "").split("<h3>")[1:]
    first, further = retrieval.split("<details>")
    assert rows_of(first).keys() == {"r5"} and "r5_usual" in further
    assert "2.2&#8239;%" in rows_of(first)["r5"] and "12.8&#8239;%" in rows_of(distill)["explained_all"]
    assert columns_of(first) == ["value", "chance", "color"] and columns_of(further) == ["value", "chance"]
    assert columns_of(distill) == ["value", "chance", "place"]


def rows_of(table: str) -> dict[str, str]:
    return {re.findall(r"<small>([^<]+)</small>", row)[0]: row for row in table.split("<tr>")[2:]}


def columns_of(table: str) -> list[str]:
    return re.findall(r"num sorts\">([\w ]+)</th>", table)


def test_what_matters_comes_first_and_nats_are_one_row_a_task() -> None:
    share = {"value": 0.9, "chance": 0.1}
    nats = {"nats": {"value": 0.2, "chance": 1.5}, "nats_gap": {"value": 1.3, "chance": 0.0}}
    table = evaluation_table(
        {
            "distill_dinov3": {"explained_all": share},
            "perplexity_digits_en": {**nats, "nats_without_image": {"value": 1.25, "chance": 1.5}},
            "knn_digits": {"accuracy": share},
            "caption_digits_en": {"exact": share},
            "own_task": {"share": share},
        }
    ).replace("<wbr>", "")
    tasks = [task for task in re.findall(r"<td>(\w+)<br>", table) if task != "perplexity_digits_en"]
    assert tasks == ["caption_digits_en", "knn_digits", "distill_dinov3", "own_task"]
    first, further = table.partition("<h3>Nats")[2].partition("<h3>")[0].split("<details>")
    assert rows_of(first).keys() == {"nats"} and rows_of(further).keys() == {"nats_gap"}
    assert columns_of(first) == ["value", "chance", "without image"] and ">1.250<" in rows_of(first)["nats"]


def test_key_figures_come_from_the_metrics(page: str) -> None:
    cards = {name: value for value, name in re.findall(r"<div><b>([^<]+)</b><span>([^<]+)</span></div>", page)}
    assert (cards["steps"], cards["images"], cards["time in steps"]) == ("40", "320", "1h00m")
    assert cards["final loss"] == number((2 / 39 + 2 / 40) / 2)  # the last twentieth
    assert "No step was recorded." in page  # stage 2


def test_a_policy_is_known_by_its_reward_and_not_by_its_loss(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", CONFIG, 0)
    with Meter(out, CONFIG, writer=True, start_step=0) as meter:
        meter.record(1, {"loss": 1e-9, "reward": 0.25, "equal_groups": 0.5, "failed_prompts": 0.0})
    write_report(tmp_path / "report.html", [out], {}, {})
    page = (tmp_path / "report.html").read_text()
    assert "<b>0.25</b><span>final reward</span>" in page and "final loss" not in page
    lost = page.partition("<b>Prompts put off, failed or stale</b>")[2].partition("</figure>")[0]
    assert "failed_prompts" in lost and "equal_groups" not in lost and "all worth the same</b>" in page


def test_empty_parts_are_left_out(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", [make_run(tmp_path / "run", CONFIG, 1)], {}, {})
    text = (tmp_path / "report.html").read_text()
    assert "<h2>Evaluation" not in text and "<h2>Pictures" not in text and text.count("<svg") == 2


def test_directory_that_is_not_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(CogViTError, match="run directory"):
        write_report(tmp_path / "report.html", [tmp_path], {}, {})
    assert not (tmp_path / "report.html").exists()


def points(chart: str, kind: str) -> list[tuple[float, float]]:
    """Return the coordinates of the first path of a kind."""
    path = re.search(rf'class="{kind}"[^>]* d="M([^"]+)"', chart)
    assert path is not None
    return [tuple(map(float, point.split())) for point in path.group(1).split("L")]


def test_line_goes_through_its_values() -> None:
    drawn = points(line_chart("t", [Series("a", [1, 2, 3], [0.0, 5.0, 10.0], noisy=False)]), "line")
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x2 > x0 and y0 > y2  # SVG's y points down


@given(
    st.lists(st.floats(-1e6, 1e6) | st.floats(1e-9, 1e9), min_size=1, max_size=700),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_any_line_stays_inside_its_chart(values: list[float], first: int, noisy: bool) -> None:
    chart = line_chart("t", [Series("a", range(first, first + len(values)), values, noisy)])
    for x, y in points(chart, "line"):
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
    assert len(points(chart, "line")) <= 300
    assert len(re.findall("<text", chart)) <= 16


@given(st.floats(-1e6, 1e6), st.floats(0.01, 1e9))
def test_ticks_of_a_linear_axis_are_few_and_cover_the_values(low: float, span: float) -> None:
    axis = linear_axis(low, low + span, ends="round")
    assert 2 <= len(axis.ticks) <= 7
    assert axis.ticks[0] <= low + 1e-6 * span and low + span <= axis.ticks[-1] + 1e-6 * span


def test_axis_over_many_magnitudes_is_logarithmic() -> None:
    assert log_axis(0.5, 300.0).ticks == (1.0, 10.0, 100.0)
    drawn = points(line_chart("t", [Series("a", [1, 2, 3], [1.0, 10.0, 100.0], noisy=False)]), "line")
    assert drawn[0][1] - drawn[1][1] == pytest.approx(drawn[1][1] - drawn[2][1], abs=0.2)


def test_a_picture_of_charts_is_a_file_of_its_own() -> None:
    lines = [Series("a & b", [1, 2, 3], [1.0, 2.0, 3.0]), Series("c", [1, 2, 3], [3.0, 2.0, 1.0], noisy=False)]
    root = ElementTree.fromstring(svg_picture([("loss <1>", lines), ("loss <2>", lines)]))
    words = [text for one in root.iter("{http://www.w3.org/2000/svg}text") if (text := one.text)]
    assert [word for word in words if word.startswith("loss")] == ["loss <1>", "loss <2>"]
    assert words[-2:] == ["a & b", "c"]
    drawn = [one for one in root.iter("{http://www.w3.org/2000/svg}path") if one.get("class") == "line"]
    assert len(drawn) == 2 * len(lines) + len(lines)  # and a stroke before each name


def test_running_mean_keeps_constants_and_lines_and_tames_noise() -> None:
    assert running_mean([3.0] * 100) == pytest.approx([3.0] * 100)
    line = [float(i) for i in range(600)]
    assert running_mean(line)[10:-10] == pytest.approx(line[10:-10])
    noise = [(-1.0) ** i for i in range(600)]
    assert max(map(abs, running_mean(noise)[10:-10])) < 0.1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1234, "1.23k"), (0.003, "3e-3"), (2.5e-4, "2.5e-4"), (3e9, "3G"), (-2000, "-2k")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_the_wall_time_of_the_newest_checkpoint_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", CONFIG, 4)
    state = TrainState(
        4, DataPosition("plan", 4), images=1, tokens=1, chrono=Chrono(step_s=75.0, lost_s=5.0, restart_s=20.0)
    )
    checkpoint = run / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state_to_json(state)))
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 2, "step": 4, "files": {}}))
    write_report(tmp_path / "report.html", [run], {}, {})
    page = (tmp_path / "report.html").read_text()
    assert "goodput 75.0%" in page and "5.0 s (5.0%)" in page and "20.0 s (20.0%)" in page


def test_chinese_captions_bring_their_glyphs(tmp_path: Path) -> None:
    """The page holds a font of exactly its East Asian characters; without any it holds none."""
    run = make_run(tmp_path / "run", CONFIG, 3)
    caption = "\u4e00\u5f20\u56fe: \u8d64\u3044 \uadf8\ub9bc"
    page = report_page([run], {}, {caption: PNG})
    (data,) = re.findall(r"url\(\"data:font/woff;base64,([^\"]+)\"\)", page)
    with TTFont(io.BytesIO(base64.b64decode(data))) as font:
        assert {chr(code) for code in font.getBestCmap()} == set(caption) - set(": ")
        assert "Open Font License" in font["name"].getDebugName(13)
    assert len(data) < 20_000 and FAMILY in HEAD
    assert "@font-face" not in report_page([run], {}, {"a picture": PNG})


def test_norms_of_parts_that_a_stage_has_not_are_left_out(tmp_path: Path) -> None:
    with Meter(tmp_path, CONFIG, writer=True, start_step=0) as meter:
        meter.record(1, {"loss": 1.0, "grad_norm": 2.0, "grad_norm_text": 0.0, "images": 8.0, "seconds": 1.0})
    (tmp_path / "config.json").write_text(json.dumps(to_json(CONFIG)))
    page = report_page([tmp_path], {}, {})
    assert "grad_norm" in page and "grad_norm_text" not in page

"""Flags of the trainer: every field has one, values are typed, mistakes are explained."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvit.config import RunConfig, TeacherConfig, TeachersConfig, to_json
from cogvit.config.flags import load_preset, parse, preset_names, settable
from cogvit.config.help import ALL, first_page, section_text, sections
from cogvit.config.synonyms import SYNONYMS
from cogvit.errors import ConfigError
from cogvit.stages import read_run

PRESET = RunConfig(teachers=TeachersConfig(members=(TeacherConfig("siglip2"), TeacherConfig("dinov3", weight=0.5))))


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    """Flatten the JSON form of a configuration to dotted paths, lists whole."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


DEFAULTS = leaves(to_json(RunConfig()))


def spell(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def test_no_flags_change_nothing() -> None:
    assert parse(PRESET, []) == PRESET


@given(st.lists(st.sampled_from(sorted(DEFAULTS))), st.booleans())
def test_writing_out_defaults_changes_nothing(paths: list[str], equals: bool) -> None:
    argv: list[str] = []
    for path in paths:
        flag, text = "--" + path.replace("_", "-"), spell(DEFAULTS[path])
        argv += [f"{flag}={text}"] if equals else [flag, text]
    assert parse(RunConfig(), argv) == RunConfig()


@pytest.mark.parametrize(
    ("argv", "path", "expected"),
    [
        (["--data.global-batch-images", "64"], "data.global_batch_images", 64),
        (["--data.global-batch-images=64"], "data.global_batch_images", 64),
        (["--data.global_batch_images", "64"], "data.global_batch_images", 64),
        (["--optim.lr", "3e-4"], "optim.lr", 3e-4),
        (["--init-bias", "-3"], "init_bias", -3.0),
        (["--parallel.sequence"], "parallel.sequence", True),
        (["--parallel.sequence", "--parallel.tp", "2"], "parallel.sequence", True),
        (["--parallel.sequence", "false"], "parallel.sequence", False),
        (["--parallel.sequence=true"], "parallel.sequence", True),
        (["--optim.name", "sgd"], "optim.name", "sgd"),
        (["--vision.layer-scale-init", "1e-5"], "vision.layer_scale_init", 1e-5),
        (["--vision.layer-scale-init", "none"], "vision.layer_scale_init", None),
        (["--data.mixture", '[["web", 1], ["charts", 2.5]]'], "data.mixture", [["web", 1.0], ["charts", 2.5]]),
        (["--data.shards", "s3://b/{00..09}.tar"], "data.shards", "s3://b/{00..09}.tar"),
        (["--out="], "out", ""),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_one_flag_sets_one_field(argv: list[str], path: str, expected: object) -> None:
    changed = leaves(to_json(parse(PRESET, argv)))
    assert changed[path] == expected
    assert type(changed[path]) is type(expected)


def test_sizes_that_only_fit_together_may_come_in_any_order() -> None:
    config = parse(RunConfig(), ["--vision.num-heads", "6", "--vision.embed-dim", "48"])
    assert (config.vision.num_heads, config.vision.embed_dim) == (6, 48)


def test_members_are_addressed_by_name() -> None:
    config = parse(PRESET, ["--teachers.members.dinov3.path", "weights/d", "--teachers.members.siglip2.weight=2"])
    assert config.teachers.members == (
        TeacherConfig("siglip2", weight=2.0),
        TeacherConfig("dinov3", "weights/d", weight=0.5),
    )


def test_members_given_as_json_have_flags_too() -> None:
    argv = ["--teachers.members", '[{"name": "my_own"}]', "--teachers.members.my_own.path", "here"]
    assert parse(PRESET, argv).teachers.members == (TeacherConfig("my_own", "here"),)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "1"], r"unknown flag --lr; here it is --optim\.lr, and"),
        (["--zro.stage", "1"], r"did you mean --zero\.stage\?"),
        (["--data.batch-images", "1"], r"did you mean --data\.global-batch-images\?"),
        (["--teachers.members.dino.path", "x"], r"did you mean --teachers\.members\.dinov3\.path\?"),
        (["--xyzzy"], r"unknown flag --xyzzy; --help lists all"),
        (["steps", "3"], "unexpected argument 'steps'"),
        (["--schedule.steps"], r"--schedule\.steps needs a value: a whole number"),
        (["--schedule.steps", "--seed", "1"], r"--schedule\.steps needs a value"),
        (["--schedule.steps", "1.5"], r"--schedule\.steps 1\.5: must be a whole number"),
        (["--optim.lr", "fast"], r"--optim\.lr fast: must be a number"),
        (["--vision.layer-scale-init", "x"], r"must be a number or none"),
        (["--parallel.sequence=maybe"], r"must be true or false"),
        (["--optim.name", "lion"], r"--optim\.name lion: must be one of muon, adamw, sgd"),
        (["--data.mixture", "web"], r"--data\.mixture web: must be a JSON list, such as '\[\[\"NAME\", 1\.0\]\]'"),
        (["--rl.without-images", "web"], r"web: must be a JSON list, such as '\[\"NAME\"\]'"),
        (["--data.mixture", '[["web"]]'], r"data\.mixture\[0\]"),
        (["--teachers.members", '[{"nme": "x"}]'], r"unknown configuration field teachers\.members\[0\]\.nme"),
        (["--vision.num-heads", "7"], "num_heads=7 does not divide embed_dim=1024"),
    ],
)
def test_mistakes_are_explained_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        parse(PRESET, argv)
    assert "\n" not in str(failure.value)


def test_help_has_every_flag_with_default_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = section_text(ALL)
    for path in DEFAULTS:
        assert f"  --{path.replace('_', '-')} " in text
    assert "  --schedule.steps N\n      optimizer steps of the run [1000]" in text
    assert "  --optim.name muon|adamw|sgd" in text
    assert "--teachers.members.dinov3.path TEXT" in section_text("teachers", PRESET)
    assert max(map(len, text.splitlines())) <= 80
    assert text == "\n\n".join(section_text(name) for name in sections())
    with pytest.raises(ConfigError, match=r"no section 'dta' of flags; --help takes one of run, vision"):
        section_text("dta")


def test_the_first_page_fits_a_screen_and_names_the_sections() -> None:
    page = first_page()
    assert len(page.splitlines()) < 40 and "--data.shards" in page and "teachers (" in page


def test_words_of_other_programs_lead_to_a_flag_that_exists() -> None:
    known = {slot.flag for slot in settable(PRESET)} | {"--size", "--dry-run"}
    for word, meant in SYNONYMS.items():
        assert word not in known
        assert all(flag in known for flag in re.findall(r"--[\w.-]+", meant)), word
    with pytest.raises(ConfigError, match=r"unknown flag --batch-size; here it is --data\.global-batch-images, of all"):
        parse(PRESET, ["--batch-size", "32"])


def test_sizes_change_the_towers_alone() -> None:
    tiny = read_run("stage2_small", ["--size", "tiny", "--optim.lr", "0.1"])
    small = load_preset("stage2_small")
    assert (tiny.vision.embed_dim, tiny.vision.num_heads, tiny.text.embed_dim, tiny.optim.lr) == (192, 3, 192, 0.1)
    assert dataclasses.replace(tiny, vision=small.vision, text=small.text, optim=small.optim) == small
    assert (tiny.vision.norm, tiny.text.depth) == (small.vision.norm, small.text.depth)
    with pytest.raises(ConfigError, match="--size huge is unknown; sizes are tiny, small, base, large, so400m"):
        read_run("stage2_small", ["--size", "huge"])


def test_the_demo_does_not_leak_into_own_data() -> None:
    demo, own = read_run("demo_stage2", []), read_run("demo_stage2", ["--data.shards", "mine"])
    assert demo.data.eval_shards.startswith("runs/demo/") and demo.data.held_out == 0.0
    assert own.data.eval_shards == "" and own.data.held_out == 0.01
    assert read_run("demo_stage2", ["--data.shards=x", "--data.eval-shards=y"]).data.eval_shards == "y"
    assert read_run("stage2_small", ["--data.shards", "x", "--data.order", "sequential"]).data.held_out == 0.0
    with pytest.raises(ConfigError, match=r"siglip2\.path is still the demo's untrained teacher runs/demo/teachers"):
        read_run("demo_stage1", ["--data.shards", "mine"])
    named = ["--teachers.members.siglip2.path", "runs/demo/teachers/siglip2", "--teachers.members.dinov3.path", "b"]
    assert read_run("demo_stage1", ["--data.shards", "mine", *named]).teachers.members[1].path == "b"


def test_preset_from_a_python_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from cogvit.config import RunConfig\n\n\ndef config() -> RunConfig:\n    return RunConfig(seed=7)\n"
    )
    assert load_preset(str(path)) == RunConfig(seed=7)


def test_preset_from_the_config_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(dataclasses.replace(PRESET, seed=3))))
    assert load_preset(str(path)) == dataclasses.replace(PRESET, seed=3)


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.py", "preset file missing.py does not exist"), ("missing/config.json", "is missing a run directory?")],
)
def test_missing_preset_files_are_told(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_preset(source)


def test_preset_file_without_a_config_function_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"has no function config\(\)"):
        load_preset(str(tmp_path / "empty.py"))


def test_missing_preset_is_told_with_those_that_exist() -> None:
    assert "models" not in preset_names()
    with pytest.raises(
        ConfigError, match=r"no preset 'demo_stage'; did you mean demo_stage[12]\?; presets: cogagent_18b"
    ):
        load_preset("demo_stage")


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_load(name: str) -> None:
    assert isinstance(load_preset(name), RunConfig)


@pytest.mark.parametrize(
    ("preset", "words", "owner"),
    [
        ("demo_stage2", ["--teachers.source", "store"], "Stage 1"),
        ("demo_stage2", ["--teachers.members.siglip2.path=x"], "Stage 1"),
        ("demo_stage1", ["--contrast.loss", "ring"], "Stage 2"),
        ("demo_stage1", ["--text.depth", "2"], "Stage 2"),
        ("demo_stage1", ["--proj-dim=64"], "Stage 2"),
        ("demo_stage1", ["--optim.temperature.lr_mult", "2"], "Stage 2"),
    ],
)
def test_a_flag_of_another_stage_is_refused_by_name(preset: str, words: list[str], owner: str) -> None:
    flag = words[0].partition("=")[0]
    with pytest.raises(ConfigError, match=f"{re.escape(flag)} is of {owner}: .* alone, and {preset} is Stage"):
        read_run(preset, words)


def test_flags_of_the_own_stage_and_of_all_stages_are_taken() -> None:
    assert (
        read_run("demo_stage2", ["--contrast.loss", "gather", "--teachers.ray-address", "h:1"]).contrast.loss
        == "gather"
    )
    assert read_run("demo_stage1", ["--teachers.mask-ratio", "0.5", "--seed=3"]).teachers.mask_ratio == 0.5

"""The configuration tree: strict JSON both ways, and a clear refusal for what cannot run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvit.config import RunConfig, TeacherConfig, TeachersConfig, from_json, load_config, to_json
from cogvit.config.flags import parse
from cogvit.errors import ConfigError
from cogvit.stages import check_run, recipe_differences

DISTILL = RunConfig(teachers=TeachersConfig(members=(TeacherConfig("siglip2"), TeacherConfig("dinov3"))))
CONTRAST = RunConfig(objective="contrast")


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(),
    st.text(),
    st.lists(st.tuples(st.text(), st.floats(0, 1)), max_size=3),
    st.none() | st.floats(0, 1),
)
def test_json_round_trip_is_exact(
    lr: float, seed: int, shards: str, mixture: list[tuple[str, float]], layer_scale: float | None
) -> None:
    config = replace(
        DISTILL,
        seed=seed,
        optim=replace(DISTILL.optim, lr=lr),
        data=replace(DISTILL.data, shards=shards, mixture=tuple(mixture)),
        vision=replace(DISTILL.vision, layer_scale_init=layer_scale),
    )
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_missing_fields_take_their_defaults() -> None:
    assert from_json(RunConfig, {}) == RunConfig()
    assert from_json(RunConfig, {"parallel": {"tp": 2}}).parallel.pp == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "unknown configuration field sed"),
        ({"optim": {"learning_rate": 1}}, r"unknown configuration field optim\.learning_rate"),
        ({"teachers": {"members": [{"nam": "x"}]}}, r"unknown configuration field teachers\.members\[0\]\.nam"),
        ({"seed": "1"}, "seed='1' is not of type int"),
        ({"seed": True}, "seed=True is not of type int"),
        ({"seed": 1.0}, r"seed=1\.0 is not of type int"),
        ({"seed": None}, "seed=None is not of type int"),
        ({"parallel": {"sequence": 1}}, r"parallel\.sequence=1 is not of type bool"),
        ({"optim": {"lr": "1e-3"}}, r"optim\.lr='1e-3' is not of type float"),
        ({"optim": {"name": "lion"}}, r"optim\.name='lion' must be one of muon, adamw, sgd"),
        ({"data": {"mixture": [["web"]]}}, r"data\.mixture\[0\]=\['web'\] is not of type \[str, float\]"),
        ({"data": {"mixture": {"web": 1}}}, r"data\.mixture={'web': 1} is not of type list of \[str, float\]"),
        ({"data": []}, r"data\. must be an object, not \[\]"),
        ({"vision": {"patch_size": 15}}, "vision: patch_size=15 does not divide image_size=224"),
    ],
)
def test_json_is_read_strictly(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(RunConfig, values)


def test_whole_numbers_are_accepted_for_floats() -> None:
    lr = from_json(RunConfig, {"optim": {"lr": 1}}).optim.lr
    assert lr == 1.0 and type(lr) is float


def test_config_file_that_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; is .* a run directory\?"):
        load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("config", "argv", "world_size"),
    [
        (DISTILL, [], 1),
        (DISTILL, ["--parallel.tp", "2", "--parallel.pp=2", "--parallel.sequence"], 8),
        (DISTILL, ["--zero.stage", "2", "--teachers.source", "store", "--teachers.store", "features"], 3),
        (CONTRAST, ["--parallel.tp", "4", "--parallel.pp=4"], 16),
    ],
)
def test_what_can_run_is_accepted(config: RunConfig, argv: list[str], world_size: int) -> None:
    check_run(parse(config, argv), world_size)


@pytest.mark.parametrize(
    ("config", "argv", "world_size", "message"),
    [
        (DISTILL, ["--parallel.tp", "0"], 1, r"--parallel\.tp 0 .* must be at least 1"),
        (DISTILL, ["--parallel.pp=-1"], 1, r"--parallel\.pp -1 must be at least 1"),
        (DISTILL, ["--parallel.tp=2", "--parallel.pp=2"], 6, "6 processes .* tp=2 x pp=2; start a multiple of 4"),
        (DISTILL, ["--parallel.tp", "3"], 3, r"--parallel\.tp 3 does not divide vision\.num_heads=16"),
        (CONTRAST, ["--parallel.tp", "16"], 16, r"--parallel\.tp 16 does not divide text\.num_heads=8"),
        (
            DISTILL,
            ["--parallel.tp=2", "--vision.embed-dim=128", "--vision.mlp-ratio=1.0078125"],
            2,
            r"--parallel\.tp 2 does not divide the vision MLP width 129",
        ),
        (DISTILL, ["--parallel.pp", "5"], 5, r"--parallel\.pp 5 does not divide vision\.depth=24"),
        (CONTRAST, ["--parallel.pp", "8"], 8, r"--parallel\.pp 8 does not divide text\.depth=12"),
        (DISTILL, ["--data.mixture", '[["web", -1.0]]'], 1, "data.mixture gives 'web' the weight -1.0; weights are"),
        (DISTILL, ["--data.prefetch-steps=-1"], 1, "data.prefetch_steps=-1 must not be negative"),
        (DISTILL, ["--teachers.max-wait-s=-1"], 1, "teachers.max_wait_s=-1.0 must be positive"),
        (CONTRAST, ["--data.max-wait-s=0"], 1, "data.max_wait_s=0.0 must be positive"),
        (
            CONTRAST,
            ["--data.loading=server", "--parallel.step-timeout-s=200"],
            1,
            r"step_timeout_s=200\.0 must be above data\.max_wait_s=300",
        ),
        (DISTILL, ["--zero.stage", "0"], 1, r"--zero\.stage 0 is refused.*use 1 or 2"),
        (DISTILL, ["--zero.stage", "3"], 1, r"--zero\.stage 3 is refused.*use 1 or 2"),
        (DISTILL, ["--parallel.sequence"], 1, r"--parallel\.sequence needs --parallel\.tp of 2 or more"),
        (
            DISTILL,
            ["--parallel.sequence", "--parallel.tp=2", "--data.tokens-per-pack=1023"],
            2,
            "sequence parallelism splits data.tokens_per_pack: 1087 tokens over tp=2 do not divide",
        ),
        (
            CONTRAST,
            ["--parallel.sequence", "--parallel.tp=2", "--data.text-tokens-per-pack=1023"],
            2,
            "sequence parallelism splits data.text_tokens_per_pack: 1023 tokens over tp=2 do not divide",
        ),
        (DISTILL, ["--data.global-batch-images=0"], 1, r"data\.global_batch_images=0 must be at least 1"),
        (DISTILL, ["--data.canonical-shares=0"], 1, r"data\.canonical_shares=0 must be at least 1"),
        (DISTILL, ["--data.tokens-per-pack=255"], 1, r"256 patches does not fit data\.tokens_per_pack=255"),
        (
            DISTILL,
            ["--data.sizing=square", "--data.tokens-per-pack=255", "--data.max-patches=1"],
            1,
            "image of 256 patches does not fit",
        ),
        (CONTRAST, ["--data.text-tokens-per-pack=63"], 1, r"text\.max_tokens=64 does not fit .*=63"),
        (CONTRAST, ["--contrast.chunk-pairs=0"], 1, r"contrast\.chunk_pairs=0 must be at least 1"),
        (CONTRAST, ["--init-log-t", "7"], 1, r"--init-log-t 7\.0 is above 6\.908, .*max_temperature=1000\.0; lower"),
        (CONTRAST, ["--contrast.max-temperature=inf"], 1, r"contrast\.max_temperature=inf must be positive and finite"),
        (
            CONTRAST,
            ["--data.batch-schedule=[[8,64],[8,32]]"],
            1,
            r"data\.batch_schedule has the steps \[8, 8\]; they .* rise",
        ),
        (CONTRAST, ["--data.batch-schedule=[[0,0]]"], 1, r"data\.batch_schedule has 0 images from step 0; at least 1"),
        (
            CONTRAST,
            ["--data.budget-schedule=[[0,[64]],[5,[512]]]"],
            1,
            r"budget_schedule has 512; .*max_patches=256",
        ),
        (CONTRAST, ["--data.budget-schedule=[[0,[]]]"], 1, r"budget_schedule has a step without budgets"),
        (CONTRAST, ["--data.sizing=square", "--data.budget-schedule=[[0,[64]]]"], 1, r"are of --data\.sizing naflex"),
        (DISTILL, ["--text-encoder.path=x"], 1, r"--text-encoder\.path x is of stage 2"),
        (
            CONTRAST,
            ["--text-encoder.path=x", "--memory.text.recompute=full"],
            1,
            r"memory\.text is of our own text tower",
        ),
        (CONTRAST, ["--data.budgets-patches=[64,512]"], 1, r"budgets_patches has 512; .* to data\.max_patches=256"),
        (CONTRAST, ["--data.budgets-patches=[64]", "--data.sizing=square"], 1, "squares have one size"),
        *(
            (
                DISTILL,
                [f"--data.budget{flag}", f"--teachers.source={source}", "--teachers.store=x"],
                1,
                rf"source {source} holds features of one size of each image",
            )
            for source in ("store", "store_then_online")
            for flag in ("s-patches=[64]", "-schedule=[[0,[64]]]")
        ),
        *(
            (DISTILL, [f"--data.{flag}", f"--teachers.source={source}", "--teachers.store=x"], 1, message)
            for source in ("store", "store_then_online")
            for flag, message in (
                ("flip", rf"{source} holds .* as they are, .* pass --data\.flip false or --teachers\.source online"),
                ("crop=0.5", r"--data\.crop shows the student others; pass --data\.crop 1\.0"),
                ("color=0.1", r"--data\.color shows the student others; pass --data\.color 0\.0"),
            )
        ),
        (
            DISTILL,
            ["--data.order=sequential", "--teachers.source=store", "--teachers.store=x"],
            1,
            r"finds features by the index, and --data\.order sequential has none",
        ),
        (
            CONTRAST,
            ["--data.order=sequential", "--data.global-batch-images=3"],
            4,
            r"4 data-parallel ranks are more than the 3 images of a step .*start at most 3 processes, or raise it to 4",
        ),
        (
            CONTRAST,
            ["--data.batch-schedule=[[5, 2]]", "--parallel.tp=2"],
            6,
            r"3 .* more than the 2 images of a step \(data.batch_schedule from step 5\).*most 4 processes.* 3$",
        ),
        (CONTRAST, ["--data.shards=pipe:x"], 1, r"prints whole shards.*; pass --data\.cache-dir DIR"),
        (CONTRAST, ["--data.cache-bytes=0"], 1, r"data\.cache_bytes=0 must be at least 1"),
        (DISTILL, ["--data.crop=0"], 1, r"--data\.crop 0\.0 must be in \(0, 1\]"),
        (DISTILL, ["--data.color=1"], 1, r"--data\.color 1\.0 must be in \[0, 1\)"),
        (DISTILL, ["--data.zh-fraction=1.5"], 1, r"data\.zh_fraction=1\.5 must be in \[0, 1\]"),
        (DISTILL, ["--data.max-bad-fraction=1"], 1, r"data\.max_bad_fraction=1\.0 must be in \[0, 1\)"),
        (DISTILL, ["--optim.lr=-1"], 1, r"optim\.lr=-1\.0 must be finite and not negative"),
        (DISTILL, ["--optim.lr=inf"], 1, r"optim\.lr=inf must be finite"),
        (DISTILL, ["--optim.eps=0"], 1, r"optim\.eps=0\.0 must be in \(0, 1\)"),
        (DISTILL, ["--optim.text.lr-mult=-1"], 1, r"optim\.text\.lr_mult=-1\.0 must be finite"),
        (DISTILL, ["--eval.steps=0"], 1, r"eval\.steps=0 must be at least 1"),
        (DISTILL, ["--checkpoint.keep-last=0"], 1, r"keep_last=0 must be at least 1"),
        (DISTILL, ["--vision.qkv-bias=false"], 1, "are for the plain model"),
        (DISTILL, ["--parallel.step-timeout-s=-5"], 1, r"step_timeout_s=-5\.0 must be finite and not negative"),
        (DISTILL, ["--parallel.step-timeout-s=200"], 1, r"must be above teachers\.max_wait_s"),
        (
            DISTILL,
            ["--memory.vision.recompute=full", "--memory.vision.recompute-blocks=5"],
            1,
            r"recompute_blocks=5 must divide the \d+ blocks of a stage",
        ),
        (DISTILL, ["--optim.lr=nan"], 1, r"optim\.lr=nan must be finite and not negative"),
        (DISTILL, ["--optim.beta2=1"], 1, r"optim\.beta2=1\.0 must be in \[0, 1\)"),
        (DISTILL, ["--schedule.steps=0"], 1, r"--schedule\.steps 0 must be at least 1"),
        (DISTILL, ["--schedule.warmup-steps=-1"], 1, r"schedule\.warmup_steps=-1 must not be negative"),
        (DISTILL, ["--log.every-steps=0"], 1, r"--log\.every-steps 0 must be at least 1"),
        (RunConfig(), [], 1, r"stage 1 needs teachers\.members"),
        (DISTILL, ["--teachers.members.dinov3.name=siglip2"], 1, "teacher names must be set and differ"),
        (DISTILL, ["--teachers.members.dinov3.name="], 1, "teacher names must be set and differ"),
        (DISTILL, ["--teachers.members.dinov3.name=x_summary"], 1, "names that end in _summary are of summaries"),
        (DISTILL, ["--teachers.members.dinov3.weight=0"], 1, "'dinov3' has no loss: weight and summary_weight are"),
        (DISTILL, ["--teachers.members.dinov3.weight=-1"], 1, "weight=-1.0 of teacher 'dinov3' must be finite"),
        (DISTILL, ["--teachers.members.dinov3.layer=3"], 1, "layer=3 of teacher 'dinov3' counts from the end"),
        (DISTILL, ["--teachers.max-in-flight-bytes=0"], 1, r"teachers\.max_in_flight_bytes=0 must be at least 1"),
        (DISTILL, ["--teachers.mask-ratio=0"], 1, r"teachers\.mask_ratio=0\.0 must be in \(0, 1\)"),
        (DISTILL, ["--teachers.actors-per-teacher=0"], 1, r"teachers\.actors_per_teacher=0 must be at least 1"),
        (DISTILL, ["--teachers.actor-cpus=0"], 1, r"teachers\.actor_cpus=0\.0 must be a share of one above 0"),
        (DISTILL, ["--teachers.actor-gpus=1.5"], 1, r"teachers\.actor_gpus=1\.5 must be a share of one, or a whole"),
        (DISTILL, ["--teachers.in-flight-steps=0"], 1, r"teachers\.in_flight_steps=0 must be at least 1"),
        (DISTILL, ["--checkpoint.every-steps=-1"], 1, r"checkpoint\.every_steps=-1 must not be negative"),
        (DISTILL, ["--eval.every-steps=-1"], 1, r"eval\.every_steps=-1 must not be negative"),
        (DISTILL, ["--vision.layer-scale-init=nan"], 1, r"layer_scale_init=nan must be finite"),
        (CONTRAST, ["--text.drop-path-rate=1"], 1, r"text: drop_path_rate=1\.0 must be in \[0, 1\)"),
        (CONTRAST, ["--text.eps=-1"], 1, r"text: eps=-1\.0 .* must be positive"),
        (CONTRAST, ["--text.mlp-ratio=nan"], 1, r"text: .*mlp_ratio=nan must be positive"),
        (CONTRAST, ["--proj-dim=0"], 1, r"--proj-dim 0 must be at least 1"),
        (CONTRAST, ["--init-log-t=nan"], 1, r"--init-log-t nan must be finite"),
        (DISTILL, ["--teachers.source=store"], 1, r"--teachers\.source store needs --teachers\.store DIR"),
    ],
)
def test_what_cannot_run_is_refused(config: RunConfig, argv: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        check_run(parse(config, argv), world_size)
    assert "\n" not in str(failure.value)


def test_text_tower_is_not_checked_in_stage_1() -> None:
    check_run(parse(DISTILL, ["--parallel.tp", "16", "--data.text-tokens-per-pack=32"]), 16)


def test_layout_may_change_on_resume_and_the_recipe_may_not() -> None:
    other_layout = parse(DISTILL, ["--parallel.tp=2", "--zero.stage=2", "--log.every-steps=10", "--out=elsewhere"])
    assert recipe_differences(DISTILL, other_layout) == []
    other_recipe = parse(DISTILL, ["--seed=1", "--teachers.members.dinov3.weight=2", "--optim.lr=0.5"])
    differences = recipe_differences(DISTILL, other_recipe)
    assert [one.field for one in differences] == ["optim.lr", "seed", "teachers.members.dinov3.weight"]
    assert "0.001 -> 0.5" in str(differences[0])

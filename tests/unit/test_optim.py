"""Groups, schedule and update rules, in one process without DeepSpeed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from cogvit.config import ModuleConfig, OptimConfig, ScheduleConfig
from cogvit.training.muon import InnerOptimizer
from cogvit.training.optim import ParamGroup, lr_at, param_groups, role_of
from cogvit.training.orthogonal import QkvHeads, newton_schulz, parts_of_qkv, qkv_of_parts, rms_matched_scale


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_of(param: Parameter, kind: str, weight_decay: float = 0.0) -> ParamGroup:
    schedule = ScheduleConfig(steps=8, warmup_steps=4, kind="constant")
    return ParamGroup("vision", kind, 0.02, 0.5, weight_decay, schedule, (param,))


def run_steps(optimizer: torch.optim.Optimizer, param: Parameter, steps: int) -> torch.Tensor:
    for step in range(steps):
        param.grad = rand(*param.shape, seed=step + 1)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("shape", [(64, 64), (96, 24), (16, 80)])
def test_newton_schulz_keeps_singular_vectors_and_moves_values_to_one(shape: tuple[int, int]) -> None:
    u, _, vh = torch.linalg.svd(rand(*shape), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.05, 3.0, min(shape))) @ vh
    in_own_basis = u.mT @ newton_schulz(matrix) @ vh.mT
    values = in_own_basis.diagonal()
    assert (in_own_basis - torch.diag(values)).abs().max() < 1e-4
    assert values.min() > 0.65 and values.max() < 1.25


def test_newton_schulz_follows_row_order() -> None:
    matrix, order = rand(48, 16), torch.randperm(48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(newton_schulz(matrix[order]), newton_schulz(matrix)[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["split", "heads", "fused"])
def test_qkv_parts_are_what_they_say(kind: str) -> None:
    heads, dim = 2, 4
    plain = rand(3, heads, dim, 5)  # the plain model's order
    megatron = plain.transpose(0, 1).reshape(-1, 5)
    parts = parts_of_qkv(megatron, QkvHeads(heads, heads), kind)
    torch.testing.assert_close(qkv_of_parts(parts, QkvHeads(heads, heads), kind), megatron, atol=0, rtol=0)
    expected = {
        "split": plain.reshape(3, heads * dim, 5),
        "heads": plain.transpose(0, 1).reshape(3 * heads, dim, 5),
        "fused": megatron.unsqueeze(0),
    }[kind]
    torch.testing.assert_close(parts, [expected], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["split", "heads", "fused"])
def test_parts_of_grouped_qkv_are_what_they_say(kind: str) -> None:
    heads, dim = QkvHeads(6, 2), 4
    query, key, value = rand(2, 3, dim, 5), rand(2, dim, 5, seed=1), rand(2, dim, 5, seed=2)
    megatron = torch.cat([query, key.unsqueeze(1), value.unsqueeze(1)], dim=1)
    parts = parts_of_qkv(megatron.reshape(-1, 5), heads, kind)
    torch.testing.assert_close(qkv_of_parts(parts, heads, kind), megatron.reshape(-1, 5), atol=0, rtol=0)
    expected = {
        "split": [query.reshape(1, -1, 5), torch.stack([key.reshape(-1, 5), value.reshape(-1, 5)])],
        "heads": [megatron.reshape(10, dim, 5)],
        "fused": [megatron.reshape(1, -1, 5)],
    }[kind]
    torch.testing.assert_close(parts, expected, atol=0, rtol=0)


def test_a_batch_of_matrices_is_orthogonalized_one_by_one() -> None:
    batch = rand(3, 8, 6)
    torch.testing.assert_close(newton_schulz(batch), torch.stack([newton_schulz(one) for one in batch]))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e-10, 1e-5, 1e5, 1e20, 1e37])
def test_newton_schulz_is_free_of_scale(scale: float) -> None:
    """Over all of fp32, subnormal numbers but for their lost digits."""
    matrix = rand(12, 20)
    expected, actual = newton_schulz(matrix), newton_schulz(matrix * scale)
    assert (actual - expected).norm() < (0.5 if scale < 1e-40 else 1e-2) * expected.norm()


def test_newton_schulz_of_zeros_is_zeros() -> None:
    assert not newton_schulz(torch.zeros(4, 3)).any()


@pytest.mark.parametrize("shape", [(128, 32), (32, 128), (64, 64)])
def test_scale_gives_the_rms_of_adamw(shape: tuple[int, int]) -> None:
    update = newton_schulz(rand(*shape)) * rms_matched_scale(*shape)
    assert 0.12 < update.square().mean().sqrt() < 0.25


def test_adamw_kind_equals_torch() -> None:
    ours, theirs = Parameter(rand(7, 5)), Parameter(rand(7, 5))
    config = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-6)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    ours_after = run_steps(InnerOptimizer([group_of(ours, "adamw", 0.3)], config), ours, 5)
    torch.testing.assert_close(ours_after, run_steps(reference, theirs, 5), atol=1e-7, rtol=1e-6)


def test_sgd_kind_equals_torch() -> None:
    ours, theirs = Parameter(rand(7, 5)), Parameter(rand(7, 5))
    reference = torch.optim.SGD([theirs], lr=0.01, momentum=0.8)
    ours_after = run_steps(InnerOptimizer([group_of(ours, "sgd")], OptimConfig(momentum=0.8)), ours, 5)
    torch.testing.assert_close(ours_after, run_steps(reference, theirs, 5), atol=1e-7, rtol=1e-6)


def test_muon_kind_is_nesterov_then_newton_schulz() -> None:
    param = Parameter(rand(6, 4))
    optimizer = InnerOptimizer([group_of(param, "muon", 0.5)], OptimConfig(momentum=0.9))
    expected, momentum = param.detach().clone(), torch.zeros(6, 4)
    for step in range(3):
        grad = rand(6, 4, seed=step + 1)
        momentum = 0.9 * momentum + 0.1 * grad
        direction = newton_schulz(0.1 * grad + 0.9 * momentum) * 0.2 * math.sqrt(6)
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * direction
    torch.testing.assert_close(run_steps(optimizer, param, 3), expected, atol=1e-6, rtol=1e-5)
    assert optimizer.newton_schulz_calls == 3


def test_a_locked_module_costs_no_newton_schulz() -> None:
    param = Parameter(rand(6, 4))
    optimizer = InnerOptimizer([replace(group_of(param, "muon", 0.5), lr_mult=0.0)], OptimConfig())
    assert torch.equal(run_steps(optimizer, param, 2), rand(6, 4))
    assert optimizer.newton_schulz_calls == 0


def test_rates_follow_the_schedule() -> None:
    param = Parameter(torch.zeros(3))
    optimizer = InnerOptimizer([group_of(param, "sgd")], OptimConfig())
    optimizer.set_lr_step(0)
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), -0.02 * 0.5 * 0.25))


def test_deepspeed_will_not_take_the_optimizer_for_its_own() -> None:
    assert "muon" not in InnerOptimizer.__name__.lower()


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("vision.blocks.0.attn.qkv.weight", (24, 8), "block_matrix"),
        ("vision.decoder.layers.3.mlp.linear_fc1.weight", (32, 8), "block_matrix"),
        ("vision.blocks.0.attn.qkv.bias", (24,), "vector"),
        ("vision.blocks.0.ls1.gamma", (8,), "vector"),
        ("vision.blocks.0.attn.q_norm.weight", (4,), "vector"),
        ("vision.patch_embed.proj.weight", (8, 3, 4, 4), "matrix"),
        ("vision.pos_embed.embed", (1, 8, 4, 4), "vector"),
        ("vision.cls_token", (1, 1, 8), "vector"),
        ("vision.mask_token", (1, 1, 8), "vector"),
        ("text.token_embed.weight", (100, 8), "vector"),
        ("text.pos_embed.weight", (64, 8), "vector"),
        ("text.encoder.embeddings.word_embeddings.weight", (100, 8), "vector"),
        ("text.encoder.text_model.embeddings.position_embedding.weight", (64, 8), "vector"),
        ("heads.siglip.weight", (16, 8), "matrix"),
        ("player.weight", (16, 8), "matrix"),
        ("log_t", (), "vector"),
    ],
)
def test_roles(name: str, shape: tuple[int, ...], role: str) -> None:
    assert role_of(name, Parameter(torch.zeros(shape))) == role


NAMED = [
    ("vision.blocks.0.mlp.fc1.weight", Parameter(torch.zeros(4, 2)), "vision"),
    ("vision.norm.weight", Parameter(torch.zeros(2)), "vision"),
    ("text.token_embed.weight", Parameter(torch.zeros(9, 2)), "text"),
    ("proj.weight", Parameter(torch.zeros(3, 2)), "projection"),
    ("log_t", Parameter(torch.zeros(())), "temperature"),
    ("bias", Parameter(torch.zeros(())), "bias"),
]
SCHEDULE = ScheduleConfig(steps=100, warmup_steps=0, kind="cosine", final_fraction=0.1)


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_groups_are_the_same_list_for_every_stage(name: str) -> None:
    def shape_of(groups: list[ParamGroup]) -> list[ParamGroup]:
        return [replace(group, params=()) for group in groups]

    config = OptimConfig(name=name)
    whole, part, none = (param_groups(named, config, SCHEDULE) for named in (NAMED, NAMED[:2], []))
    assert shape_of(whole) == shape_of(part) == shape_of(none)
    assert [id(p) for g in whole for p in g.params] == [id(p) for _, p, _ in NAMED]


def test_groups_carry_kind_rate_and_decay() -> None:
    config = OptimConfig(
        lr=0.3,
        adamw_lr=0.01,
        weight_decay=0.1,
        vision=ModuleConfig(lr_mult=2.0, weight_decay=0.2),
        text=ModuleConfig(lr_mult=3.0, schedule="linear"),
        temperature=ModuleConfig(lr_mult=5.0),
        bias=ModuleConfig(lr_mult=7.0, final_fraction=0.5),
    )
    groups = [g for g in param_groups(NAMED, config, SCHEDULE) if g.params]
    assert [(g.module, g.kind, round(g.peak_lr, 6), g.weight_decay) for g in groups] == [
        ("vision", "muon", 0.6, 0.2),
        ("vision", "adamw", 0.02, 0.0),
        ("text", "adamw", 0.03, 0.0),
        ("projection", "adamw", 0.01, 0.1),
        ("temperature", "adamw", 0.05, 0.0),
        ("bias", "adamw", 0.07, 0.0),
    ]
    assert [(g.schedule.kind, g.schedule.final_fraction) for g in groups[1:]] == [
        ("cosine", 0.1),
        ("linear", 0.1),
        ("cosine", 0.1),
        ("cosine", 0.1),
        ("cosine", 0.5),
    ]
    assert {g.kind for g in param_groups(NAMED, replace(config, name="sgd"), SCHEDULE)} == {"sgd"}
    assert {g.base_lr for g in param_groups(NAMED, replace(config, name="adamw"), SCHEDULE)} == {0.3}


def test_a_modules_own_schedule_drives_its_rates() -> None:
    config = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, text=ModuleConfig(schedule="linear"))
    named = [(name, Parameter(torch.zeros(1)), module) for name, module in (("vision.a", "vision"), ("text.a", "text"))]
    optimizer = InnerOptimizer(param_groups(named, config, ScheduleConfig(100, 0, "constant")), config)
    for _, param, _ in named:
        param.grad = torch.ones(1)
    optimizer.set_lr_step(75)
    optimizer.step()
    assert [param.item() for _, param, _ in named] == pytest.approx([-1.0, -0.25])


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_schedule_values(kind: str, middle: float) -> None:
    schedule = ScheduleConfig(steps=110, warmup_steps=10, kind=kind, final_fraction=0.1)
    assert [lr_at(schedule, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert lr_at(schedule, 60) == pytest.approx(middle)
    assert lr_at(schedule, 110) == lr_at(schedule, 500) == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_wsd_is_stable_then_falls() -> None:
    schedule = ScheduleConfig(steps=100, warmup_steps=10, kind="wsd", final_fraction=0.1, decay_fraction=0.2)
    factors = [lr_at(schedule, step) for step in (4, 10, 79, 80, 90, 100)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.55, 0.1])


def test_cosine_is_a_cosine() -> None:
    schedule = ScheduleConfig(steps=100, warmup_steps=0, kind="cosine")
    assert lr_at(schedule, 25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


@given(
    steps=st.integers(1, 50),
    warmup_steps=st.integers(0, 60),
    kind=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    final_fraction=st.floats(0.0, 1.0),
)
def test_schedule_rises_then_falls_within_bounds(
    steps: int, warmup_steps: int, kind: str, final_fraction: float
) -> None:
    schedule = ScheduleConfig(steps, warmup_steps, kind, final_fraction)
    factors = [lr_at(schedule, step) for step in range(steps + warmup_steps + 2)]
    assert all(0.0 <= factor <= 1.0 + 1e-12 for factor in factors)
    rising, falling = factors[:warmup_steps], factors[warmup_steps:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)

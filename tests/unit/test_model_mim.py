"""Stage 1 in plain PyTorch: frozen teachers and the masked loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvit.model.mim import CogViTForMIM, TeacherWrapper, draw_mask
from cogvit.model.naflex import naflex_collate
from tests.plain_vit import tiny_vit


class PatchTeacher(nn.Module):
    """A teacher with dropout and a batch norm, whose features change with its mode."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.proj(x))).flatten(2).transpose(1, 2)


def build() -> CogViTForMIM:
    teachers = {"a": TeacherWrapper(PatchTeacher(6, 8), 6), "b": TeacherWrapper(PatchTeacher(5, 16), 5, (2, 2))}
    return CogViTForMIM(tiny_vit().float(), teachers, loss_weights={"b": 0.5})


def test_losses_are_smooth_l1_at_the_masked_patches() -> None:
    mim = build()
    x = torch.randn(3, 3, 32, 32)
    torch.manual_seed(0)
    out = mim(x)
    assert out["mask"].sum(1).tolist() == [6, 6, 6]  # 0.35 * 16
    student = mim.encoder(x, mask=out["mask"])["patch_tokens"][out["mask"]]
    for name, teacher in mim.teachers.items():
        target = teacher(x, target_grid=(4, 4))[out["mask"]]
        torch.testing.assert_close(out[name], F.smooth_l1_loss(mim.heads[name](student), target))
    torch.testing.assert_close(out["total"], out["a"] + 0.5 * out["b"])


def test_other_grids_are_brought_to_the_students() -> None:
    model = PatchTeacher(5, 16).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model(x).transpose(1, 2).unflatten(2, (2, 2))
    expected = F.interpolate(features, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(TeacherWrapper(model, 5, out_grid=(2, 2))(x, (4, 4)), expected)


def test_teachers_have_their_own_preprocessing_and_scale() -> None:
    model = PatchTeacher(5, 8).eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.randn(5), torch.rand(5) + 0.5
    wrapped = TeacherWrapper(model, 5, preprocess=lambda image: (image - 0.3) / 0.2, feature_mean=mean, feature_std=std)
    torch.testing.assert_close(wrapped(x, (4, 4)), (model((x - 0.3) / 0.2) - mean) / std)


class TestTeachersStayFrozen:
    def test_in_eval_mode_without_gradients(self) -> None:
        mim = build()
        mim.train()
        mim.requires_grad_(True)
        for teacher in mim.teachers.values():
            teacher.train()
            assert not any(module.training for module in teacher.modules())
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
        before = {name: copy.deepcopy(teacher.state_dict()) for name, teacher in mim.teachers.items()}
        optimizer = torch.optim.SGD(mim.parameters(), lr=0.1)
        mim(torch.randn(2, 3, 32, 32))["total"].backward()
        optimizer.step()
        for name, teacher in mim.teachers.items():
            for key, value in teacher.state_dict().items():
                assert torch.equal(value, before[name][key]), key

    def test_outside_parameters_and_state_dict(self) -> None:
        mim = build()
        assert {name.split(".")[0] for name in mim.state_dict()} == {"encoder", "heads"}
        frozen = {p for teacher in mim.teachers.values() for p in teacher.parameters()}
        assert not frozen & set(mim.parameters())

    def test_reference_checkpoints_with_teachers_load_strictly(self) -> None:
        mim = build()
        state = build().state_dict()
        stored = {**state, "teachers.a.model.proj.weight": torch.zeros(1)}
        mim.load_state_dict(stored)
        assert torch.equal(mim.heads["a"].weight, state["heads.a.weight"])
        with pytest.raises(RuntimeError, match="surplus"):
            mim.load_state_dict({**state, "surplus": torch.zeros(1)})
        outer = nn.ModuleDict({"mim": mim})
        outer.load_state_dict({f"mim.{name}": value for name, value in stored.items()})

    def test_they_follow_a_move(self) -> None:
        mim = build().double()
        assert all(p.dtype == torch.float64 for teacher in mim.teachers.values() for p in teacher.parameters())
        mim(torch.randn(1, 3, 32, 32, dtype=torch.float64))["total"].backward()


class TestMask:
    def test_counts_are_exact_and_spare_padding(self) -> None:
        valid = torch.ones(2000, 20, dtype=torch.bool)
        valid[1000:, 7:] = False
        mask = draw_mask(valid, 0.35)
        assert mask[:1000].sum(1).tolist() == [7] * 1000
        assert mask[1000:].sum(1).tolist() == [2] * 1000
        assert not (mask & ~valid).any()
        often = mask[:1000].float().mean(0)  # 0.35 +- 0.015
        assert ((often - 0.35).abs() < 0.1).all()

    def test_at_least_one_patch(self) -> None:
        assert CogViTForMIM.random_mask(4, 2, 0.1, torch.device("cpu")).sum(1).tolist() == [1] * 4


def test_rectangles_and_padding() -> None:
    mim = build()
    mim.teachers.pop("b")
    x = torch.randn(2, 3, 16, 48)
    assert mim(x)["mask"].shape == (2, 12)
    valid = torch.ones(2, 2, 6, dtype=torch.bool)
    valid[1, :, 3:] = False
    torch.manual_seed(0)
    out = mim(x, valid_mask=valid.flatten(1))
    assert not (out["mask"] & ~valid.flatten(1)).any()
    for numbers in (valid.flatten(1).int(), valid.flatten(1).float()):
        torch.manual_seed(0)
        assert torch.equal(mim(x, valid_mask=numbers)["total"], out["total"])


def test_bytes_are_images_in_minus_one_to_one() -> None:
    mim, x = build(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    out = mim(x)
    torch.manual_seed(0)
    torch.testing.assert_close(out["total"], mim(x / 127.5 - 1.0)["total"])


def test_bad_input() -> None:
    encoder, teacher = tiny_vit().float(), TeacherWrapper(PatchTeacher(6, 8), 6)
    for arguments, message in (
        (({"a": teacher}, 0.0), "mask_ratio=0.0"),
        (({"a": teacher}, 1.0), "mask_ratio=1.0"),
        (({}, 0.35), "at least one teacher"),
        (({"total": teacher}, 0.35), "'total' is taken"),
        (({"a.b": teacher}, 0.35), "'a.b' has a dot"),
        (({"a": teacher}, 0.35, {"b": 1.0}), "loss_weights names 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            CogViTForMIM(encoder, *arguments)
    with pytest.raises(ValueError, match=r"features of shape \(1, 16, 6\); expected \(1, 4, 6\)"):
        teacher(torch.randn(1, 3, 32, 32), (2, 2))
    with pytest.raises(ValueError, match=r"feature_std has shape \(5,\); expected \(6,\)"):
        TeacherWrapper(PatchTeacher(6, 8), 6, feature_std=torch.ones(5))
    with pytest.raises(ValueError, match=r"16 x 17 px"):
        CogViTForMIM(encoder, {"a": teacher})(torch.randn(1, 3, 16, 17))
    with pytest.raises(ValueError, match=r"valid_mask has shape \(1, 3\); expected \(1, 4\)"):
        CogViTForMIM(encoder, {"a": teacher})(torch.randn(1, 3, 16, 16), torch.ones(1, 3))
    wide_and_tall = naflex_collate([torch.rand(3, 8, 64), torch.rand(3, 64, 8)], 8, max_tokens=8)
    with pytest.raises(ValueError, match="collate those apart"):
        CogViTForMIM(encoder, {"a": teacher})(*wide_and_tall)

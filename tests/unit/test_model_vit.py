"""The vision encoder: a pack equals its images one by one, whatever lies beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cogvit.batch import PackedImages
from cogvit.draws import mix
from cogvit.model.attention import segments_of
from cogvit.model.blocks import depth_scale, drop_rate
from cogvit.model.config import CogViTConfig
from cogvit.model.init import init_tensor
from cogvit.model.packing import pack_images, patchify
from cogvit.model.tokens import PackedFeatures, permute_rows, pool_mean, token_order
from cogvit.model.vit import CogViT, vision_layout
from tests.packs import random_images
from tests.plain_vit import FAMILIES, encode, tiny_config, tiny_vit

GRIDS = [(2, 3), (4, 4), (5, 1), (2, 3), (1, 7)]
family = pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)


def pictures(grids: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 8 * rows, 8 * columns, generator=g, dtype=dtype) for rows, columns in grids]


def pack(images: list[Tensor], tokens: int | None = None, slots: int | None = None) -> PackedImages:
    grids = [(image.shape[1] // 8, image.shape[2] // 8) for image in images]
    patches = [patchify(image, 8) for image in images]
    return pack_images(patches, grids, tokens_per_pack=tokens, images_per_pack=slots)


def features(out: PackedFeatures, images: PackedImages) -> list[Tensor]:
    """Of each image: its patches, and its CLS feature as the last row."""
    bounds = images.cu_seqlens.tolist()
    parts = [out.patch_TD[bounds[n] : bounds[n + 1]] for n in range(images.num_slots)]
    if out.cls_ND is None:
        return parts
    return [torch.cat([part, cls.unsqueeze(0)]) for part, cls in zip(parts, out.cls_ND, strict=True)]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() <= 1e-6, name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Weights, pictures and masks are the same in every run and order of tests."""
    torch.manual_seed(0)


def one_by_one(model: CogViT, images: list[Tensor]) -> list[Tensor]:
    """As `features`, from dense batches of one image."""
    alone = []
    for image in images:
        out = model(image.unsqueeze(0))
        cls = [] if out["cls_token"] is None else [out["cls_token"]]
        alone.append(torch.cat([out["patch_tokens"][0], *cls]))
    return alone


@family
def test_equals_an_independent_encoder_with_gradients(options: dict[str, object]) -> None:
    model = tiny_vit(**options)
    images = pictures(GRIDS)
    masks = [torch.rand(rows * columns) < 0.35 for rows, columns in GRIDS]
    packed = pack(images, tokens=60, slots=7)
    mask_T = torch.cat([*masks, torch.zeros(60 - sum(len(mask) for mask in masks), dtype=torch.bool)])
    ours = features(model.forward_packed(packed, mask_T), packed)[: len(images)]
    state = dict(model.named_parameters())
    theirs = []
    for image, mask in zip(images, masks, strict=True):
        patch, cls = encode(state, model.cfg, image, mask)
        theirs.append(patch if cls is None else torch.cat([patch, cls.unsqueeze(0)]))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6
    weight = torch.randn(32, dtype=torch.float64)
    loss, expected = ((torch.cat(x) @ weight).sin().mean() for x in (ours, theirs))
    assert_same(gradients(model, loss), gradients(model, expected))


@family
def test_a_pack_equals_its_images_one_by_one(options: dict[str, object]) -> None:
    model = tiny_vit(**options)
    images = pictures(GRIDS)
    packed = pack(images, tokens=60, slots=7)
    together = features(model.forward_packed(packed), packed)[: len(images)]
    alone = one_by_one(model, images)
    for a, b in zip(together, alone, strict=True):
        assert (a - b).abs().max() <= 1e-6
    weight = torch.randn(32, dtype=torch.float64)
    loss, expected = ((torch.cat(x) @ weight).sin().mean() for x in (together, alone))
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert ours.pop("mask_token") is None
    assert theirs.pop("mask_token") is None
    assert_same(ours, theirs)


@family
def test_a_pack_equals_its_images_in_fp32_too(options: dict[str, object]) -> None:
    model = CogViT(tiny_config(**options))
    images = pictures(GRIDS, torch.float32)
    packed = pack(images, tokens=60, slots=7)
    together, alone = features(model.forward_packed(packed), packed)[: len(images)], one_by_one(model, images)
    for a, b in zip(together, alone, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    weight = torch.randn(sum(map(len, alone)), 32)
    ours, theirs = (
        torch.cat([g.flatten() for g in gradients(model, (torch.cat(x) * weight).mean()).values() if g is not None])
        for x in (together, alone)
    )
    # Over 20 draws the two differ by up to 1.4e-7 with AVX2 and 1.8e-6 with AVX-512; either is up to 1.4e-6 off fp64.
    assert (ours - theirs).norm() <= 3e-6 * theirs.norm()


@settings(max_examples=25)
@given(st.permutations(range(5)), st.integers(0, 9), st.integers(0, 3), st.sampled_from(sorted(FAMILIES)))
def test_order_neighbors_and_padding_do_not_matter(order: list[int], padding: int, absent: int, name: str) -> None:
    model = tiny_vit(**FAMILIES[name]).eval()
    images = pictures(GRIDS)
    tokens = sum(rows * columns for rows, columns in GRIDS)
    with torch.no_grad():
        first = pack(images)
        expected = features(model.forward_packed(first), first)
        shuffled = pack([images[i] for i in order], tokens + padding, len(images) + absent)
        noise = torch.randn(padding, shuffled.patches.shape[1], dtype=torch.float64)
        shuffled = replace(shuffled, patches=torch.cat([shuffled.patches[:tokens], noise]))
        out = features(model.forward_packed(shuffled), shuffled)
    for place, image in enumerate(order):
        assert (out[place] - expected[image]).abs().max() <= 1e-6


@family
def test_a_padded_batch_equals_its_images_one_by_one(options: dict[str, object]) -> None:
    model = tiny_vit(**options)
    images = pictures([(2, 3), (4, 2)])
    batch, valid = torch.randn(2, 3, 32, 24, dtype=torch.float64), torch.zeros(2, 4, 3, dtype=torch.bool)
    for n, image in enumerate(images):
        batch[n, :, : image.shape[1], : image.shape[2]] = image
        valid[n, : image.shape[1] // 8, : image.shape[2] // 8] = True
    valid = valid.flatten(1)
    mask = torch.rand(2, 12) < 0.4
    out = model(batch, mask=mask, valid_mask=valid)
    assert out["grid"] == (4, 3)
    assert not out["patch_tokens"][~valid].any()
    weight = torch.randn(32, dtype=torch.float64)
    grads = gradients(model, (out["patch_tokens"][valid] @ weight).sin().sum())
    loss = torch.zeros((), dtype=torch.float64)
    for n, image in enumerate(images):
        alone = model(image.unsqueeze(0), mask=mask[n][valid[n]].unsqueeze(0))
        assert (out["patch_tokens"][n][valid[n]] - alone["patch_tokens"][0]).abs().max() <= 1e-6
        loss = loss + (alone["patch_tokens"] @ weight).sin().sum()
        if alone["cls_token"] is not None:
            assert (out["cls_token"][n] - alone["cls_token"][0]).abs().max() <= 1e-6
    assert_same(grads, gradients(model, loss))


def test_uint8_patches_are_normalized_to_one() -> None:
    model = tiny_vit().float()
    image = torch.randint(0, 256, (3, 16, 24)).to(torch.uint8)
    out = model(image.unsqueeze(0))["patch_tokens"]
    expected = model(((image / 255 - 0.5) / 0.5).unsqueeze(0))["patch_tokens"]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@family
def test_a_pack_of_padding_touches_every_parameter_with_zero_gradients(options: dict[str, object]) -> None:
    model = tiny_vit(**options)
    full = random_images(0, num_tokens=20, num_slots=3)
    empty = replace(
        full,
        cu_seqlens=torch.tensor([0, 0, 0, 0, 20], dtype=torch.int32),
        grid_hw=torch.zeros_like(full.grid_hw),
        weight=torch.zeros(3),
    )
    out = model.forward_packed(empty, torch.zeros(20, dtype=torch.bool))
    pooled = pool_mean(out.patch_TD, empty.segment(), 3)
    cls = 0.0 if out.cls_ND is None else (out.cls_ND * empty.weight.unsqueeze(1)).sum()
    (pooled.sum() + cls).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_layout_names_the_slot_of_every_token() -> None:
    images = pack(pictures([(1, 2), (2, 2)]), tokens=8, slots=3)
    assert vision_layout(images, tiny_config(use_cls_token=False)).slot_S.tolist() == [0, 0, 1, 1, 1, 1, 3, 3]
    layout = vision_layout(images, tiny_config())
    assert layout.slot_S.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 3, 3, 3]
    assert layout.segments.lengths == (3, 5, 0, 3)
    assert layout.segments.cu_seqlens.tolist() == [0, 3, 8, 8, 11]


def test_equal_lengths_lie_side_by_side_in_a_tower() -> None:
    segments = segments_of(torch.tensor([0, 1, 3, 3, 4, 6, 9], dtype=torch.int32))  # 1, 2, 0, 1, 2 and 3 of padding
    order = token_order(segments, cls=False)
    assert order.segments.runs == ((2, 1), (2, 2))
    assert order.arrange(torch.arange(9)).tolist() == [0, 3, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(order.restore(order.arrange(torch.arange(9))), torch.arange(9))
    behind_cls = token_order(segments, cls=True)
    assert behind_cls.segments.lengths == (0, 2, 2, 3, 3, 4)
    assert behind_cls.source_S is not None
    assert behind_cls.source_S.tolist() == [9, 0, 12, 3, 10, 1, 2, 13, 4, 5, 6, 7, 8, 11]
    distinct = torch.tensor([0, 2, 3, 6, 6], dtype=torch.int32)
    assert token_order(segments_of(distinct), cls=False).source_S is None


def test_permutation_has_the_gradient_of_a_gather() -> None:
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, order, order.argsort()), x)
    assert torch.equal(permute_rows(x, order, order.argsort()), x[order])


def test_pool_mean_leaves_out_padding() -> None:
    x, slot = torch.randn(6, 4), torch.tensor([0, 0, 2, 2, 2, 3])
    pooled = pool_mean(x, slot, 3)
    torch.testing.assert_close(pooled, torch.stack([x[:2].mean(0), torch.zeros(4), x[2:5].mean(0)]))


class TestStochasticDepth:
    def test_drops_whole_images_by_their_key(self) -> None:
        model = tiny_vit(drop_path_rate=0.5).train()
        images = pictures(GRIDS)
        packed = replace(pack(images), key=mix(torch.arange(5), 3))
        out = features(model.forward_packed(packed), packed)
        again = features(model.forward_packed(packed), packed)
        assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
        order = [3, 0, 4, 2, 1]
        shuffled = replace(pack([images[i] for i in order]), key=packed.key[order])
        moved = features(model.forward_packed(shuffled), shuffled)
        for place, image in enumerate(order):
            assert (moved[place] - out[image]).abs().max() <= 1e-6
        other = replace(packed, key=packed.key + 1)
        assert not torch.allclose(model.forward_packed(other).patch_TD, model.forward_packed(packed).patch_TD)

    def test_keeps_the_expected_sum_and_grows_with_depth(self) -> None:
        images = replace(pack(pictures([(1, 1)] * 4000), tokens=4002), key=torch.arange(4000))
        layout = vision_layout(images, tiny_config(use_cls_token=False))
        scale = depth_scale(layout, 0.25, layer=3, branch=1)
        assert set(scale[:-2].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs(scale[:-2].mean() - 1.0) < 0.03
        assert scale[-2:].tolist() == [1.0, 1.0]
        assert not torch.equal(scale, depth_scale(layout, 0.25, layer=3, branch=0))
        assert [drop_rate(0.3, layer, 4) for layer in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])

    def test_is_off_in_eval_and_random_in_dense_training(self) -> None:
        model = tiny_vit(drop_path_rate=0.9, depth=4)
        x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
        still = tiny_vit(depth=4)(x)["patch_tokens"]
        assert torch.equal(model.eval()(x)["patch_tokens"], still)
        torch.manual_seed(0)
        first = model.train()(x)["patch_tokens"]
        assert not torch.equal(model(x)["patch_tokens"], first)
        torch.manual_seed(0)
        assert torch.equal(model(x)["patch_tokens"], first)


@family
def test_recompute_changes_nothing(options: dict[str, object]) -> None:
    model = tiny_vit(drop_path_rate=0.4, **options)
    images = replace(pack(pictures(GRIDS)), key=torch.arange(5))
    mask = torch.rand(len(images.patches)) < 0.3
    plain = gradients(model, model.forward_packed(images, mask).patch_TD.square().mean())
    model.recompute = True
    assert_same(gradients(model, model.forward_packed(images, mask).patch_TD.square().mean()), plain)


@family
def test_bf16_autocast_trains_close_to_fp32(options: dict[str, object]) -> None:
    model = tiny_vit(**options).float()
    images = pack(pictures(GRIDS, torch.float32))
    expected = model.forward_packed(images).patch_TD
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embed_packed(images).x_SD.dtype == torch.float32  # the residual stream
        out = model.forward_packed(images).patch_TD
    assert (out - expected).abs().mean() < 0.05 * expected.abs().mean()
    out.float().mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


class TestInit:
    def test_is_a_function_of_name_shape_and_seed(self) -> None:
        first = init_tensor("blocks.0.attn.qkv.weight", (96, 32), seed=3)
        assert torch.equal(first, init_tensor("blocks.0.attn.qkv.weight", (96, 32), seed=3))
        assert not torch.equal(first, init_tensor("blocks.1.attn.qkv.weight", (96, 32), seed=3))
        assert not torch.equal(first, init_tensor("blocks.0.attn.qkv.weight", (96, 32), seed=4))
        assert float(first.std()) == pytest.approx(32**-0.5, rel=0.05)

    def test_by_kind(self) -> None:
        model = CogViT(tiny_config(layer_scale_init=1e-5))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif name.endswith("gamma"):
                assert torch.equal(parameter, torch.full_like(parameter, 1e-5)), name
            elif parameter.ndim == 1:
                assert torch.equal(parameter, torch.ones_like(parameter)), name
            else:
                embeds = name.endswith(("embed", "token"))
                expected = 0.02 if embeds else (parameter.numel() / len(parameter)) ** -0.5
                assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.3), name

    def test_follows_torchs_generator(self) -> None:
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            states.append(torch.cat([p.flatten() for p in CogViT(tiny_config()).parameters()]))
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])


class TestBadInput:
    def test_shapes(self) -> None:
        model = tiny_vit()
        x = torch.randn(2, 3, 16, 16)
        for bad, message in (
            (torch.randn(2, 3, 16, 17), "16 x 17 px"),
            (torch.randn(2, 1, 16, 16), r"expected images \(B, 3, H, W\)"),
            (torch.randn(3, 16, 16), r"shape \(3, 16, 16\)"),
            (torch.randn(0, 3, 16, 16), "B at least 1"),
            (torch.randn(2, 3, 0, 16), "0 x 16 px"),
        ):
            with pytest.raises(ValueError, match=message):
                model(bad)
        with pytest.raises(ValueError, match=r"mask has shape \(2, 3\); expected \(2, 4\)"):
            model(x, mask=torch.zeros(2, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"valid_mask has shape \(1, 4\)"):
            model(x, valid_mask=torch.ones(1, 4, dtype=torch.bool))

    def test_values(self) -> None:
        model = tiny_vit()
        x = torch.randn(2, 3, 16, 16)
        valid = torch.tensor([[True] * 4, [False] * 4])
        with pytest.raises(ValueError, match="image 1 of the batch has no valid patch"):
            model(x, valid_mask=valid)

    def test_what_is_not_finite_comes_out_so(self) -> None:
        """A look at every value would make the host wait for the device in every forward, and torch.export fail."""
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        x[1, 2, 3, 4] = torch.nan
        tokens = tiny_vit()(x)["patch_tokens"]
        assert tokens[0].isfinite().all() and tokens[1].isnan().any()

    def test_packs(self) -> None:
        model = tiny_vit()
        images = pack(pictures(GRIDS))
        with pytest.raises(ValueError, match=r"expected \(T, 192\)"):
            model.forward_packed(replace(images, patches=images.patches[:, :-1]))
        with pytest.raises(ValueError, match=r"patches are torch\.int64; expected torch\.uint8 or floats"):
            model.forward_packed(replace(images, patches=images.patches.long()))
        with pytest.raises(ValueError, match=r"mask is torch\.bool of shape \(3,\); expected torch\.bool of \(40,\)"):
            model.forward_packed(images, torch.zeros(3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"mask is torch\.int64 of shape \(40,\)"):
            model.forward_packed(images, torch.zeros(40, dtype=torch.int64))
        with pytest.raises(ValueError, match="do not fit tokens_per_pack=34"):
            pack(pictures(GRIDS), tokens=34)
        with pytest.raises(ValueError, match="no images"):
            pack_images([], [])

    def test_configurations(self) -> None:
        for options, message in (
            ({"num_heads": 5}, "num_heads=5 does not divide embed_dim=32"),
            ({"patch_size": 7}, "patch_size=7 does not divide image_size=32"),
            ({"depth": 0}, "depth=0"),
            ({"num_heads": 0}, "num_heads=0 must be at least 1"),
            ({"mlp_ratio": 0.01}, "mlp_ratio=0.01"),
            ({"eps": 0.0}, "eps=0.0"),
            ({"norm": "batchnorm"}, "norm='batchnorm'"),
            ({"position": "rotary", "embed_dim": 24, "num_heads": 4}, "head_dim"),
        ):
            with pytest.raises(ValueError, match=message):
                tiny_config(**options)


def test_families_have_the_published_sizes() -> None:
    with torch.device("meta"):
        reference = CogViT(CogViTConfig())
        large = CogViT(
            CogViTConfig(norm="rmsnorm", mlp="swiglu", position="rotary", use_cls_token=False, image_size=336)
        )
    assert sum(p.numel() for p in reference.parameters()) == 303_184_896
    blocks = sum(p.numel() for p in large.blocks.parameters())
    assert round(blocks / 1e6, 1) == 403.0

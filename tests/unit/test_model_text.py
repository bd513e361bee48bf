"""The text tower: packed captions equal captions one by one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cogvit.model.config import TextConfig
from cogvit.model.text import TextTower, text_layout
from tests.packs import random_images, random_text
from tests.plain_vit import scramble


def tiny_tower(**options: float) -> TextTower:
    cfg = TextConfig(max_tokens=16, embed_dim=32, depth=3, num_heads=4, **options)  # type: ignore[arg-type]
    tower = TextTower(cfg).eval()
    scramble(tower)
    return tower.double()


def test_packed_equals_one_by_one_with_gradients() -> None:
    tower, text = tiny_tower(), random_text(3, random_images(3))
    packed = tower.forward_packed(text)
    bounds = text.cu_seqlens.tolist()
    alone = []
    for start, stop in pairwise(bounds[:-1]):
        ids = text.ids[start:stop].unsqueeze(0)
        alone.append(tower(ids, torch.ones_like(ids))[0] if start < stop else torch.zeros(32, dtype=torch.float64))
    expected = torch.stack(alone)
    assert not packed[-1].any()
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-6, check_dtype=False)
    weight = torch.randn_like(packed)
    grads = torch.autograd.grad((packed * weight).sum(), list(tower.parameters()))
    others = torch.autograd.grad((expected * weight).sum(), list(tower.parameters()))
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)


def test_padding_in_a_dense_batch_does_not_matter() -> None:
    tower = tiny_tower()
    ids = torch.randint(0, 384, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    out = tower(ids, mask)
    torch.testing.assert_close(out[1], tower(ids[1:, :4], mask[1:, :4])[0])
    changed = ids.clone()
    changed[1, 4:] = 0
    assert torch.equal(tower(changed, mask), out)


def test_order_of_tokens_matters() -> None:
    tower = tiny_tower()
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(tower(ids, torch.ones_like(ids)), tower(ids.flip(1), torch.ones_like(ids)))


def test_an_image_and_its_caption_draw_differently() -> None:
    images = random_images(1)
    layout = text_layout(random_text(1, images), images.key)
    assert not (layout.key_N == images.key).any()


def test_stochastic_depth_follows_the_given_keys() -> None:
    tower = tiny_tower(drop_path_rate=0.6).train()
    images = random_images(2)
    text = random_text(2, images)
    assert torch.equal(tower.forward_packed(text, images.key), tower.forward_packed(text, images.key))
    assert not torch.equal(tower.forward_packed(text, images.key), tower.forward_packed(text, images.key + 1))
    ids = torch.randint(0, 384, (8, 9))
    assert not torch.equal(tower(ids, torch.ones_like(ids)), tower(ids, torch.ones_like(ids)))


def test_recompute_changes_nothing() -> None:
    tower, text = tiny_tower(), random_text(3, random_images(3))
    plain = torch.autograd.grad(tower.forward_packed(text).square().sum(), list(tower.parameters()))
    tower.recompute = True
    again = torch.autograd.grad(tower.forward_packed(text).square().sum(), list(tower.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_bad_input() -> None:
    tower = tiny_tower()
    with pytest.raises(ValueError, match=r"must share \(B, L\)"):
        tower(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4))
    with pytest.raises(ValueError, match="a caption has 17 tokens; truncate to max_tokens=16"):
        tower(torch.zeros(1, 17, dtype=torch.int64), torch.ones(1, 17))
    with pytest.raises(ValueError, match="token ids are -1 to 0; expected 0 to"):
        tower(torch.tensor([[0, -1]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
        TextConfig(num_heads=0)
    with pytest.raises(ValueError, match="num_heads=5"):
        TextConfig(num_heads=5)

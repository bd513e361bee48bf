"""Images as users bring them are the pictures that training sees, whatever door they come in by."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogvit import CogViT, CogViTConfig, SigLIPLoss, naflex_collate, naflex_pack, naflex_resize
from cogvit.errors import CheckpointError, DataError
from cogvit.evaluation.clip_benchmark import PaddedTokenizer, SquareTransform
from cogvit.model.interop import load_checked
from cogvit.model.tokenizer import ByteTokenizer
from data_pipeline.decode import read_image_at

CFG = CogViTConfig(image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)


@pytest.fixture
def model() -> CogViT:
    torch.manual_seed(0)
    return CogViT(CFG).eval()


def test_uint8_is_normalized_behind_every_door(model: CogViT) -> None:
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((40, 24), (30, 20))]
    packed = model.forward_packed(naflex_pack(images, 8, 16)).patch_TD
    batch, valid = naflex_collate(images, 8, 16)
    dense = model(batch, valid_mask=valid)["patch_tokens"][valid]
    assert batch.ndim == 4 and batch.min() >= -1.0 and batch.max() <= 1.0 and batch.dtype == torch.float32
    assert torch.allclose(dense, packed, atol=1e-5)
    alone = naflex_resize(images[0], 8, 16)
    assert torch.equal(alone, batch[0, :, : alone.shape[1], : alone.shape[2]])


@pytest.mark.parametrize("make", [naflex_pack, naflex_collate, lambda images, *size: naflex_resize(images[0], *size)])
def test_floats_of_0_to_255_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"image 0 holds floats up to 2..*; expected \[-1, 1\], or torch.uint8"):
        make([torch.full((3, 16, 16), 250.0)], 8, 16)


def test_a_pack_of_another_precision_is_encoded(model: CogViT) -> None:
    image = torch.rand(3, 16, 16)
    expected = model.forward_packed(naflex_pack([image], 8, 16)).patch_TD
    model.bfloat16()
    found = model.forward_packed(naflex_pack([image], 8, 16)).patch_TD
    assert torch.allclose(found.float(), expected, atol=0.1)


def odd_images() -> dict[str, bytes]:
    """A transparent picture, 16-bit gray, and a photograph on its side."""
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    colors = Image.fromarray(np.stack([ramp, ramp.T.reshape(48, 64), 255 - ramp], axis=2))
    transparent = colors.copy()
    transparent.putalpha(Image.fromarray(np.where(ramp > 128, 255, 0).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for name, image, options in (
        ("transparent", transparent, {"format": "PNG"}),
        ("deep", Image.fromarray(ramp.astype(np.uint16) * 257), {"format": "PNG"}),
        ("sideways", colors, {"format": "PNG", "exif": exif.tobytes()}),
    ):
        data = io.BytesIO()
        image.save(data, **options)
        found[name] = data.getvalue()
    return found


@pytest.mark.parametrize("name", ["transparent", "deep", "sideways"])
def test_clip_benchmark_sees_the_picture_that_training_sees(name: str) -> None:
    data = odd_images()[name]
    seen = SquareTransform(32)(Image.open(io.BytesIO(data)))
    trained = read_image_at(data, (32, 32)).float() / 127.5 - 1.0
    assert torch.allclose(seen, trained, atol=1e-6)


def test_one_text_is_one_row_and_none_is_told() -> None:
    tokenizer = PaddedTokenizer(ByteTokenizer(), 16)
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
    with pytest.raises(DataError, match="there are no texts"):
        tokenizer([])


def test_weights_that_are_no_numbers_are_refused_by_name(model: CogViT) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight holds NaN"):
        load_checked(model, weights)


def test_the_loss_of_fp64_embeddings_is_fp64() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(2, 6, 8, dtype=torch.float64)
    loss = SigLIPLoss().double()
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    sign = 2 * torch.eye(6, dtype=torch.float64) - 1
    expected = -torch.nn.functional.logsigmoid(sign * (loss.log_t.exp() * image @ text.T + loss.bias)).sum() / 6
    assert loss(image, text).item() == pytest.approx(expected.item(), rel=1e-14)


def test_a_checkpoint_is_read_at_another_image_size(model: CogViT, tmp_path: Path) -> None:
    """timm#1794: pretrained at 32 px, wanted at 64."""
    model.save_pretrained(tmp_path)
    larger = CogViT.from_pretrained(tmp_path, image_size=64).eval()
    assert larger.cfg.image_size == 64 and larger.pos_embed.embed.shape[-2:] == (8, 8)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    # The table as the tower itself resizes it to an image's grid.
    torch.testing.assert_close(larger(image)["patch_tokens"], model(image)["patch_tokens"], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="image_size"):
        CogViT.from_pretrained(tmp_path, image_size=30)

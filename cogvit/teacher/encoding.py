"""How features lie in a store: floats as they are, or bytes with the range of each channel of each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

StoreDtype = Literal["fp32", "bf16", "fp16", "uint8"]

ROW_DTYPES: dict[StoreDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "uint8": torch.uint8,
}
_LARGEST = 255


def encode(feature_TC: Tensor, dtype: StoreDtype) -> dict[str, Tensor]:
    """Return the parts of one image's features: rows [T, C] and, for uint8, low and span [1, C] float32.

    Channels of a vision transformer differ a hundredfold in range and some are outliers in a few images alone, so
    every channel of every image has a scale of its own; it costs 8 bytes a channel and image. A byte is the square root
    of a value's place in the span: steps grow from the lowest value, where tokens lie of which a channel says little.
    """
    if dtype != "uint8":
        return {"rows": feature_TC.to(ROW_DTYPES[dtype])}
    feature_TC = feature_TC.float()
    low_1C, high_1C = feature_TC.amin(dim=0, keepdim=True), feature_TC.amax(dim=0, keepdim=True)
    span_1C = high_1C - low_1C
    place_TC = (feature_TC - low_1C).div_(torch.where(span_1C > 0, span_1C, 1.0))  # 0 to 1
    return {"rows": place_TC.sqrt_().mul_(_LARGEST).round_().to(torch.uint8), "low": low_1C, "span": span_1C}


def decode(parts: Mapping[str, Tensor], out_TC: Tensor | None = None) -> Tensor:
    """Return an image's features [T, C] float32 from their parts, in out_TC if that is given."""
    feature_TC = torch.empty(parts["rows"].shape) if out_TC is None else out_TC
    feature_TC.copy_(parts["rows"])
    if "low" in parts:
        feature_TC.square_().mul_(parts["span"] / _LARGEST**2).add_(parts["low"])
    return feature_TC


def fits(feature_TC: Tensor, dtype: StoreDtype) -> bool:
    """Whether every value is finite, and stays so when it is stored."""
    largest = torch.finfo(ROW_DTYPES[dtype] if ROW_DTYPES[dtype].is_floating_point else torch.float32).max
    return all(bool(end.abs() <= largest) for end in feature_TC.aminmax())  # NaN is neither

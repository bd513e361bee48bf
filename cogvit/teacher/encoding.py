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


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """Return [T, C] float32 features from the parts of an image."""
    rows_TC = parts["rows"].float()
    if "low" not in parts:
        return rows_TC
    return rows_TC.square_().mul_(parts["span"] / _LARGEST**2).add_(parts["low"])

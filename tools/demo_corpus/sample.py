"""A captioned picture and the webdataset shard it is stored in."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from webdataset import TarWriter


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its captions, ready to be stored."""

    key: str  # unique in its shard, no dot
    image: Image.Image
    format: Literal["png", "jpg"]
    source: str  # pictograms, digits, photos or questions
    caption_en: str
    caption_zh: str
    label: int | None = None  # class, where there is one
    question: str = ""  # that the English caption answers; the sample is a conversation then


def encode(sample: Sample) -> dict[str, str | bytes]:
    """Return the members of a sample as webdataset names them: the image, `json`, and `txt` of a caption."""
    image = io.BytesIO()
    if sample.format == "png":
        sample.image.save(image, "PNG", compress_level=6)
    else:
        sample.image.save(image, "JPEG", quality=90)
    if sample.question:
        asked = {"role": "user", "content": f"<image>{sample.question}"}
        talk = {"source": sample.source, "messages": [asked, {"role": "assistant", "content": sample.caption_en}]}
        return {"__key__": sample.key, sample.format: image.getvalue(), "json": json.dumps(talk).encode()}
    width_px, height_px = sample.image.size
    meta = {
        "width": width_px,
        "height": height_px,
        "source": sample.source,
        "captions": {"en": [sample.caption_en], "zh": [sample.caption_zh]},
    }
    if sample.label is not None:
        meta["label"] = sample.label
    return {
        "__key__": sample.key,
        sample.format: image.getvalue(),
        "txt": sample.caption_en.encode(),
        "json": json.dumps(meta, ensure_ascii=False).encode(),
    }


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one shard and return its number of samples; time and owner are fixed, so equal samples give equal bytes."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False, mtime=0) as shard:
        for sample in samples:
            shard.write(encode(sample))
            count += 1
    return count

"""Glyphs for captions that a reader's machine may have no font for, inside the page.

Noto Sans CJK (SIL Open Font License), cut to the East Asian characters of the page; some 400 bytes each.
"""

from __future__ import annotations

import base64
import io
import re
from importlib.resources import as_file, files
from importlib.util import find_spec

FAMILY = "Report CJK"
_PACKAGE, _FILE, _CHINESE = "manimgx_fonts_cjk", "NotoSansCJK-VF.otf.ttc", 2  # the third face of the file
_EAST_ASIAN = re.compile("[\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")


def font_face(text: str) -> str:
    """Return CSS with a font of the text's East Asian characters.

    Empty where it has none, or where the font or fontTools is not installed (they come with the demo's extra): then
    the reader's own fonts draw them.
    """
    characters = "".join(sorted(set(_EAST_ASIAN.findall(text))))
    if not characters or find_spec(_PACKAGE) is None or find_spec("fontTools") is None:
        return ""
    data = base64.b64encode(_subset(characters)).decode()
    return (
        f'@font-face {{ font-family: "{FAMILY}"; font-weight: 100 900; font-display: block;'
        f' src: url("data:font/woff;base64,{data}") format("woff"); }}'
    )


def _subset(characters: str) -> bytes:
    """The characters' glyphs in all weights, as WOFF; the names that say the license stay."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    options = subset.Options(layout_features=[], name_IDs=[0, 1, 2, 13, 14], hinting=False, notdef_outline=True)
    with as_file(files(_PACKAGE) / _FILE) as path, TTFont(path, fontNumber=_CHINESE, lazy=True) as font:
        cutter = subset.Subsetter(options)
        cutter.populate(text=characters)
        cutter.subset(font)
        font.flavor = "woff"
        out = io.BytesIO()
        font.save(out)
    return out.getvalue()

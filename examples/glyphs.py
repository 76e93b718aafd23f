"""The data of three examples: pictures of characters, from the fonts that come with matplotlib, and their names.

A character is drawn in up to twelve styles (sans, serif and mono, bold and slanted), 28 x 28 pixels. Its Unicode name
says what it is made of: LATIN SMALL LETTER E WITH ACUTE. One character in ten is held out, in every style.
"""

from __future__ import annotations

import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 28
HELD_OUT = 10  # one character in so many
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
UPRIGHT = ["Sans", "Sans-Bold", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold"]
SLANTED = ["Sans-Oblique", "Sans-BoldOblique", "SansMono-Oblique", "SansMono-BoldOblique", "Serif-Italic"]
STYLES = [*UPRIGHT, *SLANTED, "Serif-BoldItalic"]


class Glyphs(NamedTuple):
    images: Tensor  # [N, 1, 28, 28], from 0 to 1
    characters: Tensor  # [N], the code point
    styles: Tensor  # [N], the number in STYLES

    def of(self, rows: Tensor) -> Glyphs:
        return Glyphs(*(part[rows] for part in self))


def load_glyphs(most: int) -> tuple[Glyphs, Glyphs]:
    """Training glyphs and held-out ones, of at most so many letters; of letters that look alike only the first."""
    fonts = [FONTS / f"DejaVu{style}.ttf" for style in STYLES]
    covered = [set(TTFont(font).getBestCmap()) for font in fonts]
    drawn = [ImageFont.truetype(str(font), 20) for font in fonts]
    letters = [code for code in sorted(covered[0]) if unicodedata.category(chr(code))[0] == "L"]
    first = {draw(code, drawn[0]).tobytes(): code for code in reversed(letters)}
    chosen = sorted(sorted(first.values(), key=hash_of)[:most])
    rows = [
        (draw(code, drawn[style]), code, style)
        for style in range(len(STYLES))
        for code in chosen
        if code in covered[style]
    ]
    images, characters, styles = zip(*rows, strict=True)
    pixels = torch.from_numpy(np.stack(images))[:, None].float() / 255
    glyphs = Glyphs(pixels, torch.tensor(characters), torch.tensor(styles))
    held = torch.tensor([hash_of(code) % HELD_OUT == 0 for code in characters])
    return glyphs.of(~held), glyphs.of(held)


def one_style_each(glyphs: Glyphs, most: int) -> Tensor:
    """The rows of a batch: characters drawn at random, each in a random style, so that no two have one name."""
    order = torch.randperm(len(glyphs.characters))
    row_of = dict(zip(glyphs.characters[order].tolist(), order.tolist(), strict=True))
    return torch.tensor(list(row_of.values()))[torch.randperm(len(row_of))[:most]]


def name_of(character: int) -> str:
    return unicodedata.name(chr(character)).lower()


def hash_of(code: int) -> int:
    return zlib.crc32(str(code).encode())


def draw(code: int, font: ImageFont.FreeTypeFont) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), chr(code), fill=255, font=font, anchor="mm")
    return np.asarray(image)

"""Draws docs/figures/*.svg: `python tools/figures.py`. `--check` only says if they are up to date.

The figures have their own light background, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

FIGURES = Path(__file__).absolute().parent.parent / "docs" / "figures"
INK, PALE, BLUE, ORANGE, GREEN, GREY = "#1f2937", "#ffffff", "#93c5fd", "#fdba74", "#86efac", "#e5e7eb"


def box(x: float, y: float, width: float, height: float, fill: str, label: str = "", dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    drawn = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{INK}"{dash}/>'
    return drawn + (text(x + width / 2, y + height / 2 + 5, label) if label else "")


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 15, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight}>{words}</text>'


def arrow(x0: float, y0: float, x1: float, y1: float, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    line = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {line} stroke="{INK}" stroke-width="1.6" marker-end="url(#head)"{dash}/>'


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    head = '<path d="M0 0 L8 4 L0 8 z" fill="' + INK + '"/>'
    marker = f'<marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">{head}</marker>'
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" fill="{INK}" role="img">'
    )
    back = f'<rect width="{width}" height="{height}" rx="8" fill="{PALE}"/>'
    return "\n".join([opening, f"<title>{title}</title>", f"<defs>{marker}</defs>", back, *parts, "</svg>", ""])


def chunk() -> str:
    """x on the left, y on top, the chunk of E between them; dx beside x's rows, dy under E."""
    left, top, D, N, rows = 190, 110, 70, 330, 46
    first = top + 64  # where the chunk begins
    right = left + N + 110
    parts = [
        text(left + N / 2, 28, "keys y, [N, D], transposed", bold=True),
        box(left, 38, N, 44, BLUE, "y"),
        text(70, top - 10, "rows x, [M, D]", bold=True),
        box(35, top, D, 230, PALE),
        box(35, first, D, rows, BLUE, "chunk"),
        box(left, top, N, 230, PALE, dashed=True),
        text(left + N / 2, top + 36, "N x N similarities: never stored", size=14),
        box(left, first, N, rows, ORANGE, "workspace: E = exp(z - shift)"),
        text(left + N / 2, first + rows + 26, "the next chunk overwrites it", size=14),
        arrow(35 + D + 4, first + rows / 2, left - 6, first + rows / 2),
        text((35 + D + left) / 2, first + rows / 2 - 8, "1", bold=True),
        arrow(left + N - 40, 86, left + N - 40, first - 4),
        arrow(left + N + 4, first + rows / 2, right - 46, first + rows / 2),
        text(left + N + 34, first + rows / 2 - 8, "2", bold=True),
        box(right - 42, first, 26, rows, GREEN),
        text(right - 29, first - 24, "once a row:", size=13),
        text(right - 29, first - 9, "sum, loss, 1/l", size=13),
        arrow(right - 12, first + rows / 2, right + 42, first + rows / 2),
        text(right + 14, first + rows / 2 - 8, "3", bold=True),
        box(right + 46, top, D, 230, PALE),
        box(right + 46, first, D, rows, GREEN, "E y / l"),
        text(right + 46 + D / 2, top - 10, "gradient dx", bold=True),
        arrow(left + 60, first + rows + 4, left + 60, top + 252),
        text(left + 76, top + 248, "4", "start", bold=True),
        box(left, top + 256, N, 44, GREEN, "dy += E^T x / l, in fp32, over all chunks"),
        text(left + N / 2, top + 322, "gradient dy, [N, D], transposed", bold=True),
    ]
    return page(780, 450, "One chunk of rows: the similarities of the chunk alone are in memory", parts)


def ring() -> str:
    """Four ranks, each with its rows, in the second step: shards of columns go to the rank before."""
    centre, radius, side = (340, 235), 150, 104
    parts = [text(340, 30, "round 2, step 2 of 4", bold=True)]
    places = [(centre[0] + radius * math.sin(a), centre[1] - radius * math.cos(a)) for a in (0, 1.5708, 3.1416, 4.7124)]
    for rank, (x, y) in enumerate(places):
        held = (rank + 1) % 4
        parts += [
            box(x - side / 2, y - 36, side, 72, GREY),
            text(x, y - 17, f"rank {rank}", bold=True),
            text(x, y + 2, f"rows x{rank}, sums", size=13),
            box(x - side / 2 + 6, y + 9, side / 2 - 8, 22, BLUE, f"y{held}"),
            box(x + 2, y + 9, side / 2 - 8, 22, GREEN, f"dy{held}"),
        ]
    for k in range(4):
        (x0, y0), (x1, y1) = places[(k + 1) % 4], places[k]
        dx, dy = x1 - x0, y1 - y0
        parts.append(arrow(x0 + 0.37 * dx, y0 + 0.37 * dy, x0 + 0.63 * dx, y0 + 0.63 * dy))
    parts += [
        box(40, 450, 24, 20, BLUE),
        text(76, 465, "a shard of columns: with the rank in this step, already on its way to the next", "start", 14),
        box(40, 480, 24, 20, GREEN),
        text(76, 495, "its gradient: sent on when the rank has added to it", "start", 14),
        box(40, 510, 24, 20, GREY),
        text(76, 525, "stays: the rank's rows, their sums and their gradient", "start", 14),
    ]
    return page(680, 550, "The ring: shards of columns go around, and their gradients follow", parts)


# One a family of losses ----------------------------------------------------------------------------------------------

CELL = 30
OF_CELLS = {"+": GREEN, "-": ORANGE, ".": GREY, "x": BLUE}


def cells(left: float, top: float, rows: list[str], names: str = "") -> list[str]:
    """A matrix: + a positive, - a negative, . left out, x a vector; a blank draws nothing."""
    found = [
        box(left + CELL * column, top + CELL * row, CELL, CELL, OF_CELLS[kind])
        for row, line in enumerate(rows)
        for column, kind in enumerate(line)
        if kind != " "
    ]
    return [*found, text(left + CELL * len(rows[0]) / 2, top - 10, names, size=14)] if names else found


def key(left: float, top: float, **words: str) -> list[str]:
    """What the colours mean, one below the other."""
    named = {"positive": GREEN, "negative": ORANGE, "none": GREY, "vector": BLUE}
    found: list[str] = []
    for row, (kind, meaning) in enumerate(words.items()):
        found += [
            box(left, top + 30 * row, 20, 20, named[kind]),
            text(left + 30, top + 15 + 30 * row, meaning, "start", 14),
        ]
    return found


def in_batch() -> str:
    diagonal = ["".join("+" if row == column else "-" for column in range(6)) for row in range(6)]
    diagonal[1], diagonal[4] = "-+--.-", "-.--+-"
    parts = [
        text(60, 150, "queries", size=14),
        *cells(100, 60, diagonal, "keys of the batch"),
        *cells(300, 60, ["--"] * 6, "own negatives"),
        *cells(400, 60, ["---"] * 6, "bank"),
        *key(530, 80, positive="the row's positive", negative="its negatives", none="masked: a duplicate"),
        text(100, 275, "Each row is a softmax, or a hinge, over its cells.", "start", 14),
    ]
    return page(740, 300, "In-batch losses: each row's positive among the columns that compete with it", parts)


def labelled() -> str:
    label = "AABBBC"
    rows = [
        "".join("." if i == j else "+" if a == b else "-" for j, b in enumerate(label)) for i, a in enumerate(label)
    ]
    parts = [
        *[text(100 + CELL * (i + 0.5), 50, name, size=14, bold=True) for i, name in enumerate(label)],
        *[text(84, 60 + CELL * (i + 0.7), name, size=14, bold=True) for i, name in enumerate(label)],
        *cells(100, 60, rows),
        *key(330, 80, positive="the same label", negative="another label", none="the sample itself"),
        text(100, 275, "One matrix on both sides: half of the cells are enough.", "start", 14),
    ]
    return page(560, 300, "Losses of labelled samples: the batch against itself", parts)


def image_text() -> str:
    rows = ["".join("+" if row == column else "-" for column in range(6)) for row in range(6)]
    parts = [
        text(56, 155, "images", size=14),
        *cells(100, 60, rows, "texts"),
        arrow(290, 75, 340, 75),
        text(350, 80, "clip: a softmax of each row", "start", 14),
        arrow(115, 250, 115, 285),
        text(130, 280, "and of each column", "start", 14),
        text(350, 135, "siglip: a decision for each cell", "start", 14),
        *key(350, 165, positive="the pair belongs together", negative="it does not"),
    ]
    return page(600, 310, "Image and text: all pairs of a batch, in both directions", parts)


def classes() -> str:
    chosen = (2, 9, 5, 0)
    rows = ["".join("+" if column == target else "-" for column in range(12)) for target in chosen]
    parts = [
        text(52, 125, "samples", size=14),
        *cells(100, 60, rows, "class vectors, tokens or proxies: [C, D], with a gradient"),
        *key(490, 70, positive="the sample's class", negative="all others"),
        text(100, 210, "A margin moves the green cell alone.", "start", 14),
    ]
    return page(680, 235, "Losses over classes: rows of the batch against a table", parts)


def pairs() -> str:
    parts = [text(115, 40, "a", bold=True), text(275, 40, "b", bold=True)]
    for row in range(4):
        y = 50 + 44 * row
        parts += [*cells(70, y, ["xxx"]), *cells(230, y, ["xxx"]), arrow(166, y + 15, 226, y + 15)]
        parts.append(text(340, y + 20, f"score or label {row + 1}", "start", 14))
    parts.append(text(70, 250, "A row needs its own pair or triplet; cosent compares the scores.", "start", 14))
    return page(560, 275, "Pairs and triplets: row i of one matrix with row i of the others", parts)


def lists() -> str:
    rows = ["+--+---", "-+--...", "++---..", "-----+-"]
    parts = [
        text(52, 125, "queries", size=14),
        *cells(100, 60, rows, "scores of the documents"),
        *key(345, 70, positive="relevant", negative="less relevant", none="padding"),
        text(100, 210, "A loss sees the order within a row: of pairs, or of the whole list.", "start", 14),
    ]
    return page(560, 235, "Lists: the documents of each query, by score and by relevance", parts)


def teachers() -> str:
    parts = [
        *cells(40, 60, ["xxxxxx", "xxxxxx", "xxxxxx"], "student's scores, [M, N]"),
        *cells(340, 60, ["......", "......", "......"], "teacher's scores, without a gradient"),
        arrow(330, 105, 230, 105),
        text(280, 95, "learns", size=14),
        text(40, 185, "Embeddings, margins, or each row's softmax are compared.", "start", 14),
    ]
    return page(580, 210, "Teachers: a student learns scores or embeddings", parts)


def elements() -> str:
    parts = [
        text(90, 75, "prediction", "end", 14),
        *cells(100, 55, ["xxxxxxxx"]),
        text(90, 125, "target", "end", 14),
        *cells(100, 105, ["........"]),
        text(90, 185, "loss", "end", 14),
        *cells(100, 165, ["--------"]),
        *[arrow(115 + CELL * k, 138, 115 + CELL * k, 161) for k in range(8)],
        text(100, 225, "One pass: the value, and the derivative beside it.", "start", 14),
    ]
    return page(480, 250, "Losses of elements: each prediction with its own target", parts)


FAMILIES = in_batch, labelled, image_text, classes, pairs, lists, teachers, elements


def main() -> int:
    stale = 0
    for draw in (chunk, ring, *FAMILIES):
        path, drawn = FIGURES / f"{draw.__name__}.svg", draw()
        if path.exists() and path.read_text() == drawn:
            continue
        if "--check" in sys.argv[1:]:
            print(f"docs/figures/{path.name} is out of date: run python tools/figures.py", file=sys.stderr)
            stale = 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(drawn)
    return stale


if __name__ == "__main__":
    sys.exit(main())

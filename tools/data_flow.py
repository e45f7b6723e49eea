"""Draws docs/images/data-flow.svg, the picture of docs/how-it-works.md: a padded batch, packed, and padded again.

python -m tools.data_flow            # write
python -m tools.data_flow --check    # say whether it is up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "data-flow.svg"

WIDTH, HEIGHT = 960, 560
LENGTHS = (7, 3, 5, 2)  # tokens of the four texts
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
CELL = 26
INK, GREY, PALE, BOX = "#1f2933", "#6b7785", "#e4e8ed", "#f4f6f9"
LAYER = (
    "Q, K, V in one product",
    "attention inside each text",
    "output + residual + norm",
    "feed-forward + activation",
    "down + residual + norm",
)
KERNELS = "every layer: the real tokens only, in a few fused kernels (Triton on CUDA, C++ or oneDNN on the CPU)"


def text(
    x: float, y: float, words: str, size: int = 15, colour: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'


def cell(x: float, y: float, colour: str, words: str = "") -> str:
    square = f'<rect x="{x}" y="{y}" width="{CELL - 3}" height="{CELL - 3}" rx="4" fill="{colour}"/>'
    return square + (text(x + CELL / 2 - 1.5, y + 16, words, 11, GREY, "middle") if words else "")


def path(steps: str) -> str:
    """A line with an arrow at its end."""
    return f'<path d="{steps}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#head)"/>'


def box(x: float, y: float, width: float, height: float, colour: str = BOX) -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {place} rx="8" fill="{colour}" stroke="{PALE}" stroke-width="1.5"/>'


def padded(x: float, y: float, padding: str) -> list[str]:
    """A batch [B, S]: a row for each text, as long as the longest."""
    return [
        cell(
            x + CELL * place,
            y + CELL * row,
            COLOURS[row] if place < length else PALE,
            "" if place < length else padding,
        )
        for row, length in enumerate(LENGTHS)
        for place in range(max(LENGTHS))
    ]


def packed(x: float, y: float) -> list[str]:
    """The real tokens of all texts in one row."""
    colours = [COLOURS[row] for row, length in enumerate(LENGTHS) for _ in range(length)]
    return [cell(x + CELL * place, y, colour) for place, colour in enumerate(colours)]


def layer(x: float, y: float, width: float, name: str) -> list[str]:
    parts = [box(x, y, width, 196), text(x + width / 2, y + 24, name, 14, INK, "middle", bold=True)]
    for number, words in enumerate(LAYER):
        top = y + 36 + 31 * number
        parts += [box(x + 14, top, width - 28, 26, "#ffffff"), text(x + width / 2, top + 18, words, 13, INK, "middle")]
    return parts


def picture() -> str:
    rows, columns, tokens = len(LENGTHS), max(LENGTHS), sum(LENGTHS)
    right = WIDTH - 40 - CELL * columns
    middle = (WIDTH - CELL * tokens) / 2
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(40, 38, f"padded: {rows} × {columns} = {rows * columns} positions", 15, INK, bold=True),
        *padded(40, 54, "·"),
        text(40, 182, "[B, S, D], from the embeddings", 13, GREY),
        text(right, 38, "padded again", 15, INK, bold=True),
        *padded(right, 54, "0"),
        text(right, 182, "[B, S, D], zeros at padding", 13, GREY),
        text(WIDTH / 2, 196, f"packed: {tokens} real tokens and no padding", 15, INK, "middle", bold=True),
        text(WIDTH / 2, 216, "the model's own mask says which tokens are real", 13, GREY, "middle"),
        path(f"M 131 196 V 243 H {middle - 12}"),
        text(143, 232, "drop padding", 13, GREY),
        *packed(middle, 232),
        text(
            WIDTH / 2,
            278,
            f"values [T, D] and offsets {[sum(LENGTHS[:n]) for n in range(rows + 1)]}",
            13,
            GREY,
            "middle",
        ),
        path(f"M {middle + CELL * tokens + 6} 243 H {WIDTH - 131} V 200"),
        text(WIDTH - 143, 232, "put padding back", 13, GREY, "end"),
    ]
    for number, name in enumerate(("first layer", "next layers, the same", "last layer")):
        x = 60 + 290 * number
        parts += layer(x, 316, 260, name)
        if number:
            parts.append(path(f"M {x - 28} 414 H {x - 6}"))
    parts += [
        path(f"M {WIDTH / 2 - 40} 286 V 300 H 190 V 310"),
        path(f"M 770 312 V 300 H {WIDTH / 2 + 40} V 290"),
        text(WIDTH / 2, 542, KERNELS, 14, INK, "middle"),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, sans-serif"><title>How tokens flow through a fast model</title><defs>'
        '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 10 5 L 0 10 z" fill="{GREY}"/></marker></defs>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        current = PICTURE.read_text(encoding="utf-8") == picture()
        print("up to date" if current else f"{PICTURE.name} is not what python -m tools.data_flow draws")
        return not current
    PICTURE.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

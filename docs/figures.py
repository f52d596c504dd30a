"""Draws docs/ticks.svg and docs/learning.svg: python3 docs/figures.py. The latter's values stand in learning.csv."""

import csv
import pathlib
from html import escape

HERE = pathlib.Path(__file__).parent
STYLE = """<style>
text { font: 13px sans-serif; fill: #222 } .small { font-size: 11px; fill: #555 } .axis { stroke: #888 } .grid { stroke: #ddd }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .small { fill: #aaa } .grid { stroke: #444 } .ground { fill: #1b1b1b } }
.ground { fill: #fff }
</style>"""
COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#edc948", "#9c755f"]


def svg(name, width, height, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    body = "\n".join([head, STYLE, f'<rect class="ground" width="{width}" height="{height}"/>', *parts, "</svg>\n"])
    (HERE / name).write_text(body)


def text(x, y, what, anchor="middle", kind=""):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{escape(what)}</text>'


def ticks(modules=4, shown=9):
    """A cell is a module's work in a tick, its colour the frame it is about; a skip of span 2 brings a newer frame."""
    side, high, left, top = 62, 44, 84, 30
    parts = [text(left + side * shown / 2, 18, "tick", kind="small")]
    centre = lambda i, t: (left + side * t + side / 2, top + high * (modules - i) + high / 2)
    for t in range(shown):
        parts.append(text(left + side * t + side / 2, top + high * modules + 18, str(t), kind="small"))
    for i in range(1, modules + 1):
        parts.append(text(left - 8, centre(i, 0)[1] + 4, f"module {i}", "end"))
        for t in range(shown):
            frame = t - i + 1
            if frame < 0:
                continue
            x, y = left + side * t + 2, top + high * (modules - i) + 2
            parts.append(f'<rect x="{x}" y="{y}" width="{side - 4}" height="{high - 4}" rx="5" fill="{COLOURS[frame % 8]}" fill-opacity="0.35"/>')
            # The first cotangent came up from the last module a module a tick, to module 1 by the skip from module 3.
            back = t >= 2 * modules - 1 - i - (1 if i == 1 else 0)
            parts.append(text(x + side / 2 - 2, y + high / 2 + 3, f"F{frame} B{frame}" if back else f"F{frame}"))
    arrow = lambda a, b, dash="": (
        f'<line x1="{a[0] + 20}" y1="{a[1] - 12}" x2="{b[0] - 20}" y2="{b[1] + 12}" stroke="#888" stroke-width="1.5" {dash} marker-end="url(#tip)"/>'
    )
    parts.insert(0, '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto"><path d="M0,0 L7,3 L0,6 z" fill="#888"/></marker></defs>')
    for i in range(1, modules):
        parts.append(arrow(centre(i, i - 1), centre(i + 1, i)))
    parts.append(arrow(centre(1, 4), centre(3, 5), 'stroke-dasharray="5 3"'))
    y = top + high * modules + 40
    parts.append(text(left, y, "F3 B3: forward and backward on frame 3. Dashed: a skip over two modules takes one tick,", "start", "small"))
    parts.append(text(left, y + 16, "and brings a newer frame: here frame 4, to the module that works on frame 3.", "start", "small"))
    svg("ticks.svg", left + side * shown + 10, y + 28, parts)


def learning():
    """A dot a seed, a bar their mean."""
    rows = list(csv.DictReader(line for line in (HERE / "learning.csv").open() if not line.startswith("#")))
    names = list(dict.fromkeys(row["rule"] for row in rows))
    left, top, high, wide = 56, 24, 190, 92
    y = lambda percent: top + high * (1 - percent / 100)
    width = left + wide * len(names) + 16
    parts = [f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{y(p)}" y2="{y(p)}"/>' for p in (0, 25, 50, 75, 100)]
    parts += [text(left - 8, y(p) + 4, str(p), "end", "small") for p in (0, 25, 50, 75, 100)]
    parts.append(text(left - 8, 14, "test top-1, %", "start", "small"))
    parts.append(f'<line stroke="#e15759" stroke-dasharray="4 3" x1="{left}" x2="{width - 10}" y1="{y(12.5)}" y2="{y(12.5)}"/>')
    for n, name in enumerate(names):
        values = [float(row["top1"]) for row in rows if row["rule"] == name]
        mean, x = sum(values) / len(values), left + wide * n + wide / 2
        parts.append(f'<rect x="{x - 24}" width="48" y="{y(mean)}" height="{y(0) - y(mean)}" fill="{COLOURS[n % 8]}" fill-opacity="0.6"/>')
        step = 12
        for k, value in enumerate(values):
            parts.append(f'<circle cx="{x + step * (k - (len(values) - 1) / 2)}" cy="{y(value)}" r="3.5" fill="{COLOURS[n % 8]}"/>')
        for k, line in enumerate(name.split(" / ")):
            parts.append(text(x, y(0) + 18 + 15 * k, line, kind="small"))
    parts.append(text(width - 10, y(12.5) - 4, "chance", "end", "small"))
    svg("learning.svg", width, top + high + 56, parts)


if __name__ == "__main__":
    ticks()
    learning()

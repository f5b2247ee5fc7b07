"""Draws docs/pictures: the system, and what it reaches, from the table in README.md.

    python -m reference_tests.pictures

Plain SVG with colours for light and dark pages; the same text in, the same bytes out.
"""

from __future__ import annotations

import re
from html import escape

from harness.paths import ROOT

FOLDER = ROOT / "docs/pictures"
STYLE = """<style>
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e }
  .box { fill: #f6f8fa; stroke: #818b98 }
  .own { fill: #ddf4ff; stroke: #0969da }
  .bar { fill: #0969da } .low { fill: #818b98 }
  .line { stroke: #59636e; fill: none } .head { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 }
    .box { fill: #151b23; stroke: #656c76 }
    .own { fill: #121d2f; stroke: #4493f8 }
    .bar { fill: #4493f8 } .low { fill: #656c76 }
    .line { stroke: #9198a1 } .head { fill: #9198a1 }
  }
</style>"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, f"<title>{escape(title)}</title>", STYLE, *parts, "</svg>", ""])


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{kind} text-anchor="{anchor}">{escape(said)}</text>'


def box(x: float, y: float, width: float, lines: list[str], kind: str = "own") -> list[str]:
    """A box of 46 pixels with a line of text and a smaller one."""
    drawn = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="46" rx="6" class="{kind}"/>'
    middle = x + width / 2
    return [drawn, text(middle, y + 20, lines[0], anchor="middle"),
            text(middle, y + 36, lines[1], "small", "middle")]  # fmt: skip


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """Straight, to the right or down."""
    if y == to_y:
        tip = f"M{to_x - 7:g} {y - 4:g} L{to_x:g} {y:g} L{to_x - 7:g} {y + 4:g} Z"
    else:
        tip = f"M{x - 4:g} {to_y - 7:g} L{x:g} {to_y:g} L{x + 4:g} {to_y - 7:g} Z"
    return f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" class="line"/><path d="{tip}" class="head"/>'


def system() -> str:
    """What the katas make, and how a request goes through it."""
    parts = [text(20, 24, "a request", "small"), text(20, 204, "training and judging", "small")]
    top = [
        (20, 110, ["user", "history, genres"], "box"),
        (160, 130, ["two towers", "katas 01, 02"], "own"),
        (320, 120, ["index", "kata 09"], "own"),
        (470, 130, ["ranking model", "kata 04"], "own"),
        (630, 110, ["ten items", "over HTTP: 09"], "own"),
    ]
    for x, width, lines, kind in top:
        parts += box(x, 36, width, lines, kind)
    for x, to_x in ((130, 160), (290, 320), (440, 470), (600, 630)):
        parts.append(arrow(x, 59, to_x, 59))
    parts += [
        text(380, 100, "100 of all items", "small", "middle"),
        text(535, 100, "both looked at together", "small", "middle"),
    ]
    parts += box(20, 120, 110, ["texts", "titles, genres"], "box")
    parts += box(160, 120, 130, ["language model", "pooled: kata 08"])
    parts += [arrow(130, 143, 160, 143), '<path d="M225 120 L225 89" class="line"/>',
              '<path d="M221 89 L225 82 L229 89 Z" class="head"/>']  # fmt: skip
    low = [
        (20, 110, ["log", "user, item, time"], "box"),
        (160, 130, ["losses", "kata 03"], "own"),
        (320, 120, ["training loop", "kata 05"], "own"),
        (470, 130, ["evaluation", "kata 06"], "own"),
        (630, 110, ["compilation", "kata 07"], "own"),
    ]
    for x, width, lines, kind in low:
        parts += box(x, 216, width, lines, kind)
    for x, to_x in ((130, 160), (290, 320), (440, 470)):
        parts.append(arrow(x, 239, to_x, 239))
    parts.append(text(20, 290, "Blue is what you write; kata 10 is the whole.", "small"))
    return svg(760, 304, "The system: two towers, an index, a ranking model, a service", parts)


def results() -> list[tuple[str, float, float, float]]:
    """Name, mean, less and plus a standard deviation, of each row of README's table."""
    found = []
    row = r"^\| ([^|]+) \| (\.\d+)(?: \((\.\d+) to (\.\d+)\))? \|"
    for name, mean, low, high in re.findall(row, readme(), re.M):
        found.append((name.strip(), float(mean), float(low or mean), float(high or mean)))
    return found


def readme() -> str:
    """The section of the README that holds the table."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    return page.split("## What the finished system does\n")[1].split("\n## ")[0]


def bars() -> str:
    """The rows of the table as bars."""
    rows = results()
    scale = 420 / max(high for *_, high in rows)
    says = "NDCG@10 on ml-100k, all items ranked; the line is one standard deviation of seeds"
    parts = [text(12, 22, says, "small")]
    for place, (name, mean, low, high) in enumerate(rows):
        y = 36 + 28 * place
        kind = "low" if name.startswith("popularity") else "bar"
        parts += [
            text(172, y + 14, name, anchor="end"),
            f'<rect x="180" y="{y}" width="{mean * scale:.1f}" height="18" rx="2" class="{kind}"/>',
            f'<path d="M{180 + low * scale:.1f} {y + 9} H{180 + high * scale:.1f}" class="line"/>',
            text(190 + high * scale, y + 14, f"{mean:.4f}".lstrip("0")),
        ]
    return svg(680, 44 + 28 * len(rows), "What the system reaches, from the README's table", parts)


PICTURES = {"system.svg": system, "results.svg": bars}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(f"wrote {(FOLDER / name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""A report as one page for a browser: tables, maps and curves, no script and nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from lightning_deepr._version import __version__
from lightning_deepr.commands.compare import common, number, overlap, percent
from lightning_deepr.commands.drawings import chart, image
from lightning_deepr.commands.sources import Source, short
from lightning_deepr.hub.pictures import counts, per_input

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f6f7f9; --ink: #1b1f24; --soft: #5b6570; --rule: #d8dde3;
  --a: #0b62c4; --b: #b3460b; --bar: #dd6b20; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1d2126; --ink: #e7eaee; --soft: #a3adb8;
  --rule: #363d45; --a: #6fb2ff; --b: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1, h2, figcaption { overflow-wrap: anywhere; } td { overflow-wrap: break-word; } td + td { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p, figcaption, small, .soft { color: var(--soft); }

.runs { display: grid; gap: 1rem; }
.runs > section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 1rem; min-width: 0; }
@media (min-width: 56rem) { .runs.two { grid-template-columns: 1fr 1fr; } }
section h2 { margin-top: 0; }
.tag { display: inline-block; padding: 0 .5em; border-radius: 4px; color: var(--ground); font-weight: 600; }
.tag.a { background: var(--a); } .tag.b { background: var(--b); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; margin: .8rem 0; }
.tiles div { border: 1px solid var(--rule); border-radius: 6px; padding: .4rem .6rem; background: var(--ground); }
.tiles b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.bar { display: block; height: 4px; margin-top: 3px; background: var(--rule); border-radius: 2px; }
.bar i { display: block; height: 100%; min-width: 2px; background: var(--bar); border-radius: 2px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; margin-bottom: .2rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 100%), 1fr)); gap: 1rem; }
.map { display: block; width: 100%; height: auto; max-height: 22rem; border: 1px solid var(--rule);
  image-rendering: pixelated; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.6; } polyline.a { stroke: var(--a); }
polyline.b { stroke: var(--b); stroke-dasharray: 5 3; }
"""


def page(sources: Sequence[Source]) -> str:
    """Write the page of one network, or of two side by side.

    Args:
        sources: one or two.
    """
    title = " and ".join(one.name for one in sources)
    marks = ["a", "b"][: len(sources)]
    cards = "".join(_card(one, mark if len(sources) > 1 else "") for one, mark in zip(sources, marks, strict=True))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="runs{" two" * (len(sources) > 1)}">{cards}</div>',
        _common(*sources) if len(sources) > 1 else "",
        _curves(sources, marks),
        _settings(sources),
        f"<p><small>lightning-deepr {__version__}</small></p>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: connectivity</title><style>{_STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def _card(source: Source, mark: str) -> str:
    tag = f'<span class="tag {mark}">{mark.upper()}</span> ' if mark else ""
    total, active = source.report.total, source.report.active
    tiles = [("connectivity", percent(source.connectivity, "dense"))]
    if active:
        tiles.append(("connections", f"{active:,}"))
    tiles += [(name, f"{value:.4g}") for name, value in list(source.metrics.items())[:4]]
    tiles.append(("file, bytes", f"{source.bytes:,}"))
    shown = "".join(f'<div><span class="soft">{escape(name)}</span><b>{escape(value)}</b></div>' for name, value in tiles)
    head = f"<h2>{tag}{escape(source.name)}</h2><p>{escape(source.kind)}"
    head += f", {active:,} of {total:,} weights</p>" if active else ", all weights are dense</p>"
    return f'<section>{head}<div class="tiles">{shown}</div>{_tensors(source)}{_maps(source)}</section>'


def _tensors(source: Source) -> str:
    rows = []
    for row in source.report:
        share = row["connectivity"]
        bar = f'<span class="bar"><i style="width:{100 * share:.2f}%"></i></span>'
        shape = "x".join(map(str, row["shape"]))
        rows.append(
            f'<tr><td>{escape(row["name"])} <small>{shape}</small>{bar}</td><td class="n">{row["active"]:,}</td>'
            f'<td class="n">{share:.2%}</td>{_unconnected(row["shape"], source.places.get(row["name"]))}</tr>'
        )
    if not rows:
        return ""
    heads = '<th>tensor</th><th class="n">K</th><th class="n">K / N</th><th class="n">unused in / out</th>'
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _unconnected(shape: tuple[int, ...], places: Tensor | None) -> str:
    """Count the columns and rows of a weight without a connection: inputs that nothing reads, outputs that read nothing."""
    if places is None or len(shape) < 2:
        return '<td class="n">-</td>'
    columns = math.prod(shape[1:])
    inputs, outputs = columns - len(torch.unique(places % columns)), shape[0] - len(torch.unique(places // columns))
    return f'<td class="n">{inputs:,} / {outputs:,}</td>'


def _maps(source: Source) -> str:
    figures: list[str] = []
    for row in source.report:
        places = source.places.get(row["name"])
        if places is None or len(row["shape"]) < 2:
            continue
        found = per_input(row["shape"], places)
        if found is not None and not figures:
            says = f"{int((found == 0).sum())} of {found.size} pixels have none, at most {int(found.max())}"
            figures.append(_figure(f"connections per pixel of {row['name']}: {says}", image(found, says)))
        cells, (tall, wide) = counts(row["shape"], places)
        says = f"outputs down, inputs across, {tall} x {wide} weights per cell; the fullest has {int(cells.max())} connections"
        figures.append(_figure(f"{row['name']}: {says}", image(cells, says)))
    return f'<h3>Where the connections are</h3><div class="maps">{"".join(figures)}</div>' if figures else ""


def _figure(caption: str, content: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _common(first: Source, second: Source) -> str:
    tensors = common(first, second)
    if not any(one.common is not None for one in tensors):
        return ""
    rows = "".join(
        f'<tr><td>{escape(one.name)}</td><td class="n">{number(one.first)}</td><td class="n">{number(one.second)}</td>'
        f'<td class="n">{number(one.common)}</td><td class="n">{percent(one.overlap)}</td>'
        f'<td class="n">{percent(one.by_chance)}</td></tr>'
        for one in tensors
    )
    heads = "".join(f'<th class="n">{head}</th>' for head in ("A", "B", "common", "overlap", "by chance"))
    found = overlap(tensors)
    line = f"<p>{percent(found)} of the smaller network's connections are in both.</p>" if found is not None else ""
    return f'<h2>Common connections</h2>{line}<div class="scroll"><table><tr><th>tensor</th>{heads}</tr>{rows}</table></div>'


def _curves(sources: Sequence[Source], marks: Sequence[str]) -> str:
    curves = [one.curves() for one in sources]
    names = list(dict.fromkeys(name for found in curves for name in found))
    # A test is no curve. The whole network comes before single tensors.
    whole = [name for name in names if name.count("/") <= 1 and not name.startswith("test")]
    chosen = sorted(whole, key=lambda name: ("/" in name, names.index(name)))
    chosen += [name for name in names if name.count("/") > 1 and name.endswith("/turnover")]
    charts = []
    for name in chosen:
        lines = {}
        for mark, found in zip(marks, curves, strict=True):
            line = [(x, y) for x, y in found.get(name, []) if math.isfinite(y)]
            if len(line) > 1:
                lines[mark] = line
        if lines:
            charts.append(chart(name, lines))
    legend = '<p><span class="tag a">A</span> solid, <span class="tag b">B</span> dashed</p>' if len(sources) > 1 else ""
    return f'<h2>Over the training</h2>{legend}<div class="figures">{"".join(charts[:12])}</div>' if charts else ""


def _settings(sources: Sequence[Source]) -> str:
    keys = list(dict.fromkeys(key for one in sources for key in one.settings))
    if not keys:
        return ""
    heads = "".join(f"<th>{mark}</th>" for mark in "AB") if len(sources) > 1 else "<th>value</th>"
    rows = []
    for key in keys:
        cells = "".join(f"<td>{escape(short(one.settings[key])) if key in one.settings else '-'}</td>" for one in sources)
        rows.append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    return f'<h2>Settings</h2><div class="scroll"><table><tr><th>setting</th>{heads}</tr>{"".join(rows)}</table></div>'

"""Pictures in a page: line charts as SVG, maps as PNG inside the page. Both are readable on a light and on a dark ground."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_INK = (221, 107, 32)  # of the maps: seen on white and on black


def png(values: np.ndarray) -> bytes:
    """Write a map as a PNG of one colour whose opacity is the value.

    Args:
        values: [rows, columns], at least 0; the largest is opaque.
    """
    top = float(values.max()) if values.size else 0.0
    # the square root shows rare connections, too
    alpha = np.zeros(values.shape, np.uint8) if top <= 0 else (np.sqrt(values / top) * 255).round().astype(np.uint8)
    rows, columns = values.shape
    pixels = np.empty((rows, columns, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = _INK, alpha
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def image(values: np.ndarray, says: str) -> str:
    """Return a map as an element of the page, with a text for those who do not see it."""
    data = base64.b64encode(png(values)).decode("ascii")
    return f'<img class="map" alt="{escape(says)}" src="data:image/png;base64,{data}">'


def chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw curves over the steps.

    Args:
        title: the name of the metric.
        lines: {class of the line ("a" | "b"): [(step, value)]}, finite values.
    """
    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    wide, tall, margin, foot = 320, 150, 52, 22

    def place(x: float, y: float) -> str:
        across = margin + (x - left) / ((right - left) or 1) * (wide - margin - 8)
        return f"{across:.1f},{8 + (high - y) / (high - low) * (tall - foot - 16):.1f}"

    parts = [f'<svg viewBox="0 0 {wide} {tall}" role="img" aria-label="{escape(_says(title, lines))}">']
    for value in (high, (low + high) / 2, low):
        y = float(place(left, value).split(",")[1])
        parts.append(f'<line class="grid" x1="{margin}" x2="{wide - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{margin - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{margin}" y="{tall - 4}">step {left:g}</text>')
    parts.append(f'<text x="{wide - 8}" y="{tall - 4}" text-anchor="end">{right:g}</text>')
    for kind, line in lines.items():
        drawn = " ".join(place(x, y) for x, y in thinned(line))
        parts.append(f'<polyline class="{kind}" points="{drawn}"/>')
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def _says(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    ends = ", ".join(f"{kind.upper()} {line[0][1]:.3g} to {line[-1][1]:.3g}" for kind, line in lines.items())
    return f"{title} over the steps: {ends}"


def thinned(line: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """Average neighbours, so that a long curve has at most ``most`` points."""
    size = math.ceil(len(line) / most)
    if size <= 1:
        return list(line)
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]

"""A loss curve as an SVG picture, drawn by hand: it needs no library."""

from __future__ import annotations

from pathlib import Path

from ckptconv.trainer.run import History

WIDTH, HEIGHT, MARGIN = 640, 360, 48


def draw(history: History, path: Path) -> None:
    """Loss over steps, with the extremes of both written at the axes."""
    if path.suffix != ".svg":
        raise ValueError(f"{path}: the curve is drawn as SVG; call it {path.with_suffix('.svg')}")
    losses = history.losses
    if not losses:
        raise ValueError(f"{path}: no step was made, so there is no curve")
    low, high = min(losses), max(losses)
    across, up = max(len(losses) - 1, 1), high - low or 1.0
    points = " ".join(
        f"{MARGIN + i * (WIDTH - 2 * MARGIN) / across:.1f},{MARGIN + (high - loss) * (HEIGHT - 2 * MARGIN) / up:.1f}"
        for i, loss in enumerate(losses)
    )
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="black"/>',
        f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="2"/>',
        f'<text x="4" y="{MARGIN}">{high:.3f}</text><text x="4" y="{bottom}">{low:.3f}</text>',
        f'<text x="{MARGIN}" y="{bottom + 18}">step {history.start + 1}</text>',
        f'<text x="{right}" y="{bottom + 18}" text-anchor="end">step {history.start + len(losses)}</text>',
        "</svg>",
    ]
    path.write_text("\n".join(lines) + "\n")

"""A picture of why Llama 4 reaches ten million tokens: memory of keys and values against context, as one HTML page."""

import math
from pathlib import Path

from l4jax import report
from l4jax.config import TextConfig

CONTEXTS = [1 << power for power in range(13, 24)] + [10_485_760]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 860, 420, 76, 42, 20, 150
DEVICES = ((16, "v5e, 16 GB"), (32, "v6e, 32 GB"), (95, "v5p, 95 GB"), (8 * 95, "8 x v5p"))


def cache_bytes(text: TextConfig, context: int, *, chunk_aware: bool, bits: int = 16) -> int:
    """Returns the bytes of keys and values of one sequence."""
    per_slot = 2 * text.num_key_value_heads * text.head_dim * bits // 8
    chunk = text.attention_chunk_size
    total = 0
    for layer in range(text.num_hidden_layers):
        forgets = chunk_aware and chunk is not None and text.uses_rope(layer)
        total += per_slot * (min(chunk, context) if forgets else context)
    return total


def write_page(path: Path, name: str, text: TextConfig) -> None:
    """Writes the page."""
    lines = [
        ("every layer keeps everything", "#b5562b", lambda n: cache_bytes(text, n, chunk_aware=False)),
        ("chunked layers keep a chunk", report.ACCENT, lambda n: cache_bytes(text, n, chunk_aware=True)),
        ("the same in int8", "#7aa7d9", lambda n: cache_bytes(text, n, chunk_aware=True, bits=8)),
    ]
    chunked = sum(map(text.uses_rope, range(text.num_hidden_layers)))
    rows = [(f"{context:,}", *(f"{line(context) / 1e9:,.1f}" for _, _, line in lines)) for context in CONTEXTS]
    longest = CONTEXTS[-1]
    report.write_report(
        path,
        title=f"Keys and values of {name}",
        subtitle=f"{chunked} of {text.num_hidden_layers} layers attend inside chunks of "
        f"{text.attention_chunk_size or 0:,} tokens and need not remember more; the others see everything.",
        numbers=[
            (f"{lines[0][2](longest) / 1e9:,.0f} GB", "for 10 million tokens if every layer keeps everything"),
            (f"{lines[1][2](longest) / 1e9:,.0f} GB", "if chunked layers keep one chunk"),
            (f"{lines[0][2](longest) / lines[1][2](longest):.1f} x", "less"),
        ],
        sections=[
            report.section("Memory of one sequence", "Both axes are logarithmic.", chart(lines)),
            report.section(
                "In numbers", "GB of one sequence.", report.table(("tokens", *(n for n, _, _ in lines)), rows)
            ),
        ],
    )


def chart(lines) -> str:
    """Returns the curves, and what devices hold, as a figure."""
    low_x, high_x = math.log2(CONTEXTS[0]), math.log2(CONTEXTS[-1])
    low_y, high_y = -1.0, 3.6  # powers of ten of GB

    def place(context: float, gigabytes: float) -> tuple[float, float]:
        x = LEFT + (math.log2(context) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (math.log10(gigabytes) - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return x, y

    parts = []
    for power in range(-1, 4):
        x, y = place(CONTEXTS[0], 10.0**power)
        parts.append(f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{report.GRID}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} GB</text>')
    for context, label in ((8192, "8k"), (1 << 15, "32k"), (1 << 17, "128k"), (1 << 20, "1M"), (10_485_760, "10M")):
        x, _ = place(context, 1)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{label}</text>')
    for gigabytes, label in DEVICES:
        x, y = place(CONTEXTS[-1], gigabytes)
        parts.append(
            f'<line x1="{LEFT}" x2="{x:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{report.EDGE}" stroke-dasharray="3 4"/>'
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{report.escape(label)}</text>'
        )
    for index, (name, colour, line) in enumerate(lines):
        points = " ".join("{:.1f},{:.1f}".format(*place(n, line(n) / 1e9)) for n in CONTEXTS)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{LEFT + 14}" y="{TOP + 6 + 20 * index}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 36}" y="{TOP + 12 + 20 * index}">{report.escape(name)}</text>')
    return report.figure(WIDTH, HEIGHT, parts, "bytes of keys and values against tokens of context")

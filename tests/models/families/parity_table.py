"""Writes the parity table of docs/models.md from the golden models:

python -m tests.models.families.parity_table
"""

import json
import math
from pathlib import Path

import numpy as np

from tests.models.families.test_parity import NAMES, golden, logits_of, opened

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


def error(name: str, dtype: str) -> float:
    """Largest difference of logits, of the largest logit."""
    wanted = golden(name)["logits"]
    return float(np.abs(logits_of(name, dtype) - wanted).max() / np.abs(wanted).max())


def shape(name: str) -> str:
    """What is odd about a golden model, in a few words."""
    values = json.loads(golden(name)["config"].tobytes())
    _, config, _ = opened(name)
    block = config.stacks[-1].pattern[-1]
    attention = block.attention
    said = [f"{config.depth} layers of {config.width}", f"{attention.heads} heads"]
    if hasattr(attention, "kv_heads"):
        said.append(f"{attention.kv_heads} kv of {attention.head_size}")
    rope = getattr(attention, "rope", None)
    said.append("no rotation" if rope is None else f"rope {rope.scaling}")
    said += [word for word, yes in (
        ("tied", config.tie_embeddings), ("biases", getattr(attention, "qkv_bias", False)),
        ("window", any(getattr(b.attention, "window", None) for s in config.stacks for b in s.pattern)),
        ("sinks", getattr(attention, "sinks", False)),
        (f"{values.get('num_experts') or values.get('num_local_experts') or values.get('n_routed_experts')} experts",
         hasattr(block.feed_forward, "experts")),
    ) if yes]  # fmt: skip
    return ", ".join(said)


def rounded_up(value: float) -> str:
    """One digit, rounded up: 3e-06."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(value))
    digit = math.ceil(value / 10**power - 1e-9)
    return f"{digit if digit < 10 else 1}e{power if digit < 10 else power + 1:+03d}"


def rows() -> list[str]:
    """The table."""
    lines = ["| family | model | shape | float32 | bfloat16 |", "|---|---|---|---|---|"]
    for name in sorted(NAMES, key=lambda name: (opened(name)[0].name, name)):
        family = opened(name)[0].name
        cells = (rounded_up(error(name, dtype)) for dtype in ("float32", "bfloat16"))
        lines.append(f"| {family} | {name} | {shape(name)} | {' | '.join(cells)} |")
    return lines


def listed(page: str) -> list[str]:
    """Names of the golden models in a page's table."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    return [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| ")][1:]


def main() -> None:
    """Rewrite the table."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(rows()) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

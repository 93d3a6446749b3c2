"""Compile time and program size of a training step by depth: neither grows, since layers are a scanned axis.

    python benchmarks/compile_depth.py                      # on this machine, 2 against 32 layers
    python benchmarks/compile_depth.py --depths 2 8 32 80 --json depth.json

Each depth is lowered and compiled `--rounds` times in turn, without a compilation cache; medians are compared.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LENGTH, ROWS = 256, 4


def compile_step(depth: int) -> dict[str, float]:
    """Trace, lower and compile the step of a model of `depth` layers; seconds, equations, bytes of program."""
    import jax

    from maxstack import sharding
    from maxstack.models import llama
    from maxstack.optim import OptimConfig
    from maxstack.train import state as states
    from maxstack.train.losses import pretrain
    from maxstack.train.step import SafetyConfig, abstract_batch, train_step

    jax.clear_caches()
    model = llama(
        vocab_size=4096, width=256, depth=depth, heads=4, kv_heads=2, feed_forward=512, max_length=LENGTH,
        dtype="float32", remat="attention",
    )  # fmt: skip
    optim = OptimConfig()
    mesh = sharding.build_mesh(sharding.MeshConfig(), jax.devices()[:1])
    plan = states.layout(model, optim, mesh, zero=3, steps=100)
    step = train_step(plan, pretrain, optim, SafetyConfig(), 0.0, 100)
    batch, state = abstract_batch(plan, 1, ROWS, LENGTH), plan.abstract(model)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        traced = jax.jit(step, donate_argnums=0).trace(state, batch)
        lowered = traced.lower()
        traced_s = time.perf_counter() - start
        compiled = lowered.compile()
    return {
        "trace_seconds": traced_s,
        "seconds": time.perf_counter() - start,
        "program_bytes": len(lowered.as_text()),
        "compiled_bytes": len(compiled.as_text() or ""),
    }


def measure(depths: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """Medians by depth; the depths take turns so that a disturbance meets all of them."""
    compile_step(depths[0])  # imports and first-use costs belong to no depth
    found: dict[int, list[dict[str, float]]] = {depth: [] for depth in depths}
    for _ in range(rounds):
        for depth in depths:
            found[depth].append(compile_step(depth))
    return {
        depth: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for depth, each in found.items()
    }


def table(results: dict[int, dict[str, float]]) -> str:
    """Markdown; every figure as a ratio to the first depth."""
    base = next(iter(results.values()))
    lines = ["| layers | trace | trace and compile | StableHLO | compiled |", "|---|---|---|---|---|"]
    for depth, row in results.items():
        cells = [f"{row[key] / base[key]:.2f}" for key in row]
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", help="file for all figures")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    results: dict[int, Any] = measure(args.depths, args.rounds)
    print(table(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""Time and peak memory of loading a model folder, ours beside transformers on PyTorch, taking turns.

A random model of 1.5 billion parameters (Qwen2.5's shape) is written once as bfloat16 safetensors; each side loads it
in a fresh process, to float32 arrays that have been touched:

    python benchmarks/load_model.py --torch-python PATH/TO/python --rounds 3
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = """
import sys, time, json, resource
sys.path.insert(0, {root!r})
import jax, maxstack
from maxstack.models import tree
jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
model, _ = maxstack.load({folder!r}, dtype="float32")
leaves = tree.leaves(model)
jax.block_until_ready(list(leaves.values()))
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
                  "bytes": sum(a.nbytes for a in leaves.values())}}))
"""
THEIRS = """
import time, json, resource
import torch, transformers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
total = sum(p.numel() * p.element_size() for p in model.parameters())
for p in model.parameters():
    p.view(-1)[::1024].sum()
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
                  "bytes": total}}))
"""


def write_model(folder: Path, depth: int) -> None:
    """A random model of Qwen2.5-1.5B's shape, in bfloat16, at a folder that is not there yet."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    import maxstack
    from maxstack.models.presets import llama

    config = llama(
        vocab_size=151_936,
        width=1536,
        depth=depth,
        heads=12,
        kv_heads=2,
        feed_forward=8960,
        tie_embeddings=True,
    )
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), jax.jit(config.build)(jax.random.key(0)))
    maxstack.save(model, None, folder, dtype="bfloat16")


def read(python: str, script: str) -> dict[str, float]:
    """What a fresh process prints."""
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch and transformers; without it, ours alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=28, help="layers (28 makes 1.5 billion parameters)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import load_model; "
             f"load_model.write_model(load_model.Path({str(folder)!r}), {args.depth})"], check=True,
        )  # fmt: skip
        sides = {"ours": (sys.executable, OURS.format(root=str(ROOT), folder=str(folder)))}
        if args.torch_python:
            sides["transformers"] = (args.torch_python, THEIRS.format(folder=str(folder)))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, (python, script) in sides.items():
                found[side].append(read(python, script))
    result = {
        side: {"seconds": statistics.median(r["seconds"] for r in rows),
               "peak_over_weights": max(r["peak"] / r["bytes"] for r in rows)}
        for side, rows in found.items()
    }  # fmt: skip
    for side, row in result.items():
        print(f"{side:14} peak memory {row['peak_over_weights']:.2f} x the weights", end="")
        print(
            ""
            if side == "ours"
            else f", ours takes {result['ours']['seconds'] / row['seconds']:.2f} of its time"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

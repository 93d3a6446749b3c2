"""Attention and cross-entropy on this CPU beside jax's own and PyTorch's, taking turns in one run.

    python benchmarks/kernels_cpu.py --torch-python OTHER/bin/python

Float32; causal attention of one row with 8 query and 2 kv heads of 64, forward alone and with all gradients; the loss
over a vocabulary of 152,064 with both gradients. Each contender is a process of its own. Prints ratios to ours of the
medians, and of the memory that a call takes at its peak beyond arguments and results (the rise of the process's
resident memory). `python benchmarks/kernels.py` is for accelerators.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import Contender  # beside this file

HEADS, KV_HEADS, SIZE = 8, 2, 64
TOKENS, WIDTH, VOCABULARY = 2048, 576, 152_064
CASES = [
    *(f"attention {length} {what}" for length in (2048, 8192) for what in ("forward", "gradients")),
    "loss 2048 all", "loss 2048 fifth",
]  # fmt: skip
NAMES = {"maxstack": "ours", "jax": "jax.nn / whole logits", "torch": "PyTorch"}


def resident(field: str) -> int:
    """Bytes of this process's resident memory: VmRSS now, VmHWM at most since `forget`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget() -> None:
    """Give freed memory back, and make VmHWM start again from what is resident now (proc(5), clear_refs)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def jax_call(who: str, case: str) -> tuple[Callable[[], Any], int]:
    """A compiled call of the case, and the bytes of its results."""
    import jax

    from maxstack.bench import kernels

    kind, size, what = case.split()
    if kind == "attention":
        function = kernels.attention if who == "maxstack" else kernels.jax_attention
        call = kernels.attention_call(function, int(size), HEADS, KV_HEADS, SIZE, what == "gradients")
    else:
        function = kernels.ours_loss if who == "maxstack" else kernels.plain_loss
        supervised = 1.0 if what == "all" else 0.2
        call = kernels.cross_entropy_call(function, TOKENS, WIDTH, VOCABULARY, supervised)
    results = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(call())))
    return lambda: jax.block_until_ready(call()), results


def torch_call(case: str) -> tuple[Callable[[], Any], int]:
    """The same in PyTorch."""
    import torch  # type: ignore[import-not-found]  # of the other interpreter
    import torch.nn.functional as F  # type: ignore[import-not-found]

    kind, size, what = case.split()
    torch.manual_seed(0)
    if kind == "loss":
        x, w = (
            torch.randn(TOKENS, WIDTH, requires_grad=True),
            torch.randn(WIDTH, VOCABULARY, requires_grad=True),
        )
        labels = torch.randint(0, VOCABULARY, (TOKENS,))
        kept = torch.rand(TOKENS) < (1.0 if what == "all" else 0.2)

        def loss() -> Any:
            # What one writes: all logits, masked labels ignored.
            value = F.cross_entropy(x @ w, labels.masked_fill(~kept, -100), reduction="sum")
            return torch.autograd.grad(value, (x, w))

        return loss, 4 * (x.numel() + w.numel())
    shapes = [(1, heads, int(size), SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(*shape, requires_grad=what == "gradients") for shape in shapes)
    weights = torch.randn(1, HEADS, int(size), SIZE)

    def attend() -> Any:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad((out * weights).sum(), (q, k, v)) if what == "gradients" else out

    return attend, 4 * (q.numel() + (k.numel() + v.numel() if what == "gradients" else 0))


def serve(who: str) -> None:
    """Answer lines: `prepare CASE` makes it the present case and tells its memory, `run` tells seconds."""
    print(json.dumps({"ready": True}), flush=True)
    call: Callable[[], Any] = lambda: None  # noqa: E731
    for line in sys.stdin:
        verb, _, case = line.strip().partition(" ")
        if verb == "prepare":
            call, results = torch_call(case) if who == "torch" else jax_call(who, case)
            call()
            forget()
            before = resident("VmRSS")
            call()
            answer = {"bytes": max(0, resident("VmHWM") - before - results)}
        else:
            start = time.perf_counter()
            call()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


def contenders(torch_python: str) -> list[Contender]:
    found = [Contender(name, [sys.executable, __file__, "--serve", name]) for name in ("maxstack", "jax")]
    if torch_python:
        found.append(Contender("torch", [torch_python, __file__, "--serve", "torch"]))
    return found


def compare(case: str, all_: list[Contender], rounds: int) -> dict[str, Any]:
    """Seconds of each turn and peak bytes, by contender."""
    peak = {one.name: one.ask(f"prepare {case}")["bytes"] for one in all_}
    took: dict[str, list[float]] = {one.name: [] for one in all_}
    for _ in range(rounds):
        for one in all_:
            took[one.name].append(one.ask("run")["seconds"])
    return {"case": case, "seconds": took, "bytes": peak}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: others / ours, above 1 where ours takes less."""
    names = [name for name in rows[0]["seconds"] if name != "maxstack"]
    head = ["case", *(f"time, {NAMES[n]} / ours" for n in names), "memory of ours, MB"]
    head += [f"memory, {NAMES[n]} / ours" for n in names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ours = statistics.median(row["seconds"]["maxstack"])
        ours_bytes = max(row["bytes"]["maxstack"], 1 << 20)
        cells = [row["case"], *(f"{statistics.median(row['seconds'][n]) / ours:.2f}" for n in names)]
        cells += [f"{row['bytes']['maxstack'] / 1e6:.0f}"]
        cells += [f"{row['bytes'][n] / ours_bytes:.1f}" for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default="", help="interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender; medians are shown")
    parser.add_argument("--only", default="", help="cases whose name starts so")
    parser.add_argument("--json", default="", help="file for all figures")
    parser.add_argument("--serve", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    all_ = contenders(args.torch_python)
    rows = []
    for case in CASES:
        if case.startswith(args.only):
            rows.append(compare(case, all_, args.rounds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Training speed and peak memory on this CPU beside PyTorch, taking turns step by step in one run.

    python benchmarks/train_cpu.py --torch-python OTHER/bin/python --sizes 30m 135m --dtypes bf16 f32 --json out.json

Every contender is a process of its own that stays loaded and does one step when asked: maxstack's compiled trainer
step (gradients, norm, check, clip, AdamW), and `torch_train.py`, eager and compiled. Peak memory is the highest
resident size of the process while it steps, compilation left out. Prints a markdown table.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from turns import Contender  # beside this file

LENGTH, ROWS = 512, 8
SIZES: dict[str, dict[str, int]] = {
    "30m": {
        "d": 512, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 64, "ff": 1280, "vocabulary": 16_384,
    },
    # The shape of SmolLM2-135M.
    "135m": {
        "d": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "ff": 1536, "vocabulary": 49_152,
    },
}  # fmt: skip
CONTENDERS = ("maxstack", "before", "eager", "compile")


def resident_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since it was last cleared) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 2**20


def build(args: argparse.Namespace) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The trainer's compiled step, its first state and a batch of random tokens, as a run would make them."""
    import jax
    import numpy as np

    from maxstack import sharding
    from maxstack.data.batch import Batch
    from maxstack.models import llama
    from maxstack.optim import OptimConfig, ScheduleConfig
    from maxstack.train import state as states
    from maxstack.train.losses import pretrain
    from maxstack.train.step import SafetyConfig, abstract_batch, compiled, train_step

    shape = SIZES[args.size]
    model = llama(
        vocab_size=shape["vocabulary"], width=shape["d"], depth=shape["layers"], heads=shape["heads"],
        kv_heads=shape["kv_heads"], head_size=shape["head_dim"], feed_forward=shape["ff"], max_length=LENGTH,
        dtype="bfloat16" if args.dtype == "bf16" else "float32", remat=args.remat,
    )  # fmt: skip
    optim = OptimConfig(schedule=ScheduleConfig(kind="constant", warmup_steps=0), decay_embeddings=True)
    mesh = sharding.build_mesh(sharding.MeshConfig(), jax.devices()[:1])
    plan = states.layout(model, optim, mesh, zero=3, steps=1000)
    state = states.create(plan, model, seed=0)
    start = time.perf_counter()
    step = train_step(plan, pretrain, optim, SafetyConfig(), 0.0, 1000)
    rows = ROWS // args.accumulation
    advance = compiled(plan, step, abstract_batch(plan, args.accumulation, rows, LENGTH), state)
    report = {
        "framework": f"jax {jax.__version__}", "compile_seconds": time.perf_counter() - start,
        "parameters": sum(leaf.size for leaf in state.params.values()),
        "temporaries_gib": getattr(advance.memory_analysis(), "temp_size_in_bytes", 0) / 2**30,
    }  # fmt: skip
    if args.dump:
        Path(args.dump).write_text(advance.as_text() or "")
    ids = np.random.default_rng(0).integers(shape["vocabulary"], size=(args.accumulation, rows, LENGTH + 1))
    ids = ids.astype(np.int32)
    ones = np.ones_like(ids[..., 1:])
    where = sharding.batch_sharding(mesh, leading=1)
    positions = ones * np.arange(LENGTH, dtype=np.int32)
    local = Batch(ids[..., :-1], ids[..., 1:], ones, positions, ones.astype(np.float32))
    batch = sharding.global_arrays(where, Batch(*map(np.ascontiguousarray, local)), local.tokens.shape)
    return advance, state, batch, report


def serve(args: argparse.Namespace) -> None:
    """Do one step for each line on standard input; the same protocol as `torch_train.py --serve`."""
    import jax

    advance, state, batch, report = build(args)
    losses = []
    for _ in range(args.warmup):
        state, metrics = advance(state, batch)
        losses.append(float(metrics["loss"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, without that of compilation
    print(json.dumps({"ready": True}), flush=True)
    if args.profile:
        jax.profiler.start_trace(args.profile)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        state, metrics = advance(state, batch)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        print(json.dumps(took), flush=True)
    if args.profile:
        jax.profiler.stop_trace()
    used = resource.getrusage(resource.RUSAGE_SELF)
    report |= {
        "first_loss": losses[0], "last_loss": losses[-1], "peak_rss_gib": resident_gib("VmHWM"),
        "lifetime_peak_rss_gib": used.ru_maxrss / 2**20,
    }  # fmt: skip
    print(json.dumps(report), flush=True)


class Trainer(Contender):
    """A process that does a step when asked. "before" is the same benchmark of another checkout, `args.before`."""

    def __init__(self, name: str, size: str, dtype: str, args: argparse.Namespace):
        self.took, here = [], Path(__file__).resolve().parent
        shared = ["--dtype", dtype, "--accumulation", str(args.accumulation), "--warmup", str(args.warmup)]
        place = here.parent
        if name in ("maxstack", "before"):
            place = Path(args.before).resolve() if name == "before" else place
            extra = ["--dump", args.dump, "--profile", args.profile, "--remat", args.remat]
            script = str(place / "benchmarks" / Path(__file__).name)
            command = [sys.executable, script, "--serve", "--sizes", size, *extra, *shared]
        else:
            shape = SIZES[size] | {"length": LENGTH, "rows": ROWS // args.accumulation}
            flags = [part for key, n in shape.items() for part in (f"--{key.replace('_', '-')}", str(n))]
            script = str(here / "torch_train.py")
            command = [args.torch_python, script, "--serve", "--mode", name, *flags, *shared]
        super().__init__(name, command, place)

    def step(self) -> None:
        """One more step."""
        self.took.append(self.ask("step"))

    def report(self) -> dict[str, Any]:
        """What it says at its end, and how long its steps took."""
        self.stdin.close()
        report = self.read()
        self.process.wait()
        seconds, cpu = ([took[key] for took in self.took] for key in ("seconds", "cpu_seconds"))
        per_second = ROWS * LENGTH / statistics.median(seconds)
        return report | {"tokens_per_second": per_second, "seconds": seconds, "cpu_seconds": cpu}


def compare(size: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One size and type: every contender warmed up, then `rounds` rounds of a step each."""
    contenders = [Trainer(name, size, dtype, args) for name in args.contenders]
    for _ in range(args.rounds):
        for contender in contenders:
            contender.step()
    reports = {contender.name: contender.report() for contender in contenders}
    row: dict[str, Any] = {"size": size, "dtype": dtype, "contenders": reports}
    peers = [report for name, report in reports.items() if name != "maxstack"]
    if "maxstack" in reports and peers:
        ours, best = reports["maxstack"], max(peers, key=lambda r: r["tokens_per_second"])
        # Of the same round, so that a disturbance of the machine meets both.
        ratios = [b / a for a, b in zip(ours["seconds"], best["seconds"], strict=True)]
        row |= {"speed_ratio": statistics.median(ratios), "best_peer": best.get("mode", "before")}
        row["memory_ratio"] = ours["peak_rss_gib"] / best["peak_rss_gib"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: tokens/s and peak GiB of each, ratios against the faster peer."""
    names = list(rows[0]["contenders"])
    head = [
        "model", "type", *(f"{n} tok/s" for n in names), "ratio", *(f"{n} GiB" for n in names), "ratio",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        reports = row["contenders"].values()
        cells = [f"{next(iter(reports))['parameters'] / 1e6:.1f}M", row["dtype"]]
        cells += [f"{r['tokens_per_second']:.0f}" for r in reports] + [f"{row.get('speed_ratio', 0):.2f}"]
        cells += [f"{r['peak_rss_gib']:.2f}" for r in reports] + [f"{row.get('memory_ratio', 0):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["30m"])
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "f32"), default=["bf16", "f32"])
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=["maxstack", "eager", "compile"]
    )
    parser.add_argument(
        "--before", default="", help="another checkout of this repository, for that contender"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first timed one")
    parser.add_argument(
        "--accumulation", type=int, default=1, help="micro-batches a step, for all contenders"
    )
    parser.add_argument("--remat", default="dots", help="maxstack's rematerialisation policy")
    parser.add_argument("--dump", default="", help="file for maxstack's compiled program")
    parser.add_argument("--profile", default="", help="folder for a JAX trace of maxstack's timed steps")
    parser.add_argument("--json", default="", help="file for all figures")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bf16", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        args.size = args.sizes[0]
        serve(args)
        return
    rows = [compare(size, dtype, args) for size in args.sizes for dtype in args.dtypes]
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Our server beside llama.cpp and transformers on this CPU: the same requests, the same threads, in turns.

    python benchmarks/serve_cpu.py --models FOLDER --write-models          (once: the model for all three)
    python benchmarks/serve_cpu.py --models FOLDER --llama-python A/bin/python --torch-python B/bin/python --json F.json

SmolLM2-135M-Instruct, prompts and answers of ShareGPT's lengths, every answer exactly as long as asked for (no end
token), 1, 8 and 32 requests at once. Each turn is a process of its own: it loads, warms up, and answers one trace
after the other. llama.cpp runs by its own batch interface with continuous batching (what its server does, without
HTTP), transformers with static batches and, where it works, with its continuous batching. Ours runs as an engine alone
and as `maxstack serve` under `maxstack bench serve`'s clients.

Results are kept in --json after each turn, and a turn whose result is there is not run again: the same command goes on
where it was interrupted. `--quick` has short lengths and few requests, to see that everything runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxstack.bench.serve.asks import drawn, write_trace
from maxstack.config import write_atomically
from maxstack.serve.load import SHAREGPT_ANSWER, SHAREGPT_PROMPT, Lengths, Load

HERE = Path(__file__).resolve().parent
VOCABULARY = 49_152
MODEL = "smollm2-135m-instruct"
REQUESTS = {1: 8, 8: 48, 32: 96}
"""By how many are at once: a run of some minutes for the slowest."""
QUICK_REQUESTS = {1: 2, 8: 10, 32: 34}
SHARED = "shared"
LIMIT_S = 3600


@dataclass(frozen=True)
class Turn:
    """One process: who, and which traces."""

    name: str
    command: tuple[str, ...]
    traces: tuple[str, ...]


def lengths(quick: bool) -> tuple[Lengths, Lengths]:
    """Of prompts and answers."""
    if quick:
        return Lengths(mean=40, sigma=0.8, least=4, most=100), Lengths(mean=12, sigma=0.8, least=2, most=24)
    return SHAREGPT_PROMPT, SHAREGPT_ANSWER


def write_traces(folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """The requests as files, the same each time."""
    prompt, answer = lengths(args.quick)
    files = {}
    for at_once in args.at_once:
        count = (QUICK_REQUESTS if args.quick else REQUESTS).get(at_once, 3 * at_once)
        load = Load(requests=count, clients=at_once, prompt=prompt, answer=answer, seed=at_once)
        files[str(at_once)] = folder / f"trace-{'quick-' if args.quick else ''}{at_once}.jsonl"
        write_trace(files[str(at_once)], drawn(load, VOCABULARY))
    short = Lengths(mean=32, sigma=0.5, least=8, most=128)
    count = 12 if args.quick else 64
    load = Load(requests=count, clients=8, prompt=short, answer=short, shared=1024, seed=5)
    files[SHARED] = folder / f"trace-{'quick-' if args.quick else ''}shared.jsonl"
    write_trace(files[SHARED], drawn(load, VOCABULARY))
    return files


def turns(args: argparse.Namespace) -> list[Turn]:
    """What is to be run in a round, ours first."""
    levels = tuple(str(n) for n in args.at_once)
    ours = (sys.executable, str(HERE / "serve_ours.py"), "--weights", args.weights)
    found = [
        Turn("engine", (*ours, "engine"), levels),
        Turn("server", (*ours, "server"), levels),
        Turn("engine, shared prompt", (*ours, "engine"), (SHARED,)),
        Turn("engine, shared prompt, no prefix cache", (*ours, "--no-prefix-cache", "engine"), (SHARED,)),
    ]
    if args.llama_python:
        kind = {"float32": "float32", "int8": "q8_0"}.get(args.weights, "q4_0")
        file = str(args.models / f"{kind}.gguf")
        for name, unified in (("llama.cpp", "0"), ("llama.cpp, one cache", "1")):
            command = (args.llama_python, str(HERE / "llama_serve.py"), file, unified)
            found.append(Turn(name, command, levels))
    if args.torch_python:
        for kind in ("static", "continuous"):
            command = (args.torch_python, str(HERE / "torch_serve.py"), str(args.models / "hf"), kind)
            found.append(Turn(f"transformers, {kind}", command, levels))
    found.append(Turn("int8 cache", (*ours, "cache"), ("-",)))
    return [turn for turn in found if not args.only or turn.name in args.only]


def run(turn: Turn, trace: str, file: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """One turn: what its last line says, or why there is none."""
    threads = str(args.threads)
    environment = {
        **os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": threads,
        "MAXSTACK_BENCH_THREADS": threads,
    }  # fmt: skip
    at_once = "8" if trace == SHARED else trace
    words = [*turn.command, str(file or "-"), at_once, "1" if args.quick else "0"]
    try:
        done = subprocess.run(
            words, check=False, env=environment, capture_output=True, text=True, timeout=args.limit
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {args.limit} s"}
    if done.returncode or not done.stdout.strip():
        return {"failed": done.stderr.strip()[-800:] or f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All turns that are not there yet, round by round."""
    args.models.mkdir(parents=True, exist_ok=True)
    files = write_traces(args.models, args)
    file = args.json
    known = json.loads(file.read_text()) if file and file.exists() else {}
    for at in range(args.rounds):
        for turn in turns(args):
            for trace in turn.traces:
                key = f"{'quick ' if args.quick else ''}{args.weights}/{turn.name}/{trace}/{at}"
                if key in known and not (args.again and "failed" in known[key]):
                    continue
                begun = time.perf_counter()
                known[key] = run(turn, trace, files.get(trace), args)
                said = known[key].get("failed") or f"{known[key].get('output_tokens_per_s', 0):.1f} tokens/s"
                took = time.perf_counter() - begun
                print(f"{key}: {said} ({took:.0f} s with loading)", file=sys.stderr, flush=True)
                if file:
                    write_atomically(file, json.dumps(known, indent=1).encode())
    return known


def found(known: dict[str, Any], args: argparse.Namespace) -> dict[tuple[str, str], dict[str, float]]:
    """Medians over the rounds, by contender and trace."""
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    start = f"{'quick ' if args.quick else ''}{args.weights}/"
    for key, value in known.items():
        if key.startswith(start) and "failed" not in value:
            _, name, trace, _ = key.split("/")
            by.setdefault((name, trace), []).append(value)
    return {
        place: {
            name: statistics.median(row[name] for row in rows)
            for name, first in rows[0].items() if isinstance(first, int | float)
        }
        for place, rows in by.items()
    }  # fmt: skip


def table(known: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown: a line for each contender and number at once; then what is compared within ours."""
    rows = found(known, args)
    lines = [
        "| at once | contender | output tokens/s | ours (server) is | p50 first token, ms | p50 a token, ms |",
        "|---|---|---|---|---|---|",
    ]
    for at_once in map(str, args.at_once):
        own = rows.get(("server", at_once))
        for (name, trace), row in rows.items():
            if trace == at_once:
                ratio = f"{own['output_tokens_per_s'] / row['output_tokens_per_s']:.2f}×" if own else ""
                times = [f"{row[kind] * 1e3:.0f}" if kind in row else "" for kind in ("ttft_s", "tpot_s")]
                cells = [at_once, name, f"{row['output_tokens_per_s']:.1f}", ratio, *times]
                lines.append("| " + " | ".join(cells) + " |")
    with_cache = rows.get(("engine, shared prompt", SHARED))
    without = rows.get(("engine, shared prompt, no prefix cache", SHARED))
    if with_cache and without:
        lines.append(
            f"\nshared prompt of 1,024 tokens, 8 at once: {with_cache['output_tokens_per_s']:.1f} tokens/s with the "
            f"prefix cache, {without['output_tokens_per_s']:.1f} without: "
            f"{with_cache['output_tokens_per_s'] / without['output_tokens_per_s']:.1f}×"
        )
    for at_once in map(str, args.at_once):
        engine, server = rows.get(("engine", at_once)), rows.get(("server", at_once))
        if engine and server:
            share = 1 - engine["seconds"] / server["seconds"]
            lines.append(
                f"HTTP, {at_once} at once: {share:.1%} of the wall time (engine alone {engine['seconds']:.1f} s, over "
                f"HTTP {server['seconds']:.1f} s; the clients took {server['client_share']:.1%} of a core); scheduler "
                f"{engine['host_share']:.1%}"
            )
    if cache := rows.get(("int8 cache", "-")):
        lines.append(
            f"int8 cache: {cache['sequences_of_bfloat16']:.2f}× the sequences of a bfloat16 cache in the same memory "
            f"({cache['sequences_of_float32']:.2f}× of float32); perplexity {cache['perplexity_int8']:.4f} against "
            f"{cache['perplexity']:.4f} ({cache['perplexity_int8'] / cache['perplexity'] - 1:+.3%})"
        )
    failed = {key: value["failed"] for key, value in known.items() if "failed" in value}
    lines += [f"failed: {key}: {said.splitlines()[-1]}" for key, said in failed.items()]
    return "\n".join(lines)


def write_models(folder: Path) -> None:
    """The packaged model for all: GGUF files and a folder for transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    convert = [sys.executable, "-m", "maxstack", "convert", MODEL]
    targets = [("gguf", kind, folder / f"{kind}.gguf") for kind in ("float32", "q8_0", "q4_0")]
    for form, kind, target in (("hf", "float32", folder / "hf"), *targets):
        if not target.exists():
            subprocess.run([*convert, str(target), "--format", form, "--dtype", kind], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=Path, required=True, help="folder with the model for all")
    add("--write-models", action="store_true", help="write them, and end")
    add("--llama-python", default="", help="interpreter that has llama-cpp-python and numpy")
    add("--torch-python", default="", help="interpreter that has torch and transformers")
    add(
        "--weights",
        choices=("float32", "int8", "int4-g32", "int4-g128"),
        default="float32",
        help="of ours and llama.cpp",
    )
    add("--at-once", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    add("--rounds", type=int, default=3, help="turns of each contender; medians are shown")
    add("--threads", type=int, default=os.cpu_count(), help="of each contender")
    add("--only", nargs="+", default=[], metavar="NAME", help="some of the contenders")
    add("--quick", action="store_true", help="short lengths, few requests")
    add("--again", action="store_true", help="run again what has failed")
    add("--limit", type=int, default=LIMIT_S, help="seconds that a turn may take")
    add("--json", type=Path, help="file for all figures; what is in it is not run again")
    args = parser.parse_args()
    if args.write_models:
        write_models(args.models)
        return
    print(table(compare(args), args))


if __name__ == "__main__":
    main()

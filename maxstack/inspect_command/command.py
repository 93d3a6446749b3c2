"""`maxstack inspect PATH`: find out what the path is, gather its facts, print them."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from maxstack.checkpoint import CheckpointError
from maxstack.config import UserError, load_run
from maxstack.data.prepare import PreparedData, prepare
from maxstack.data.store import META, PreparedSource
from maxstack.inspect_command import data, facts
from maxstack.inspect_command.data import Span
from maxstack.inspect_command.facts import Facts
from maxstack.inspect_command.places import KNOWN, Kind, Place, place_of
from maxstack.inspect_command.tables import show
from maxstack.models.run_model import model_config
from maxstack.train.run import RunConfig

log = logging.getLogger(__name__)

SHOWN_ROWS = 2
DEFAULT_SEQ_LEN = 256
Found = tuple[Facts, list[list[Span]]]


def parser() -> argparse.ArgumentParser:
    """The verb's arguments."""
    result = argparse.ArgumentParser(
        prog="maxstack inspect",
        description="Show shapes, parameters by part, FLOPs and bytes a token, memory by kind, checkpoints, metrics, "
        "packed rows. Tables are read from descriptions: no array is loaded.",
    )
    result.add_argument("path", type=Path, help=KNOWN)
    result.add_argument(
        "--rows", type=int, help=f"packed rows to decode (default {SHOWN_ROWS} where the data is at hand)"
    )
    result.add_argument("--step", type=int, default=0, help="the step whose rows are shown (default 0)")
    result.add_argument("--seq-len", type=int, help="tokens a row (default: the run's, else 256)")
    result.add_argument(
        "--packing",
        choices=("concat", "best_fit"),
        default="concat",
        help="for a data folder (default concat)",
    )
    result.add_argument(
        "--devices", type=int, help="devices the memory is worked out for (default: what the mesh names)"
    )
    result.add_argument(
        "--verify", choices=("size", "hash", "none"), default="size",
        help="compare checkpoint files with their manifest (default size)",
    )  # fmt: skip
    result.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    for name, least in (("rows", 0), ("step", 0), ("seq_len", 2), ("devices", 1)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {least} to 2**31 - 1")
    place = place_of(args.path)
    try:
        found, rows = INSPECTORS[place.kind](place, args)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    found = {"kind": place.kind, "path": str(place.path), **found}
    if args.json:
        print(json.dumps(found | ({"rows": data.rows_facts(rows)} if rows else {}), ensure_ascii=False))
    else:
        show(Console(file=sys.stdout, highlight=False), found, rows)
    return 0


def inspect_run_file(place: Place, args: argparse.Namespace) -> Found:
    """A run that need not have begun."""
    run = load_run(place.path, RunConfig)
    rows = decode_run(run, prepare(run.data, report_to_log), args) if args.rows else []
    return run_facts(run, args), rows


def inspect_run(place: Place, args: argparse.Namespace) -> Found:
    """A run folder."""
    directory = place.path / "checkpoints"
    found: Facts = (
        {"checkpoints": facts.checkpoints_facts(directory, args.verify)} if directory.is_dir() else {}
    )
    found["metrics"] = facts.metrics_facts(place.path / "metrics.jsonl")
    run = facts.run_of(place.path)
    if run is None and (place.path / "run.py").is_file():
        run = load_run(place.path / "run.py", RunConfig)
    if run is None:
        return found | {"notes": ["no checkpoint or run.py says what run this is"]}, []
    found = run_facts(run, args) | found
    prepared = prepared_for(run, place.path)
    if prepared is None and args.rows:
        prepared = prepare(run.data, report_to_log)
    if prepared is None:
        return found, []
    found["sources"] = [data.source_facts(source) for source in prepared.sources.values()]
    return found, decode_run(run, prepared, args)


def inspect_checkpoint(place: Place, args: argparse.Namespace) -> Found:
    """One checkpoint."""
    one = facts.checkpoint_facts(place.path, args.verify)
    found: Facts = {"checkpoints": {"directory": str(place.path), "checkpoints": [one], "half_written": []}}
    run = facts.run_of(place.path)
    if run is not None:
        return run_facts(run, args) | found, []
    try:
        model = model_config(place.path)
    except (UserError, CheckpointError) as error:
        return found | {"notes": [str(error)]}, []
    return {"model": facts.model_facts(model, args.seq_len or model.max_length)} | found, []


def inspect_checkpoints(place: Place, args: argparse.Namespace) -> Found:
    """A folder of checkpoints."""
    found: Facts = {"checkpoints": facts.checkpoints_facts(place.path, args.verify)}
    run = facts.run_of(place.path)
    return (found if run is None else run_facts(run, args) | found), []


def inspect_data(place: Place, args: argparse.Namespace) -> Found:
    """A prepared folder, or a folder of them."""
    folders = (
        [place.path] if place.kind == "data" else sorted(path.parent for path in place.path.glob(f"*/{META}"))
    )
    sources = [data.source_facts(PreparedSource(folder)) for folder in folders]
    rows: list[list[Span]] = []
    count = SHOWN_ROWS if args.rows is None else args.rows
    for folder in folders if count else []:
        rows += data.folder_rows(folder, args.seq_len or DEFAULT_SEQ_LEN, args.packing, args.step, count)
    return {"sources": sources}, rows


def inspect_shard(place: Place, args: argparse.Namespace) -> Found:
    """One file of tokens."""
    count = SHOWN_ROWS if args.rows is None else args.rows
    rows = data.shard_rows(place.path, args.seq_len or DEFAULT_SEQ_LEN, count) if count else []
    return {"shard": data.shard_facts(place.path)}, rows


def inspect_model_folder(place: Place, args: argparse.Namespace) -> Found:
    """A folder of safetensors, or one such file."""
    del args
    return {"safetensors": facts.safetensors_facts(place.path)}, []


INSPECTORS: dict[Kind, Callable[[Place, argparse.Namespace], Found]] = {
    "run": inspect_run, "run file": inspect_run_file, "checkpoint": inspect_checkpoint,
    "checkpoints": inspect_checkpoints, "data": inspect_data, "data set": inspect_data, "shard": inspect_shard,
    "model folder": inspect_model_folder,
}  # fmt: skip


def run_facts(run: RunConfig, args: argparse.Namespace) -> Facts:
    """Costs and memory of a run."""
    sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    devices = args.devices
    if devices is None:
        devices = 1
        for size in sizes:
            devices *= max(size, 1)
    return {
        "model": facts.model_facts(run.model, args.seq_len or run.data.seq_len),
        "memory": facts.memory_facts(run, devices),
    }


def prepared_for(run: RunConfig, folder: Path) -> PreparedData | None:
    """The data that the run's newest checkpoint was trained on, where it is still there."""
    try:
        position = facts.describe(folder).meta["data"]
    except (CheckpointError, KeyError):
        return None
    return data.prepared_of(run.data, position["sources"], folder / "tokenizer")


def decode_run(run: RunConfig, prepared: PreparedData, args: argparse.Namespace) -> list[list[Span]]:
    """The first rows of a step of the run."""
    count = SHOWN_ROWS if args.rows is None else args.rows
    if not count:
        return []
    return data.packed_rows(run.data, prepared, run.batch_rows, args.step)[:count]


def report_to_log(progress: object) -> None:
    """Progress of preparing, where a person may see it."""
    log.info("%s", progress)

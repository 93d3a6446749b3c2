"""A run, its checkpoints and its model as plain values, ready for JSON. Nothing here reads an array."""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import jax

from maxstack.checkpoint import CheckpointError, describe, manifest
from maxstack.checkpoint.folder import complete_steps, half_written, step_folder
from maxstack.config import UserError, from_dict
from maxstack.models import TransformerConfig, tree
from maxstack.models.account import BITS, account, cache_bytes, layers, window_of
from maxstack.plan import run_memory
from maxstack.telemetry import read_rows
from maxstack.train.run import RunConfig

Facts = dict[str, Any]

SAFETENSORS_HEADER_MOST = 100 * 2**20
"""Bytes a header may take, as the format's own reader has it."""


def model_facts(config: TransformerConfig, seq_len: int) -> Facts:
    """Shapes, parameters by part, FLOPs and bytes a token at rows of `seq_len` tokens."""
    model = tree.abstract(lambda: config.build(jax.random.key(0)))
    buffers, axes = tree.buffer_names(model), tree.axes(model)
    shapes = {name: leaf.shape for name, leaf in tree.leaves(model).items()}
    costs = account(
        config, {name: shape for name, shape in shapes.items() if name not in buffers}, axes, seq_len
    )
    return {
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
        "by_part": dict(costs.by_part),
        "layers": [
            {
                "repeats": repeats,
                "attention": type(block.attention).__name__.removesuffix("Config"),
                "window": window_of(block),
                "feed_forward": type(block.feed_forward).__name__.removesuffix("Config"),
            }
            for repeats, block in layers(config)
        ],
        "seq_len": seq_len,
        "flops_per_token": {
            "training": {"full": costs.training_flops_full, "causal": costs.training_flops_causal},
            "forward": {"full": costs.forward_flops_full, "causal": costs.forward_flops_causal},
        },
        "bytes_per_token": {
            "weights_read": {dtype: costs.weight_bytes(dtype) for dtype in BITS},
            "cache": {dtype: cache_bytes(config, dtype) for dtype in BITS},
        },
        "arrays": {
            name: {"shape": list(shape), "axes": list(axes[name]), "trained": name not in buffers}
            for name, shape in shapes.items()
        },
    }


def memory_facts(run: RunConfig, devices: int) -> Facts:
    """Bytes on each of `devices` devices, by kind; or why the run does not fit that many."""
    try:
        memory = run_memory(run, devices)
    except UserError as error:
        return {"devices": devices, "refused": str(error)}
    mesh = dict(zip(("data", "fsdp", "tensor"), run.mesh.sizes(devices), strict=False))
    kinds = dataclasses.asdict(memory)
    return {"devices": devices, "mesh": mesh, "zero": run.mesh.zero, "bytes": kinds, "total": memory.total}


def checkpoint_facts(folder: Path, verify: str) -> Facts:
    """One checkpoint: its record, its size, whether its files are as the manifest says."""
    facts: Facts = {"folder": str(folder), "step": int(folder.name) if folder.name.isdigit() else None}
    try:
        record = describe(folder)
    except CheckpointError as error:
        return facts | {"state": str(error)}
    problems = manifest.problems(folder, verify)
    groups: dict[str, dict[str, int]] = {}
    for name, spec in record.arrays.items():
        group = groups.setdefault(name.partition("/")[0], {"arrays": 0, "numbers": 0})
        group["arrays"] += 1
        group["numbers"] += math.prod(spec.shape)
    return facts | {
        "step": record.step,
        "time": record.time,
        "versions": record.versions,
        "metrics": record.metrics,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "state": _state(problems, verify),
        "groups": groups,
    }


def _state(problems: tuple[str, ...] | None, verify: str) -> str:
    if problems is None:
        return "unverified: it has no manifest"
    if problems:
        return f"damaged: {problems[0]}" + (f" and {len(problems) - 1} more" if len(problems) > 1 else "")
    return {"hash": "good (hashes)", "size": "good (sizes)", "none": "not checked"}[verify]


def checkpoints_facts(directory: Path, verify: str) -> Facts:
    """All checkpoints of a folder, and what a killed process left there."""
    return {
        "directory": str(directory),
        "checkpoints": [
            checkpoint_facts(step_folder(directory, step), verify) for step in complete_steps(directory)
        ],
        "half_written": [path.name for path in half_written(directory)],
    }


def run_of(folder: Path, step: int | None = None) -> RunConfig | None:
    """The run that a checkpoint was saved by; None when it does not say, or another version wrote it."""
    try:
        return from_dict(describe(folder, step).meta["run"])
    except (CheckpointError, KeyError, UserError):
        return None


def metrics_facts(path: Path) -> Facts | None:
    """A summary of metrics.jsonl; None when there is none."""
    rows = list(read_rows(path))
    training = [row for row in rows if isinstance(row.get("loss"), float | int)]
    if not training:
        return None
    last = training[-1]
    steady = sorted(row["tokens_per_second"] for row in training[1:] if row.get("tokens_per_second"))
    best = min(training, key=lambda row: row["loss"])
    held_out = next((row["held_out"] for row in reversed(rows) if row.get("held_out")), None)
    kept = ("step", "loss", "learning_rate", "gradient_norm", "skipped_steps", "mfu_full", "mfu_causal")
    return {
        "steps": [training[0]["step"], last["step"]],
        "last": {name: last[name] for name in kept if name in last},
        "best": {"step": best["step"], "loss": best["loss"]},
        "median_tokens_per_second": steady[len(steady) // 2] if steady else None,
        "held_out": held_out,
    }


def safetensors_facts(path: Path) -> Facts:
    """Names, types and shapes in a file or folder of safetensors, from their headers."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    arrays: dict[str, Any] = {}
    for file in files:
        for name, entry in _safetensors_header(file).items():
            arrays[name] = {"shape": entry["shape"], "dtype": entry["dtype"], "file": file.name}
    facts: Facts = {
        "arrays": arrays,
        "parameters": sum(math.prod(entry["shape"]) for entry in arrays.values()),
    }
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file():
        facts["config"] = json.loads(config.read_text(encoding="utf-8"))
    return facts


def _safetensors_header(file: Path) -> dict[str, Any]:
    """The header: eight bytes of length, little-endian, then JSON."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(SAFETENSORS_HEADER_MOST, file.stat().st_size - 8):
            raise UserError(
                f"{file} is no safetensors file, or is cut off: its header would have {length} bytes"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{file}: its header is damaged: {error}") from error
    return {name: entry for name, entry in header.items() if name != "__metadata__"}

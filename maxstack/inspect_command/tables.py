"""Facts as tables in the terminal."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maxstack.inspect_command.data import Span
from maxstack.inspect_command.facts import Facts

# Neighbouring documents differ; the eye needs no more than that.
DOCUMENT_STYLES = ("white on dark_blue", "white on dark_green", "white on purple4", "white on grey30")
NOT_COUNTED = "red on white"
PADDING = "dim"


def show(console: Console, facts: Facts, rows: list[list[Span]]) -> None:
    """Print whatever sections the facts have."""
    console.print(Text(f"{facts['kind']}: {facts['path']}", style="bold"))
    sections = {
        "model": show_model, "memory": show_memory, "checkpoints": show_checkpoints, "metrics": show_metrics,
        "sources": show_sources, "shard": show_shard, "safetensors": show_safetensors,
    }  # fmt: skip
    for name, section in sections.items():
        if facts.get(name):
            section(console, facts[name])
    for note in facts.get("notes", ()):
        console.print(Text(note, style="yellow"))
    if rows:
        show_rows(console, rows)


def show_model(console: Console, model: Facts) -> None:
    """Arrays, parts, FLOPs and bytes."""
    table = table_of("weights", "name", "shape", "axes", "parameters")
    for name, array in model["arrays"].items():
        size = product(array["shape"])
        axes = ", ".join(array["axes"]) + ("" if array["trained"] else " (buffer)")
        table.add_row(name, " x ".join(map(str, array["shape"])), axes, f"{size:,}")
    console.print(table)
    table = table_of("parameters", "part", "number", "share")
    for part, size in model["by_part"].items():
        table.add_row(part, f"{size:,}", f"{size / model['parameters']:.1%}")
    table.add_row("all", f"{model['parameters']:,}", "", style="bold")
    if model["active_parameters"] != model["parameters"]:
        share = model["active_parameters"] / model["parameters"]
        table.add_row("used by one token", f"{model['active_parameters']:,}", f"{share:.1%}")
    console.print(table)
    flops = model["flops_per_token"]
    table = table_of(
        f"FLOPs a token, rows of {model['seq_len']:,} tokens", "", "full attention", "causal half"
    )
    for name, pair in flops.items():
        table.add_row(name, si(pair["full"]), si(pair["causal"]))
    console.print(table)
    reads = model["bytes_per_token"]
    table = table_of("bytes a decoded token", "type", "weights read, alone", "cache grows by")
    for dtype in reads["cache"]:
        table.add_row(dtype, binary(reads["weights_read"][dtype]), binary(reads["cache"][dtype]))
    console.print(table)


def show_memory(console: Console, memory: Facts) -> None:
    """Bytes on a device by kind."""
    if "refused" in memory:
        console.print(Text(f"on {memory['devices']} devices: {memory['refused']}", style="yellow"))
        return
    mesh = " x ".join(f"{axis} {size}" for axis, size in memory["mesh"].items())
    table = table_of(
        f"training memory on each of {memory['devices']} devices ({mesh}, ZeRO {memory['zero']})",
        "kind",
        "bytes",
    )
    estimated = ("activations", "working")
    for kind, size in memory["bytes"].items():
        table.add_row(f"{kind} (estimate)" if kind in estimated else kind, binary(size))
    table.add_row("all", binary(memory["total"]), style="bold")
    console.print(table)


def show_checkpoints(console: Console, found: Facts) -> None:
    """One row a checkpoint."""
    table = table_of("checkpoints", "step", "saved (UTC)", "bytes", "files", "metrics")
    versions: dict[str, list[int]] = {}
    for one in found["checkpoints"]:
        wrote = ", ".join(f"{name} {version}" for name, version in one.get("versions", {}).items())
        versions.setdefault(wrote, []).append(one["step"])
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in one.get("metrics", {}).items())
        good = one["state"].startswith("good") or one["state"] == "not checked"
        size = binary(one["bytes"]) if "bytes" in one else ""
        table.add_row(
            str(one["step"]),
            one.get("time", ""),
            size,
            one["state"],
            metrics,
            style=None if good else "red",
        )
    console.print(table)
    for wrote, steps in versions.items():
        if wrote:
            every = "written" if len(versions) == 1 else f"{', '.join(map(str, steps))} written"
            console.print(Text(f"{every} by {wrote}"))
    for name in found["half_written"]:
        console.print(Text(f"half-written, ignored: {name}", style="yellow"))
    for one in found["checkpoints"][-1:]:
        table = table_of(f"arrays of step {one['step']}", "group", "arrays", "numbers")
        for group, count in one.get("groups", {}).items():
            table.add_row(group, str(count["arrays"]), f"{count['numbers']:,}")
        console.print(table)


def show_metrics(console: Console, metrics: Facts) -> None:
    """The end and the best of a run's metrics."""
    table = table_of(f"metrics, steps {metrics['steps'][0]} to {metrics['steps'][1]}", "what", "value")
    for name, value in metrics["last"].items():
        table.add_row(f"last {name}" if name != "step" else "last step", number(value))
    table.add_row("best loss", f"{metrics['best']['loss']:.4f} (step {metrics['best']['step']})")
    if metrics["median_tokens_per_second"]:
        table.add_row("median tokens/s", f"{metrics['median_tokens_per_second']:,.0f}")
    for source, values in (metrics["held_out"] or {}).items():
        for name, value in values.items():
            table.add_row(f"held out, {source}: {name}", number(value))
    console.print(table)


def show_sources(console: Console, sources: list[Facts]) -> None:
    """Prepared folders."""
    table = table_of(
        "prepared data", "source", "split", "documents", "tokens", "text", "bytes a token", "files"
    )
    for source in sources:
        for name, split in source["splits"].items():
            ratio = f"{split['bytes_per_token']:.2f}" if split["bytes_per_token"] else ""
            table.add_row(
                source["name"], name, f"{split['documents']:,}", f"{split['tokens']:,}",
                binary(split["text_bytes"]), ratio, str(len(split["shards"])),
            )  # fmt: skip
    console.print(table)
    for source in sources:
        tokenizer = source["tokenizer"]
        console.print(
            Text(
                f"{source['name']}: {tokenizer['vocab_size']:,} token ids as {source['dtype']}, tokenizer "
                f"{tokenizer['fingerprint'][:12]}, content {source['fingerprint'][:12]}, "
                f"{binary(source['bytes'])} on disk"
            )
        )


def show_shard(console: Console, shard: Facts) -> None:
    """One file of tokens."""
    origins = f", from {shard['origins'][0]} to {shard['origins'][1]}" if shard["origins"] else ""
    console.print(
        Text(
            f"{shard['tokens']:,} tokens of the {shard['split']} split, {shard['documents']:,} documents from number "
            f"{shard['first_document']:,} on{origins}"
        )
    )


def show_safetensors(console: Console, found: Facts) -> None:
    """Arrays of a model folder."""
    table = table_of(f"{found['parameters']:,} numbers", "name", "type", "shape", "file")
    for name, array in found["arrays"].items():
        table.add_row(name, array["dtype"], " x ".join(map(str, array["shape"])), array["file"])
    console.print(table)


def show_rows(console: Console, rows: list[list[Span]]) -> None:
    """Packed rows: documents in alternating colours behind their border, what the loss leaves out in ‹ ›."""
    legend = Text("packed rows: ┃n┃ begins document n; ")
    legend.append("‹no label counts here›", style=NOT_COUNTED)
    console.print(legend)
    for index, row in enumerate(rows):
        tokens = sum(span.tokens for span in row)
        counted = sum(span.tokens for span in row if span.counted)
        text = Text(f"row {index}: {tokens} tokens, {counted} count\n", style="bold")
        before = 0
        for span in row:
            if span.document == 0:
                text.append(f"┃ {span.tokens} tokens of padding", style=PADDING)
                continue
            style = DOCUMENT_STYLES[span.document % len(DOCUMENT_STYLES)]
            if span.document != before:
                text.append(f"┃{span.document}┃", style=f"bold {style}")
            before = span.document
            text.append(
                span.text if span.counted else f"‹{span.text}›", style=style if span.counted else NOT_COUNTED
            )
        console.print(text, soft_wrap=True)


def table_of(title: str, *columns: str) -> Table:
    """An empty table; columns of numbers are aligned right, the first column never."""
    table = Table(
        title=Text(title, style="bold"), title_justify="left", header_style="dim", box=box.SIMPLE_HEAD
    )
    for index, column in enumerate(columns):
        numeric = column in (
            "parameters",
            "number",
            "share",
            "bytes",
            "documents",
            "tokens",
            "numbers",
            "arrays",
        )
        table.add_column(column, justify="right" if numeric and index else "left", overflow="fold")
    return table


def product(sizes: Iterable[int]) -> int:
    """Numbers in an array."""
    total = 1
    for size in sizes:
        total *= size
    return total


def number(value: Any) -> str:
    """A metric."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def si(value: int | float) -> str:
    """FLOPs with a unit of a thousand's power."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:,.4g} {unit}FLOP"
        value /= 1000
    return ""


def binary(value: int | float) -> str:
    """Bytes with a unit of 1024's power."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.4g} {unit}"
        value /= 1024
    return f"{value:,.4g} TiB"

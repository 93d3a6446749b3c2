"""The report's page, put together from the records of a run."""

import html
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from maxstack.config import write_atomically
from maxstack.telemetry.display import duration
from maxstack.telemetry.goodput import ACTIVITIES
from maxstack.train.report.charts import Chart, draw
from maxstack.train.report.progress import GIB, loss_chart, progress_charts
from maxstack.train.report.records import Records, read, spread

MOST_SAMPLES = 6
SAMPLE_CHARACTERS = 1500
TABLE_ROWS = 14
OURS = "maxstack"
# No script, no font, no image: nothing is fetched, and text that a model wrote can do nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder and return its path. Raises UserError when the run has no steps yet.

    It reads metrics.jsonl, samples.jsonl, goodput.json, run.py and, where it is there, comparison.json: an array of
    `{"name", "bits_per_byte"}`, in which this run is called "maxstack" (with a comma and what kind of its weights).
    """
    folder = Path(run_dir)
    target = folder / "report.html"
    write_atomically(target, _page(read(folder)).encode())
    return target


def _page(records: Records) -> str:
    style = resources.files("maxstack.train.report").joinpath("style.css").read_text()
    sections = (
        _tiles(records), _loss(records), _comparison(records), _samples(records), _progress(records),
        _goodput(records), _table(records), _run(records),
    )  # fmt: skip
    title = html.escape(records.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title} · training report</title>
<style>
{style}</style>
</head>
<body>
<header><p class="kicker">maxstack · training report</p><h1>{title}</h1><p class="lead">{_lead(records)}</p></header>
<main>
{"".join(section for section in sections if section)}
</main>
</body>
</html>
"""


def _lead(records: Records) -> str:
    resumed = records.resumed_at
    text = f"{records.last['step']:,} steps"
    if total := _total_tokens(records):
        text += f" on {_short(total)} tokens"
    if wall := records.goodput.get("wall_seconds"):
        text += f" in {duration(wall)}"
    if resumed:
        places = ", ".join(f"{step - 1:,}" for step in resumed[:8]) + (" …" if len(resumed) > 8 else "")
        times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        text += f". Interrupted {times}, after step {places}, and resumed from the saved state"
    return html.escape(f"{text}.")


def _tiles(records: Records) -> str:
    tiles = [("loss", _figure(records.last.get("loss"), ".3f"), "last step, nats a token")]
    for source, (_, values) in list(records.held_out("bits_per_byte").items())[:2]:
        tiles.append(("held-out bits per byte", _figure(values[-1], ".3f"), source))
    _, speed = records.series("tokens_per_second")
    if len(speed):
        tiles.append(("tokens a second", _figure(float(np.nanmedian(speed)), ",.0f"), "median"))
    if _is_finite(records.last.get("mfu_causal")):
        full = _figure(records.last.get("mfu_full"), ".1%")
        tiles.append(
            ("model FLOP utilisation", _figure(records.last["mfu_causal"], ".1%"), f"causal; full {full}")
        )
    if peak := _peak_memory(records):
        tiles.append(
            (
                "peak memory",
                f"{peak / GIB:.2f} GiB",
                _memory_owner(records),
            )
        )
    if skipped := records.last.get("skipped_steps"):
        tiles.append(("skipped steps", f"{skipped:.0f}", "not finite or spiking"))
    cells = "".join(
        f'<div class="tile"><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd><p>{html.escape(note)}</p></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _memory_owner(records: Records) -> str:
    """Whose memory the tile shows; on a CPU the devices' is that of the process."""
    host, device = (records.last.get(f"{kind}_memory_bytes") for kind in ("host", "device"))
    if not device:
        return "host"
    return "process" if device == host else "device"


def _loss(records: Records) -> str:
    return _section("Loss", _figure_element(loss_chart(records), wide=True))


def _progress(records: Records) -> str:
    body = "".join(
        f'<div class="card"><h3>{html.escape(chart.title)}</h3>{_figure_element(chart)}</div>'
        for chart in progress_charts(records)
    )
    return _section("Progress", f'<div class="grid">{body}</div>') if body else ""


def _figure_element(chart: Chart, *, wide: bool = False) -> str:
    narrow = draw(chart, width=4.6, height=2.7, variant="-narrow" if wide else "")
    if not wide:
        return f"<figure>{narrow}</figure>"
    large = draw(chart, width=10.5, height=3.9)
    return f'<figure><div class="wide">{large}</div><div class="narrow">{narrow}</div></figure>'


def _comparison(records: Records) -> str:
    entries = [e for e in records.comparison if isinstance(e, dict) and _is_finite(e.get("bits_per_byte"))]
    if not entries:
        return ""
    worst = max(e["bits_per_byte"] for e in entries)
    rows = "".join(_comparison_row(e, worst) for e in sorted(entries, key=lambda e: e["bits_per_byte"]))
    return _section(
        "Against compressors",
        "<p>Bits per byte of the same held-out text; fewer is better.</p>"
        '<div class="scroll"><table class="comparison"><thead><tr><th scope="col">model</th>'
        '<th scope="col" class="number">bits / byte</th><th scope="col"><span class="unseen">bar</span></th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>",
    )


def _comparison_row(entry: dict[str, Any], worst: int | float) -> str:
    name, bits = str(entry.get("name", "")), entry["bits_per_byte"]
    return (
        f'<tr{" class=ours" if name.partition(",")[0] == OURS else ""}><th scope="row">{html.escape(name)}</th>'
        f'<td class="number">{bits:.3f}</td>'
        f'<td class="bar"><span style="width:{100 * bits / worst:.1f}%"></span></td></tr>'
    )


def _samples(records: Records) -> str:
    first_of_step: dict[Any, dict[str, Any]] = {}
    for row in records.samples:
        first_of_step.setdefault(row["step"], row)
    cards = "".join(_sample_card(row) for row in spread(list(first_of_step.values()), MOST_SAMPLES))
    note = "<p>The prompt is set in bold; what follows is the model's.</p>"
    return _section("What it writes", f'{note}<div class="grid">{cards}</div>') if cards else ""


def _sample_card(row: dict[str, Any]) -> str:
    prompt, text = html.escape(str(row.get("prompt", ""))), html.escape(row["text"][:SAMPLE_CHARACTERS])
    step = html.escape(str(row["step"]))
    return f'<article class="card sample"><h3>step {step}</h3><pre><b>{prompt}</b>{text}</pre></article>'


def _goodput(records: Records) -> str:
    seconds = records.goodput.get("seconds", {})
    parts = [
        (name, seconds[name]) for name in ACTIVITIES if _is_finite(seconds.get(name)) and seconds[name] > 0
    ]
    total = math.fsum(value for _, value in parts)
    if not total:
        return ""
    bar = "".join(
        f'<span class="part {name}" style="width:{100 * value / total:.2f}%"></span>' for name, value in parts
    )
    legend = "".join(
        f'<li><i class="part {name}"></i>{name} <b>{value / total:.1%}</b> <span>{_seconds(value)}</span></li>'
        for name, value in parts
    )
    starts = records.goodput.get("starts")
    note = f"Over {starts} starts of the run." if isinstance(starts, int) and starts > 1 else ""
    return _section(
        "Where the time went",
        f'<div class="goodput" aria-hidden="true">{bar}</div><ul class="legend">{legend}</ul><p>{note}</p>',
    )


def _table(records: Records) -> str:
    columns = (
        ("step", "step", ",d"), ("loss", "loss", ".4f"), ("tokens / s", "tokens_per_second", ",.0f"),
        ("step s", "step_seconds", ".3f"), ("data wait s", "data_wait_seconds", ".4f"),
        ("gradient norm", "gradient_norm", ".3f"), ("learning rate", "learning_rate", ".2e"),
    )  # fmt: skip
    head = "".join(f'<th scope="col" class="number">{name}</th>' for name, _, _ in columns)
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="number">{_figure(row.get(field), spec)}</td>' for _, field, spec in columns)
        + "</tr>"
        for row in spread(records.training, TABLE_ROWS)
    )
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section(
        "Numbers", f"<details><summary>{TABLE_ROWS} steps of the run as a table</summary>{table}</details>"
    )


def _run(records: Records) -> str:
    if not records.run_text:
        return ""
    text = f"<pre class=code>{html.escape(records.run_text)}</pre>"
    return _section(
        "The run, resolved", f"<details><summary>every setting it was made with</summary>{text}</details>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>\n"


def _total_tokens(records: Records) -> float:
    _, tokens = records.series("tokens")
    return float(np.nansum(tokens)) if len(tokens) else 0.0


def _peak_memory(records: Records) -> float:
    for kind in ("device", "host"):
        _, values = records.series(f"{kind}_memory_bytes")
        if len(values):
            return float(np.nanmax(values))
    return 0.0


def _figure(value: Any, spec: str) -> str:
    if not isinstance(value, int | float):
        return "–"
    return format(value, spec) if math.isfinite(value) else "not finite"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _seconds(value: int | float) -> str:
    return f"{value:.1f} s" if value < 10 else duration(value)


def _short(count: int | float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,.0f}"

"""The charts of a report: which numbers of a run, in which unit, with what said about them."""

from collections.abc import Iterator

import numpy as np

from maxstack.train.report.charts import Chart, Curve
from maxstack.train.report.records import Records

GIB = 2**30
# A gradient norm that reaches this multiple of its median is drawn on a logarithmic axis.
WIDE_SPREAD = 30


def loss_chart(records: Records) -> Chart:
    """Training loss with the held-out loss of each source."""
    steps, values = records.series("loss")
    held_out = [Curve(f"held out: {name}", *curve, True) for name, curve in records.held_out("nll").items()]
    summary = f"Training loss by step: {span(values)}." + "".join(
        f" {curve.label}: {span(curve.values)}." for curve in held_out
    )
    curves = [Curve("training", steps, values), *held_out]
    return Chart("loss", "Loss", "nats per token", summary, curves, records.resumed_at)


def progress_charts(records: Records) -> Iterator[Chart]:
    """The smaller charts, those for which the run has numbers."""
    marks = records.resumed_at
    steps, values = records.series("tokens_per_second")
    if len(steps):
        yield _single("throughput", "Throughput", "tokens / s", steps, values, marks)
    steps, values = records.series("learning_rate")
    if len(steps):
        yield _single("rate", "Learning rate", "", steps, values, marks)._replace(smooth=False)
    steps, values = records.series("gradient_norm")
    if len(steps):
        good = values[np.isfinite(values) & (values > 0)]
        wide = bool(len(good)) and good.max() > WIDE_SPREAD * np.median(good)
        chart = _single("norm", "Gradient norm", "before clipping", steps, values, marks)
        yield chart._replace(logarithmic=wide, from_zero=not wide)
    steps, waits = records.series("data_wait_seconds")
    same_steps, seconds = records.series("step_seconds")
    if len(steps) and np.array_equal(steps, same_steps):
        share = 100 * waits / np.maximum(seconds, 1e-9)
        yield _single("wait", "Waiting for data", "% of step time", steps, share, marks)
    yield from _memory(records)
    yield from _bits(records)


def _single(
    name: str, title: str, unit: str, steps: np.ndarray, values: np.ndarray, marks: list[int]
) -> Chart:
    summary = f"{title}{f' in {unit}' if unit else ''} by step: {span(values)}."
    return Chart(name, title, unit, summary, [Curve(title, steps, values)], marks, from_zero=True)


def _memory(records: Records) -> Iterator[Chart]:
    found = {label: records.series(f"{label}_memory_bytes") for label in ("host", "device")}
    curves = [Curve(label, steps, values / GIB) for label, (steps, values) in found.items() if len(steps)]
    if len(curves) == 2 and np.array_equal(curves[0].values, curves[1].values):
        curves = [curves[0]._replace(label="process")]  # on a CPU both are the process
    if curves:
        summary = "Memory in GiB by step. " + " ".join(
            f"{curve.label}: {span(curve.values)}." for curve in curves
        )
        yield Chart(
            "memory", "Memory", "GiB", summary, curves, records.resumed_at, from_zero=True, smooth=False
        )


def _bits(records: Records) -> Iterator[Chart]:
    curves = [Curve(name, *curve, True) for name, curve in records.held_out("bits_per_byte").items()]
    if curves and len(curves[0].steps) > 1:
        summary = "Held-out bits per byte by step. " + " ".join(
            f"{c.label}: {span(c.values)}." for c in curves
        )
        yield Chart("bits", "Held-out bits per byte", "bits / byte", summary, curves, records.resumed_at)


def span(values: np.ndarray) -> str:
    """A curve in words."""
    good = values[np.isfinite(values)]
    if not len(good):
        return "never finite"
    return f"starts at {good[0]:.4g}, ends at {good[-1]:.4g}, between {good.min():.4g} and {good.max():.4g}"

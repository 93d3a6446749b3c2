"""A run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from maxstack.bench.serve.answers import Answer
from maxstack.bench.serve.numbers import KINDS, Report

BINS = 60


def draw(file: Path, report: Report, answers: Sequence[Answer]) -> None:
    """Shares of requests over their times, and tokens a second over the run, into a file of any kind of picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    good = [answer for answer in answers if answer.error is None]
    values = {
        "ttft": [answer.ttft_s for answer in good],
        "tpot": [answer.tpot_s for answer in good if answer.output_tokens > 1],
        "e2e": [answer.e2e_s for answer in good],
    }
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(2, 2).flat
        for axis, (kind, seconds) in zip(axes, values.items()):
            ordered = sorted(second * 1e3 for second in seconds)
            axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], color="#2a6f97")
            axis.set(xlabel=f"{KINDS[kind]}, ms", ylabel="share of requests", ylim=(0, 1.02))
            axis.set_xlim(left=0)
            if kind in report.target_s:
                axis.axvline(report.target_s[kind] * 1e3, color="#c1121f", linestyle=":", label="target")
                axis.legend(frameon=False)
            axis.grid(alpha=0.25)
        _flow(axes[3], good)
        figure.suptitle(
            f"{report.what}: {report.requests_per_s:.2f} requests/s, "
            f"{report.output_tokens_per_s:.0f} output tokens/s, {sum(report.errors.values())} errors"
        )
        figure.savefig(file, dpi=120)


def _flow(axis, good: Sequence[Answer]) -> None:
    """Tokens a second: each piece of an answer counts an equal share of its tokens."""
    axis.set(xlabel="seconds", ylabel="output tokens/s")
    axis.grid(alpha=0.25)
    if not good:
        return
    start = min(answer.due for answer in good)
    width = max(max(answer.times) for answer in good) - start
    width = max(width, 1e-6) / BINS
    bins = [0.0] * BINS
    for answer in good:
        for when in answer.times:
            bins[min(int((when - start) / width), BINS - 1)] += answer.output_tokens / len(answer.times)
    axis.step(
        [i * width for i in range(BINS)], [count / width for count in bins], where="post", color="#2a6f97"
    )
    axis.set_ylim(bottom=0)

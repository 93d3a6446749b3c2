"""The HTML report: self-contained, safe with any text, right in what it says."""

import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.telemetry import MetricsFile
from maxstack.train.report import write_report
from maxstack.train.report.page import POLICY
from maxstack.train.report.records import read, smoothed, spread, thinned

BAD = "<script>alert(\"x\")</script> & 'quotes' </pre>"
VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """What a browser would find: tags with attributes, text, and whether tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def make_run(
    folder: Path, *, steps: int = 80, sources: tuple[str, ...] = ("books",), full: bool = True
) -> Path:
    folder.mkdir(exist_ok=True)
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(1, steps + 1):
            row = {"kind": "train", "step": step, "loss": 2 + 4 / step}
            if full:
                row |= {
                    "tokens": 100, "tokens_per_second": 1000.0 + step, "step_seconds": 0.1, "data_wait_seconds": 0.001,
                    "gradient_norm": 1.0, "learning_rate": 1e-3, "host_memory_bytes": 2**30 + step,
                    "device_memory_bytes": 2**31, "skipped_steps": 2,
                }  # fmt: skip
            if step == 41:
                row["resumed"] = True
            file.write(row)
            if full and step % 20 == 0:
                losses = {source: {"nll": 3.0, "bits_per_byte": 1.0 + 1 / step} for source in sources}
                file.write({"kind": "evaluation", "step": step, "held_out": losses})
    if full:
        with MetricsFile(folder / "samples.jsonl") as file:
            for step in range(10, steps + 1, 10):
                file.write({"step": step, "prompt": BAD, "text": f"text of {step} {BAD}"})
        seconds = {"compile": 5.0, "step": 15.0, "idle": 0.0}
        goodput = {"seconds": seconds, "wall_seconds": 20.0, "starts": 2}
        (folder / "goodput.json").write_text(json.dumps(goodput))
        entries = [
            {"name": f"gzip -9 {BAD}", "bits_per_byte": 3.0}, {"name": "broken", "bits_per_byte": None},
            {"name": "maxstack", "bits_per_byte": 2.0},
        ]  # fmt: skip
        (folder / "comparison.json").write_text(json.dumps(entries))
        (folder / "run.py").write_text(f"# {BAD}\ndef config():\n    return 3 < 4\n")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    folder = make_run(tmp_path_factory.mktemp("runs") / f"demo {'&'} <b>", sources=("books", f"web {BAD}"))
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text()


def test_the_page_fetches_nothing(report):
    page = Page(report)
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in page.all("meta")
    fetching = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "srcset", "data")
    ]
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key.endswith("href")]
    assert not fetching
    assert all(link.startswith("#") for link in links)
    assert "@import" not in report
    assert not re.search(r"url\((?!#)", report)


def test_text_of_users_and_models_is_only_text(report):
    page = Page(report)
    assert BAD not in report
    assert page.text.count(BAD) >= 6, "prompt, sample, source, comparison and run show it as written"
    assert not page.all("b") or all(not attrs for attrs in page.all("b"))


def test_samples_of_several_steps_first_and_last_among_them(report):
    shown = re.findall(r"text of (\d+)", Page(report).text)
    assert len(shown) == 6
    assert (shown[0], shown[-1]) == ("10", "80")


def test_numbers_and_the_interruption_are_told(report):
    text = Page(report).text
    for part in (
        "80 steps on 8,000 tokens in 20 s", "Interrupted once, after step 40, and resumed", "2.050", "1,040",
        "2.00 GiB", "compile 25.0%", "step 75.0%", "Over 2 starts",
        "return 3 < 4", "interrupted and resumed",
    ):  # fmt: skip
        assert part in text, part
    assert "broken" not in text
    assert re.search(r"maxstack2\.000gzip -9 .*3\.000", text), "fewest bits first"
    assert 'class=ours><th scope="row">maxstack' in report


def test_every_chart_is_named_for_screen_readers_and_drawn_in_page_colours(report):
    charts = Page(report).all("svg")
    assert len(charts) == 8, (
        "loss twice (wide and narrow), throughput, rate, norm, data wait, memory, bits per byte"
    )
    for chart in charts:
        assert chart["role"] == "img"
        assert "starts at" in str(chart["aria-label"])
        assert "width" not in chart
    drawings = "".join(re.findall(r"<svg.*?</svg>", report, flags=re.DOTALL))
    assert "var(--series-1)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings), "no colour that would not follow light and dark"


def test_ids_are_unique(report):
    ids = [attrs["id"] for _, attrs in Page(report).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(use in ids for use in re.findall(r'href="#([^"]+)"', report))


def test_light_and_dark_texts_contrast_enough(report):
    style = re.findall(r"<style>(.*?)</style>", report, flags=re.DOTALL)[0]
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    for block in (light, dark):
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))
        for name in ("text", "muted", "accent", "mark", "series-1", "series-2", "series-3", "series-4"):
            for ground in ("page", "card"):
                # WCAG AA asks 4.5 of text and 3 of graphics.
                least = 3 if name.startswith("series") or name == "mark" else 4.5
                assert contrast(colours[name], colours[ground]) >= least, (name, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_run_with_nothing_but_losses_has_a_page(tmp_path):
    text = Page(write_report(make_run(tmp_path / "bare", steps=1, full=False)).read_text()).text
    assert "6.000" in text
    assert "Against compressors" not in text


def test_losses_that_are_not_finite_are_drawn_as_gaps_and_told(tmp_path):
    folder = tmp_path / "odd"
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(1, 50):
            bad = math.nan if step > 45 else math.inf if step == 20 else 2.0
            file.write({"kind": "train", "step": step, "loss": bad, "gradient_norm": bad})
    assert "not finite" in Page(write_report(folder).read_text()).text


def test_a_wildly_varying_gradient_norm_gets_a_logarithmic_axis(tmp_path):
    folder = tmp_path / "wild"
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(1, 50):
            file.write(
                {"kind": "train", "step": step, "loss": 2.0, "gradient_norm": 1e4 if step == 9 else 1.0}
            )
    assert "10,000" in Page(write_report(folder).read_text()).text


def test_a_step_done_twice_counts_as_it_was_done_last(tmp_path):
    folder = tmp_path / "twice"
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step, loss in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 1.0)]:
            file.write({"kind": "train", "step": step, "loss": loss})
    steps, losses = read(folder).series("loss")
    assert (list(steps), list(losses)) == ([1, 2, 3], [5.0, 1.0, 3.0])


def test_a_folder_without_steps_or_with_a_broken_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no training rows in"):
        write_report(tmp_path)
    folder = make_run(tmp_path / "run", steps=3, full=False)
    (folder / "comparison.json").write_text("{")
    with pytest.raises(UserError, match=r"comparison\.json is not valid JSON"):
        write_report(folder)


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = make_run(tmp_path / "run", steps=40)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_a_long_run_stays_a_small_page():
    steps = np.arange(1, 100_001, dtype=float)
    x, y = thinned(steps, steps * 2)
    assert len(x) == 1200
    np.testing.assert_allclose(y, 2 * x)
    assert x.mean() == pytest.approx(steps.mean(), rel=1e-3)  # the last bin may be a little larger
    assert thinned(steps[:10], steps[:10])[0] is not None


def test_smoothing_passes_over_holes_keeps_a_line_and_does_not_lag_at_the_start():
    line = np.arange(100, dtype=float)
    np.testing.assert_allclose(smoothed(line, 5)[:-5], line[:-5])
    holes = np.where(line == 50, np.nan, 7.0)
    np.testing.assert_allclose(smoothed(holes, 5), 7.0)
    assert np.isnan(smoothed(np.full(3, np.nan), 2)).all()


def test_spread_keeps_both_ends():
    rows = [{"step": step} for step in range(100)]
    assert [row["step"] for row in spread(rows, 4)] == [0, 33, 66, 99]
    assert spread(rows[:3], 4) == rows[:3]

"""The terminal display, on a terminal and without."""

import io
import math

import pytest
from rich.console import Console

from maxstack.telemetry import Display
from maxstack.telemetry.display import Trend, duration, printable, sparkline

ROW = {
    "step": 5, "loss": 2.34567, "tokens_per_second": 12345.6, "step_seconds": 0.5, "data_wait_seconds": 0.005,
    "gradient_norm": 1.25, "learning_rate": 3e-4, "device_memory_bytes": 3 * 2**30, "skipped_steps": 0,
}  # fmt: skip


def console(*, terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, _environ={})


def text(made: Console) -> str:
    return made.file.getvalue()


def rendered(display: Display, width: int = 100) -> str:
    plain = console(terminal=False, width=width)
    plain.print(display.render())
    return text(plain)


def test_without_a_terminal_it_writes_plain_lines():
    made = console(terminal=False)
    with Display(10, console=made) as display:
        display.step(ROW, seconds_left=200.0)
        display.evaluation(5, {"books": {"nll": 2.0, "bits_per_byte": 1.5}})
        display.sample(5, "To be", " or not")
        display.message("saved step 5")
    lines = text(made).splitlines()
    assert lines[0].startswith(
        "step 5/10  loss 2.3457  tokens/s 12,346  step 0.500 s  learning rate 3.00e-04"
    )
    assert lines[0].endswith("3 min 20 s left")
    assert lines[1:] == [
        "step 5  held out: books 2.0000 nats/token, 1.5000 bits/byte",
        "step 5  sample: To be or not",
        "saved step 5",
    ]
    assert "\x1b" not in text(made)


def test_plain_lines_come_no_faster_than_asked_but_the_last_step_always():
    made = console(terminal=False)
    with Display(10, console=made, lines_every_s=1000.0) as display:
        for step in range(1, 11):
            display.step(ROW | {"step": step})
    assert [line.split()[1] for line in text(made).splitlines()] == ["1/10", "10/10"]


def test_on_a_terminal_it_redraws_and_leaves_the_cursor_visible_even_after_an_error():
    made = console(terminal=True)

    def interrupted() -> None:
        with Display(10, console=made) as display:
            display.step(ROW)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "step 5/10" in text(made)
    assert text(made).rindex("\x1b[?25h") > text(made).rindex("\x1b[?25l")


def test_the_picture_shows_all_figures():
    display = Display(10, mode="live", console=console(terminal=True), title="runs/demo")
    display.step(ROW, seconds_left=4000.0)
    display.evaluation(5, {"books": {"nll": 2.0, "bits_per_byte": 1.5}})
    display.sample(5, "To be", " or not")
    shown = rendered(display)
    for part in ("runs/demo", "step 5/10", "1 h 06 min left", "2.3457", "12,346", "3.00e-04", "1.250", "1.0%",
                 "3.00 GiB", "books 2.0000 nats/token", "sample at step 5", "To be or not"):  # fmt: skip
        assert part in shown


@pytest.mark.parametrize("width", [20, 40, 200])
def test_the_picture_fits_any_width(width):
    display = Display(10, mode="live", console=console(terminal=True, width=width))
    display.step(ROW)
    display.sample(5, "To be", " or not " * 200)
    shown = rendered(display, width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert len(shown.splitlines()) < 30, "a long sample is cut"


def test_it_starts_without_a_row_and_bears_rows_with_holes():
    display = Display(10, mode="live", console=console(terminal=True))
    assert "starting" in rendered(display)
    display.step({"step": 1, "loss": None, "gradient_norm": math.nan})
    display.step({"step": 2, "loss": math.inf})
    assert "step 2/10" in rendered(display)


def test_off_is_silent():
    made = console(terminal=True)
    with Display(10, mode="off", console=made) as display:
        display.step(ROW)
        display.message("hello")
    assert text(made) == ""


def test_text_of_a_model_can_do_nothing_to_the_terminal():
    bad = "\x1b[31mred\x07 \u202eright to left [bold]not markup[/bold]\rback"
    assert printable(bad) == "<1b>[31mred<7> <202e>right to left [bold]not markup[/bold]<d>back"
    made = console(terminal=False)
    with Display(10, console=made) as display:
        display.sample(1, "", bad)
    assert "[bold]not markup[/bold]" in text(made)
    assert "\x1b" not in text(made)


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 3600, 90061)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "25 h 01 min",
    ]  # fmt: skip


def test_the_sparkline_falls_with_the_loss():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline([float(i) for i in range(1000)], 48)) == 48


def test_a_trend_stays_small_and_keeps_its_mean():
    trend = Trend(size=16)
    for value in range(4096):
        trend.add(float(value))
    trend.add(math.nan)
    points = trend.values()
    assert len(points) <= 16
    assert points == sorted(points)
    assert sum(points) / len(points) == pytest.approx(2047.5, rel=0.1)  # the last points may still be open

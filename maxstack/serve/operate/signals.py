"""Ctrl-C and SIGTERM: the first asks the server to finish what it has, the second ends it at once."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = 130


@contextlib.contextmanager
def handled(asked: Callable[[str], None]) -> Iterator[None]:
    """Inside, `asked` is called in the event loop with the name of the first signal. Main thread only."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    came = False

    def came_one(number: signal.Signals) -> None:
        nonlocal came
        if came:
            end_at_once()
        came = True
        # From here on in the interpreter itself: it works also while the event loop is kept busy.
        for each in SIGNALS:
            loop.remove_signal_handler(each)
            signal.signal(each, lambda *_: end_at_once())
        asked(number.name)

    for number in SIGNALS:
        loop.add_signal_handler(number, came_one, number)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def end_at_once() -> None:
    """Leave without finishing anything."""
    with contextlib.suppress(OSError):
        os.write(2, b"\nmaxstack serve: stopped at once\n")
    os._exit(AT_ONCE)

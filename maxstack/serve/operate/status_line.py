"""One line at the foot of the terminal: what the server does just now."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from maxstack.serve.operate.operation import Operation

EVERY_S = 0.5


class StatusLine:
    """Redrawn in place where standard error is a terminal; elsewhere nothing."""

    def __init__(
        self,
        operation: Operation,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._operation, self._clock = operation, clock
        self._console = console or Console(stderr=True)
        self._then: tuple[float, int] | None = None
        self._rate = 0.0

    async def show(self) -> None:
        """Until cancelled."""
        if not self._console.is_terminal:
            return
        live = Live(console=self._console, refresh_per_second=4, transient=True, redirect_stdout=False)
        with contextlib.suppress(OSError), live:  # where the terminal goes away, the server stays
            while True:
                live.update(Text(self.text(), style="dim"), refresh=True)
                await asyncio.sleep(EVERY_S)

    def text(self) -> str:
        """The line as it is now."""
        operation, engine = self._operation, self._operation.engine
        if engine is None or not operation.phases.ready:
            return f"starting: {operation.phases.text()}"
        counters = engine.scheduler.counters
        now, tokens = self._clock(), counters.generation_tokens
        if self._then is not None and now > self._then[0]:
            latest = (tokens - self._then[1]) / (now - self._then[0])
            self._rate += 0.5 * (latest - self._rate)
        self._then = now, tokens
        well, told = operation.health()
        words = [] if well and told["status"] == "ok" else [str(told["status"])]
        words += [
            f"{counters.num_requests_running} running", f"{counters.num_requests_waiting} waiting",
            f"{self._rate:,.0f} tok/s", f"cache {counters.kv_cache_usage_perc:.0%}",
        ]  # fmt: skip
        if counters.prefix_cache_queries:
            words.append(f"prefix hits {counters.prefix_cache_hits / counters.prefix_cache_queries:.0%}")
        return " · ".join(words)

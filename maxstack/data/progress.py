"""Showing how far preparing has come."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from maxstack.data.scan import Progress, Report

log = logging.getLogger(__name__)


@contextmanager
def shown() -> Iterator[Report]:
    """A report for `prepare` that shows bars on a terminal, and elsewhere logs each stage once it begins."""
    if not sys.stderr.isatty():
        yield _logged()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[tuple[str, str], TaskID] = {}

        def report(progress: Progress) -> None:
            key = progress[:2]
            if key not in tasks:
                tasks[key] = bars.add_task(" ".join(key))
            bars.update(tasks[key], completed=progress.done, total=progress.total or None)

        yield report


def _logged() -> Report:
    seen: set[tuple[str, str]] = set()

    def report(progress: Progress) -> None:
        if progress[:2] not in seen:
            seen.add(progress[:2])
            log.info("%s %s", *progress[:2])

    return report

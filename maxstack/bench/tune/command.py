"""`maxstack bench kernels --tune`: what is being tried is said as it goes, what is found is kept at once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from maxstack.bench.measure import Case
from maxstack.bench.tune.kept import keep, sentence, table
from maxstack.bench.tune.race import Effort
from maxstack.bench.tune.search import Found, Now, tuned, words
from maxstack.config import write_atomically
from maxstack.kernels import Unsupported
from maxstack.kernels.tiles import Sizes, user_file

DONE, INTERRUPTED = 0, 130


def main(cases: Sequence[Case], effort: Effort, file: Path | None) -> int:
    """Tune all cases, or as many as there is time for; returns the exit code."""
    keep([], user_file())  # that it cannot be written is said before the work
    journal, code = Journal(cases, Console(stderr=True)), DONE
    try:
        _tune(journal, effort)
    except KeyboardInterrupt:
        code = INTERRUPTED
        journal.say("stopped")
    if effort.spent:
        journal.say("the time is over")
    print(table(journal.found))
    for case in journal.missed():
        print(f"not tried: {named(case)}")
    print(keep(journal.found, user_file()))
    if file is not None:
        write_atomically(file, json.dumps(journal.row(), indent=1).encode())
    return code


def _tune(journal: "Journal", effort: Effort) -> None:
    done: dict[str, Sizes] = {}
    for case in journal.cases:
        if effort.spent:
            return
        with journal.console.status("") as status:
            show = journal.begin(case, status)
            try:
                for found in tuned(case, effort=effort, done=done, watch=show):
                    journal.add(found)
            except Unsupported as reason:
                journal.say(f"{named(case)}: not tuned: {reason}")
        journal.end(case)


def named(case: Case) -> str:
    """For people."""
    return f"{case.kernel}, {case.shape}"


@dataclass
class Journal:
    """What was found, and what is being done, on standard error."""

    cases: Sequence[Case]
    console: Console
    found: list[Found] = field(default_factory=list)
    ended: int = 0
    """Cases that there is nothing more to do for."""

    def begin(self, case: Case, status: Status):
        """Say that this is the next; returns what shows its progress."""
        title = f"{self.ended + 1} of {len(self.cases)}: {named(case)}"
        status.update(Text(f"{title} …"))

        def show(now: Now) -> None:
            text = progress(now)
            status.update(Text(f"{title}: {text}"))
            if (
                not self.console.is_terminal and now.stage != "timing"
            ):  # where nobody sees a status, a line each
                self.say(f"{title}: {text}")

        return show

    def add(self, found: Found) -> None:
        """Keep and tell it."""
        self.found.append(found)
        keep(self.found, user_file())
        self.say(sentence(found))
        for dropped in found.dropped:
            self.say(f"  dropped {dropped}")

    def end(self, case: Case) -> None:
        """There is nothing more to do for the next case."""
        self.ended += 1
        if not any(found.case is case for found in self.found):
            self.say(f"{named(case)}: nothing to try: what serves it has no sizes, or they were tuned above")

    def missed(self) -> list[Case]:
        """Cases that nothing is known of."""
        return [
            case for case in self.cases[self.ended :] if all(found.case is not case for found in self.found)
        ]

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "found": [each.row() for each in self.found], "not_tried": [named(case) for case in self.missed()],
        }  # fmt: skip

    def say(self, text: str) -> None:
        """A line on standard error."""
        self.console.print(Text(text), soft_wrap=True)


def progress(now: Now) -> str:
    """For people."""
    names = f"{words(now.sizes)}: {now.stage}, {now.left} left" if now.sizes else now.stage
    best = f"; best so far {words(now.best)} ({now.ratio:.2f} times as fast)" if now.best else ""
    return f"{now.request.key}: {names}{best}"

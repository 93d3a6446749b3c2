"""Whether guesses pay: what they bring against what they cost, both measured, for so many rows.

A step that checks guesses takes longer than one that does not: by how much is measured once, when the programs are
compiled. How many guesses come true is learned while they are made; where none are, now and then a plan tries again.
No answer depends on it.
"""

from collections.abc import Mapping

MEMORY = 200
"""Row-steps after which what was learned has faded by a factor of e."""
AGAIN = 64
"""Of so many plans that could have guesses and do not, one has."""
MARGIN = 1.05
"""What guesses must bring at least, times their cost."""


class Pace:
    """Guesses of the next plan. Used by one thread."""

    def __init__(self, drafts: int, costs: Mapping[int, float]):
        """`costs`, by number of rows: the time of a step with `drafts` guesses a row over that of a step without."""
        self.drafts, self.costs = drafts, dict(sorted(costs.items()))
        self.kept = drafts / 2
        """Guesses that come true, of a row in a step."""
        self._without = 0

    def drafts_for(self, rows: int) -> int:
        """Guesses a row of a plan with at most so many rows: all, or none."""
        cost = next((cost for most, cost in self.costs.items() if most >= rows), None)
        if not self.drafts or cost is None:
            return 0
        if 1 + self.kept > cost * MARGIN:
            return self.drafts
        self._without += 1
        return self.drafts if self._without % AGAIN == 0 else 0

    def learn(self, row_steps: int, tokens: int) -> None:
        """In so many steps of rows so many tokens were said."""
        if not row_steps:
            return
        weight = min(row_steps / MEMORY, 1.0)
        self.kept += weight * (tokens / row_steps - 1 - self.kept)

"""Tokens that rows say again, in invariant mode: what they had said before they lost their pages.

Read like a prompt they would leave keys and values that are rounded otherwise than those of decode steps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maxstack.serve.plan import Chunk, Plan, Start

NONE = -1


class Replays:
    """What each row has to say whatever it would draw."""

    def __init__(self, rows: int):
        self._tokens: list[tuple[int, ...]] = [()] * rows

    def seat(self, start: Start) -> None:
        """A row gets a request, which may have said something before."""
        self._tokens[start.row] = start.tokens

    def of_chunks(self, chunks: Sequence[Chunk], places: int) -> Any:
        """The first token of each row whose prompt ends, `NONE` where it is to be drawn; for so many places."""
        known = np.full(places, NONE, np.int32)
        for i, chunk in enumerate(chunks):
            if chunk.last and (said := self._tokens[chunk.row]):
                known[i] = said[0]
        return known

    def of_steps(self, plan: Plan, places: int) -> Any:
        """[steps, places]: as `of_chunks`, of each decode step."""
        known = np.full((plan.steps, places), NONE, np.int32)
        for i, decode in enumerate(plan.decodes):
            said = self._tokens[decode.row]
            if (first := decode.length - len(decode.request.prompt)) < len(said):
                again = said[first : first + plan.steps]
                known[: len(again), i] = again
        return known

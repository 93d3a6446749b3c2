"""A request on its way: what the scheduler remembers of it."""

from maxstack.serve.prefix import Node
from maxstack.serve.request import Request


class Sequence:
    """Tokens known so far, the pages they are in, and what plans under way will add.

    First it reads: chunks bring `computed` up to `target`, all the tokens that were known when it got its row. Then it
    decodes: plans add up to `pending` tokens that the host has not seen yet. A preempted sequence gives up its pages
    and reads again, its own tokens included; in invariant mode it reads its prompt and says its own tokens again.
    """

    __slots__ = (
        "admitted", "cached", "computed", "dirty", "epoch", "finished", "first_token", "fresh", "keys", "last_plan",
        "last_token", "losses", "named", "node", "order", "pages", "pending", "replay", "request", "row", "salt",
        "target", "tokens", "waits_for",
    )  # fmt: skip

    def __init__(self, request: Request, order: tuple[float, int], salt: bytes):
        self.request = request
        self.order = order
        """Who comes first: the time of arrival, moved by priority, then a running number. It never changes."""
        self.tokens = list(request.prompt)
        self.row: int | None = None
        self.pages: list[int] = []
        self.target = 0
        self.computed = 0
        """While it reads: positions that are in the pages, or will be when the plans under way are done."""
        self.pending = 0
        self.replay = 0
        """The last so many of `tokens` are to come again, from the row that it has now."""
        self.last_plan = -1
        self.epoch = 0
        """Counts the rows it had: results of an earlier one are void."""
        self.finished = False
        self.fresh = False
        """No plan has said yet that the row is this sequence's."""
        self.dirty = False
        """The pages changed since the last plan with this row."""
        self.losses = 0

        self.salt = salt
        self.keys: list[bytes] = []
        self.node: Node | None = None
        """Of the last page that has a name."""
        self.named = 0
        """Pages that have one, or whose content has."""
        self.waits_for: bytes | None = None
        """Key of the page that an earlier request is computing, and this one would like to share."""
        self.cached = -1
        """Prompt tokens found in the prefix cache when it first got a row; -1 before."""

        self.admitted: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None

    @property
    def length(self) -> int:
        """Tokens that the row has at most when the plans under way are done."""
        return len(self.tokens) - self.replay + self.pending

    @property
    def reading(self) -> bool:
        """Has known tokens that are not in the cache."""
        return self.computed < self.target

    @property
    def generated(self) -> int:
        """Tokens of the answer that the host has seen."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that may still be planned, those that come again included."""
        return self.request.max_tokens - self.generated + self.replay - self.pending

    @property
    def settled(self) -> int:
        """Positions whose content is decided by tokens that the host knows."""
        return self.computed if self.reading else max(self.computed, len(self.tokens) - self.replay - 1)

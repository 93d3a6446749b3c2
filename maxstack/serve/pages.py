"""The pool of cache pages: who holds each, which are free, which are kept because they may be wanted again."""

from collections.abc import Callable, Iterable


class Pages:
    """Reference counts of the pages of a pool.

    A page is in one of three places: held (by sequences, and by plans under way that may still touch the pages of a
    sequence that is gone), kept (nobody holds it, but the prefix cache has a name for it; the longest unused is the
    first to go), or free.
    """

    def __init__(self, count: int):
        self.count = count
        self.refs = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._kept: dict[int, None] = {}  # in the order in which they were let go
        self._named = [False] * count
        self._lent: dict[int, list[list[int]]] = {}  # by the plan that must be done before they are let go
        self.on_evict: Callable[[int], None] = self.unname
        """Told to forget the name of a kept page that is wanted for other tokens."""

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def coming(self) -> int:
        """Pages that plans under way alone hold: available when these are done."""
        return sum(self.refs[page] == 1 for lists in self._lent.values() for pages in lists for page in pages)

    def take(self) -> int | None:
        """A page for new tokens, None when there is none."""
        if not self._free:
            if not self._kept:
                return None
            self.on_evict(next(iter(self._kept)))
        page = self._free.pop()
        self.refs[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that the prefix cache named."""
        if not self.refs[page]:
            del self._kept[page]
        self.refs[page] += 1

    def release(self, pages: Iterable[int], after: int | None = None) -> None:
        """One holder less of each page, at once or when plan `after` is done.

        They are let go from the last to the first: a prefix is worth more than what follows it.
        """
        if after is not None:
            self._lent.setdefault(after, []).append(list(pages))
            return
        for page in reversed(list(pages)):
            if not self.refs[page]:
                raise RuntimeError(f"page {page} is released, but nobody holds it")
            self.refs[page] -= 1
            if not self.refs[page]:
                if self._named[page]:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def plan_done(self, number: int) -> None:
        """Let go of what was held for this plan."""
        for pages in self._lent.pop(number, ()):
            self.release(pages)

    def name(self, page: int) -> None:
        """The prefix cache knows what is in the page: keep it when nobody holds it."""
        self._named[page] = True

    def unname(self, page: int) -> None:
        """The opposite of `name`."""
        self._named[page] = False
        if page in self._kept:
            del self._kept[page]
            self._free.append(page)

    def census(self) -> dict[str, list[int]]:
        """Pages by place, for tests and reports: together they are all pages, each once."""
        held = [page for page, refs in enumerate(self.refs) if refs]
        return {"held": held, "kept": list(self._kept), "free": list(self._free)}

    def lent(self) -> list[list[int]]:
        """The lists of pages that plans under way hold."""
        return [pages for lists in self._lent.values() for pages in lists]

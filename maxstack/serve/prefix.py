"""The prefix cache: full pages named by the tokens in them and before them, shared by requests that begin alike."""

from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

from maxstack.serve.pages import Pages


def digest(data: bytes) -> bytes:
    """16 bytes of BLAKE2b."""
    return blake2b(data, digest_size=16).digest()


class Node:
    """A named page: its tokens, and the node of the page before it. Equal nodes all the way up mean equal tokens."""

    __slots__ = ("children", "key", "page", "parent", "salt", "tokens")

    def __init__(self, key: bytes, parent: "Node | None", salt: bytes, tokens: tuple[int, ...], page: int):
        self.key = key
        self.parent = parent
        self.salt = salt
        self.tokens = tokens
        self.page: int | None = page
        """None once the page was given to other tokens."""
        self.children: dict[Node, None] = {}  # a dict for its order: a set of objects has none that lasts


class Prefix:
    """Names for full pages.

    The key of a page is a hash of the key before it and of its tokens; before the first one comes the salt, which is
    the tenant and the adapter. A key finds a node quickly, but is never believed: the node counts only if its
    parent is the node matched before and its tokens are the same, so a colliding hash costs a hit and nothing else.
    """

    def __init__(self, pages: Pages, page: int, hashed: Callable[[bytes], bytes] = digest):
        self._pages = pages
        self._page = page
        self._hashed = hashed
        self._nodes: dict[bytes, Node] = {}
        self._by_page: dict[int, Node] = {}
        pages.on_evict = self.forget
        self.collisions = 0
        """Keys that belonged to other tokens."""

    def salt(self, tenant: str, adapter: str) -> bytes:
        """What pages must have in common to be shared, besides tokens. It is compared itself, not its hash."""
        return repr((tenant, adapter)).encode()

    def lengthen(self, keys: list[bytes], salt: bytes, tokens: Sequence[int]) -> None:
        """Append the keys of those full pages of the tokens that have none yet."""
        size = self._page
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            before = keys[-1] if keys else salt
            keys.append(self._hashed(before + array("q", tokens[start : start + size]).tobytes()))

    def match(self, keys: list[bytes], salt: bytes, tokens: Sequence[int], most: int) -> list[Node]:
        """The nodes of the longest known beginning, `most` pages at most. Does not hold their pages."""
        found: list[Node] = []
        parent = None
        for i, key in enumerate(keys[:most]):
            node = self._nodes.get(key)
            if node is None or not self._same(
                node, parent, salt, tokens[i * self._page : (i + 1) * self._page]
            ):
                break
            found.append(node)
            parent = node
        return found

    def name(
        self, key: bytes, parent: Node | None, salt: bytes, tokens: Sequence[int], page: int
    ) -> Node | None:
        """Name a page by the tokens in it, after those of `parent`.

        Returns the node of these tokens: a new one, or the one there is, whose page has the same content. None if the
        key belongs to other tokens or the parent is forgotten: what follows cannot be named either.
        """
        if parent is not None and parent.page is None:
            return None
        node = self._nodes.get(key)
        if node is not None:
            return node if self._same(node, parent, salt, tokens) else None
        node = self._nodes[key] = self._by_page[page] = Node(key, parent, salt, tuple(tokens), page)
        if parent is not None:
            parent.children[node] = None
        self._pages.name(page)
        return node

    def forget(self, page: int) -> None:
        """Drop the name of a page, if it has one, and those of the pages after it, which nobody could find any more."""
        node = self._by_page.get(page)
        if node is None:
            return
        if node.parent is not None:
            node.parent.children.pop(node, None)
        pending = [node]
        while pending:
            node = pending.pop()
            pending.extend(node.children)
            node.children.clear()
            if node.page is None:
                raise RuntimeError("a forgotten page is still in the tree of the prefix cache")
            del self._nodes[node.key]
            del self._by_page[node.page]
            self._pages.unname(node.page)
            node.page = None

    def clear(self) -> None:
        """Drop all names."""
        for page in tuple(self._by_page):
            self.forget(page)

    def named(self) -> dict[int, Node]:
        """Nodes by page, for tests and reports."""
        return dict(self._by_page)

    def _same(self, node: Node, parent: Node | None, salt: bytes, tokens: Sequence[int]) -> bool:
        same = node.parent is parent and node.salt == salt and node.tokens == tuple(tokens)
        self.collisions += not same
        return same

"""Names of pages: found by equal tokens after equal tokens, and by nothing else."""

from maxstack.serve.pages import Pages
from maxstack.serve.prefix import Prefix

TOKENS = tuple(range(12))


def filled(pages: Pages, prefix: Prefix, tokens: tuple[int, ...], salt: bytes) -> list[int]:
    """Pages for the tokens, named, as a sequence would have them."""
    keys: list[bytes] = []
    prefix.lengthen(keys, salt, tokens)
    node, taken = None, []
    for i, key in enumerate(keys):
        taken.append(pages.take())
        node = prefix.name(key, node, salt, tokens[4 * i : 4 * i + 4], taken[-1])
    return taken


def found(prefix: Prefix, tokens: tuple[int, ...], salt: bytes) -> list[int | None]:
    keys: list[bytes] = []
    prefix.lengthen(keys, salt, tokens)
    return [node.page for node in prefix.match(keys, salt, tokens, len(tokens))]


def test_the_longest_beginning_of_full_pages_is_found():
    pages = Pages(8)
    prefix = Prefix(pages, 4)
    salt = prefix.salt("", "")
    taken = filled(pages, prefix, TOKENS, salt)
    assert found(prefix, TOKENS, salt) == taken
    assert found(prefix, TOKENS[:11], salt) == taken[:2]
    assert found(prefix, (*TOKENS[:6], 99, 7, *TOKENS[8:]), salt) == taken[:1]
    assert found(prefix, TOKENS[4:], salt) == []  # the same page after other tokens


def test_tenants_and_adapters_share_nothing():
    pages = Pages(8)
    prefix = Prefix(pages, 4)
    filled(pages, prefix, TOKENS, prefix.salt("a", "b"))
    for other in (("", ""), ("a", ""), ("", "b"), ("ab", ""), ("b", "a")):
        assert found(prefix, TOKENS, prefix.salt(*other)) == []


def test_a_colliding_hash_finds_nothing_and_is_counted():
    pages = Pages(8)
    prefix = Prefix(pages, 4, hashed=lambda data: b"x")
    salt = prefix.salt("", "")
    taken = filled(pages, prefix, TOKENS[:4], salt)
    assert found(prefix, TOKENS[:4], salt) == taken
    assert found(prefix, (4, 4, 4, 4), salt) == []
    assert prefix.collisions == 1
    assert prefix.name(b"x", None, salt, (4, 4, 4, 4), 5) is None


def test_a_page_given_to_others_is_not_found_nor_what_followed_it():
    pages = Pages(3)
    prefix = Prefix(pages, 4)
    salt = prefix.salt("", "")
    taken = filled(pages, prefix, TOKENS, salt)
    pages.release(taken[:1])  # only the first: two others are still held
    assert pages.take() == taken[0]
    assert found(prefix, TOKENS, salt) == []
    assert prefix.named() == {}
    pages.release(taken)
    assert pages.census()["kept"] == []


def test_the_end_of_a_sequence_goes_before_its_beginning():
    pages = Pages(3)
    prefix = Prefix(pages, 4)
    salt = prefix.salt("", "")
    taken = filled(pages, prefix, TOKENS, salt)
    pages.release(taken)
    assert pages.take() == taken[2]
    assert found(prefix, TOKENS, salt) == taken[:2]

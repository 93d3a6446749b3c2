"""The page's colours as WCAG AA asks, light and dark, read from its style sheet: no browser is needed."""

import re

import pytest

from maxstack.serve import page

TEXT, SHAPE = 4.5, 3.0
"""Least contrast of text, and of what is no text but must be seen."""
GROUNDS = ("paper", "sheet", "raised", "code")
ON = [
    *(("ink", ground, TEXT) for ground in (*GROUNDS, "tint")),
    *(("soft", ground, TEXT) for ground in GROUNDS),
    *(("accent", ground, TEXT) for ground in ("paper", "raised")),
    *(("accent", ground, SHAPE) for ground in (*GROUNDS, "tint")),
    ("on-accent", "accent", TEXT), ("warn", "warn-tint", TEXT), ("ink", "warn-tint", TEXT),
]  # fmt: skip


def colours(theme: int) -> dict[str, tuple[float, ...]]:
    """By name, of the light theme (0) or the dark one (1)."""
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", page.files()["page.css"].decode())
    assert found
    return {name: of(pair[theme]) for name, *pair in found}


def of(text: str) -> tuple[float, ...]:
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


def mixed(one: tuple[float, ...], other: tuple[float, ...], share: float) -> tuple[float, ...]:
    return tuple(share * a + (1 - share) * b for a, b in zip(one, other, strict=True))


def luminance(colour: tuple[float, ...]) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_shapes_stand_out_from_what_they_are_on(theme):
    known = colours(theme)
    for name, ground, least in ON:
        assert contrast(known[name], known[ground]) >= least, (name, ground)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_is_read_on_shaded_tokens(theme):
    """Mixed as message.css mixes them: doubt, and the token that is looked at."""
    known, css = colours(theme), page.files()["message.css"].decode()
    shares = re.findall(r"color-mix\(in srgb, var\(--(doubt|accent)\) (\d+)%, transparent\)", css)
    assert {name for name, _ in shares} == {"doubt", "accent"}
    for ground in ("paper", "code"):
        for name, share in shares:
            behind = mixed(known[name], known[ground], int(share) / 100)
            assert contrast(known["ink"], behind) >= TEXT, (name, share, ground)


def test_hints_within_fields_have_a_colour_of_their_own():
    """Browsers' own is too faint on dark grounds."""
    assert "::placeholder { color: var(--soft); opacity: 1; }" in page.files()["page.css"].decode()

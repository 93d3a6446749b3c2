"""A rendered conversation for people: what is supervised stands out."""

from maxstack.data.chat.renderer import Rendered

MARKS = ("⟦", "⟧")


def show(rendered: Rendered, *, colour: bool = True) -> str:
    """The text with its supervised spans marked: in colour for a terminal, or between ⟦ and ⟧."""
    pieces, at = [], 0
    for begin, end in [*rendered.supervised, (len(rendered.text),) * 2]:
        pieces += [(_visible(rendered.text[at:begin]), False), (_visible(rendered.text[begin:end]), True)]
        at = end
    if colour:
        return "".join(_painted(text, on) for text, on in pieces if text)
    return "".join(f"{MARKS[0]}{text}{MARKS[1]}" if on else text for text, on in pieces if text)


def _painted(text: str, on: bool) -> str:
    style = "\x1b[1;30;42m" if on else "\x1b[2m"
    # A style ends with its line, so that a pager or a narrow terminal does not paint the rest of it.
    return "\n".join(f"{style}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def _visible(text: str) -> str:
    """The text without characters that would steer the terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text)

"""What can be set while one talks: how tokens are chosen, and values that the chat template knows."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from maxstack.config import UserError
from maxstack.config.fields import accepts, hints, meanings, members
from maxstack.models.generation import SamplingParams

TEMPLATE = "template."
"""Settings that begin with it go to the chat template: `/set template.enable_thinking false`."""
NOT_HERE = ("logprobs", "prompt_logprobs", "logit_bias", "stop_token_ids")
"""Of SamplingParams, for programs rather than people."""
LONGEST_ANSWER = 1024
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
KINDS = {int: "a whole number", float: "a number", bool: "on or off", types.NoneType: "none"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A value: `changed` gives another one."""

    sampling: SamplingParams = SamplingParams(max_tokens=LONGEST_ANSWER)
    """How tokens are chosen."""
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template."""

    def changed(self, name: str, text: str) -> "Settings":
        """With one setting read from text. Raises UserError for an unknown name and for a value that does not fit."""
        if name.startswith(TEMPLATE):
            value = json_or_text(text.strip())
            return dataclasses.replace(self, template={**self.template, variable(name): value})
        name = name.strip().replace("-", "_")
        if name not in names():
            raise UserError(unknown("setting", name, [*names(), f"{TEMPLATE}NAME"]))
        value = read(name, hints(SamplingParams)[name], text.strip())
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, **{name: value}))

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value and meaning of each."""
        told = meanings(SamplingParams)
        rows = [(name, shown(getattr(self.sampling, name)), told.get(name, "")) for name in names()]
        return rows + [
            (f"{TEMPLATE}{name}", shown(value), "A variable of the chat template.")
            for name, value in self.template.items()
        ]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; `from_plain` reads it."""
        kept = {name: getattr(self.sampling, name) for name in names()}
        return {**kept, "stop": list(self.sampling.stop), "template": dict(self.template)}


def from_plain(values: Any) -> Settings:
    """Settings as `plain` wrote them. Raises UserError for any other thing."""
    if not isinstance(values, dict):
        raise UserError(f"settings are {type(values).__name__}, not an object with names")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    template = given.pop("template", {})
    if not isinstance(template, dict):
        raise UserError(f"settings: template is {type(template).__name__}, not an object with names")
    for name, value in given.items():
        if name not in names():
            raise UserError(unknown("setting", name, [*names(), "template"]))
        hint = hints(SamplingParams)[name]
        if not accepts(hint, value):
            raise UserError(f"setting {name} is {value!r}: {kind(hint)} is expected")
        given[name] = float(value) if hint is float else value
    sampling = dataclasses.replace(Settings().sampling, **given)
    return Settings(sampling=sampling, template={variable(name): value for name, value in template.items()})


def names() -> list[str]:
    """Fields of SamplingParams that can be set here."""
    return [field.name for field in dataclasses.fields(SamplingParams) if field.name not in NOT_HERE]


def read(name: str, hint: Any, text: str) -> Any:
    """A value of the type from text."""
    for choice in members(hint):
        if choice is types.NoneType and text.lower() == "none":
            return None
        if typing.get_origin(choice) is not None:
            return texts(text)
        try:
            if choice is bool:
                return TRUTH[text.lower()]
            if choice in (int, float):
                return choice(text.replace("_", ""))
        except (ValueError, KeyError):
            continue
    raise UserError(f"{name} is {text!r}: {kind(hint)} is expected")


def texts(text: str) -> tuple[str, ...]:
    """Stop strings: "none", one JSON string, a JSON list of them, or the words as they are."""
    if text.lower() in ("none", ""):
        return ()
    value = json_or_text(text) if text[0] in '"[' else text
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in found):
        raise UserError(f"stop is {text}: a text, or a JSON list of texts is expected")
    return tuple(found)


def json_or_text(text: str) -> Any:
    """What JSON makes of it, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def kind(hint: Any) -> str:
    """A type in words."""
    return " or ".join(KINDS.get(choice, "a text, or a JSON list of texts") for choice in members(hint))


def shown(value: Any) -> str:
    """A value as `changed` reads it."""
    if isinstance(value, tuple):
        return json.dumps(list(value), ensure_ascii=False) if value else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def variable(name: str) -> str:
    """The template's variable that a setting stands for."""
    word = name.removeprefix(TEMPLATE).strip()
    if not word.isidentifier():
        raise UserError(
            f"{name!r}: after {TEMPLATE} comes the name of a variable, as in {TEMPLATE}enable_thinking"
        )
    return word


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Says that a name is unknown, which is nearest, and which there are."""
    listed = list(known)
    near = difflib.get_close_matches(name, listed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {what} {name!r}; {hint}There are {', '.join(listed)}"

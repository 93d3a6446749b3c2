"""Overrides on the command line: `--optim.peak-lr 3e-4`. Values are read, and help is written, by tyro."""

import contextlib
import dataclasses
import difflib
import io
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from maxstack.config.errors import UserError
from maxstack.config.fields import accepts, hints, is_config, meanings, members, type_name

_REFUSED = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a flag leads: steps from the root (field names, indices, keys), the type, value and docstring there."""

    steps: tuple[str | int, ...]
    hint: Any
    value: Any
    meaning: str

    @property
    def is_group(self) -> bool:
        return is_config(self.value) or any(map(dataclasses.is_dataclass, members(self.hint)))


def override[C](config: C, argv: Sequence[str], prog: str) -> C:
    """The configuration with the fields that `argv` names replaced: `--optim.peak-lr 3e-4 --no-tied`.

    `_` and `-` are the same in names. Members of a tuple are numbered (`--model.pattern.0.window`), those of a dict go
    by their key. A field that is one of several dataclasses, or none, is chosen by class name (`--optim Muon`,
    `--model.moe None`) and then has that class's defaults. `--help` lists every field, and exits with 0.

    Raises UserError for an unknown name, with the nearest known ones, and for a value of a wrong type or one that the
    configuration refuses.
    """
    given = _given(argv, prog)
    groups = [(name, values) for name, values in given if _is_choice(config, name)]
    for name, values in groups:
        place = _places(config)[name]
        config = _replaced(config, {place.steps: _chosen_class(name, values, place)})
    if {"-h", "--help"} & set(argv):
        _print_help(config, prog)
    places = _places(config)
    changes: dict[tuple[str | int, ...], Any] = {}
    for name, values in given:
        if (name, values) in groups:
            continue
        place, value = _read(name, values, places, prog)
        changes[place.steps] = value
    try:
        return _replaced(config, changes)
    except (ValueError, TypeError) as error:  # a __post_init__ refuses what is well-typed
        raise UserError(f"{error} (from {' '.join(argv)})") from error


def _print_help(config: Any, prog: str) -> None:
    """Tyro's help, and the fields that hold one of several dataclasses or none, which tyro leaves out. Exits with 0."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(
            type(config), args=["--help"], default=config, prog=prog, config=(tyro.conf.AvoidSubcommands,),
            registry=_registry(),
        )  # fmt: skip
    choices = [
        (name, place)
        for name, place in _places(config).items()
        if place.is_group and len(members(place.hint)) > 1
    ]
    if choices:
        print("\nparts chosen by class name (a part chosen has its own fields above):")
    for name, place in choices:
        now = type(place.value).__name__ if place.value is not None else "None"
        print(f"  --{name} {{{','.join(type_name(choice) for choice in members(place.hint))}}}")
        print(f"        {place.meaning} (default: {now})")
    raise SystemExit(0)


def _registry() -> Any:
    """Tyro's rules, and one for `str | Callable`: a word is the name; a function can only be set in the run file."""
    from tyro import constructors

    def rule(info: constructors.PrimitiveTypeInfo) -> constructors.PrimitiveConstructorSpec | None:
        choices = members(info.type)
        if str not in choices or not any(typing.get_origin(choice) is Callable for choice in choices):
            return None
        return constructors.PrimitiveConstructorSpec(
            nargs=1, metavar="NAME", instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str) or callable(value),
            str_from_instance=lambda value: [getattr(value, "__name__", value)],
        )  # fmt: skip

    registry = constructors.ConstructorRegistry()
    registry.primitive_rule(rule)
    return registry


def _given(argv: Sequence[str], prog: str) -> list[tuple[str, tuple[str, ...]]]:
    """Names as `optim.peak-lr`, each with the words up to the next name."""
    given: list[tuple[str, list[str]]] = []
    for word in argv:
        if word in ("-h", "--help"):
            continue
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            given.append((name.replace("_", "-"), [value] if equals else []))
        elif given:
            given[-1][1].append(word)
        else:
            raise UserError(
                f"unexpected {word!r}; overrides are --name value, and {prog} --help lists the names"
            )
    return [(name, tuple(values)) for name, values in given]


def _places(config: Any) -> dict[str, _Place]:
    """Every flag without its dashes, groups included."""
    return {
        ".".join(str(step).replace("_", "-") for step in place.steps): place for place in _walk(config, ())
    }


def _walk(config: Any, steps: tuple[str | int, ...]) -> Iterator[_Place]:
    annotations, documented = hints(type(config)), meanings(type(config))
    for field in dataclasses.fields(config):
        if field.init:
            place = _Place(
                steps=(*steps, field.name),
                hint=annotations[field.name],
                value=getattr(config, field.name),
                meaning=documented.get(field.name, ""),
            )
            yield from _walk_value(place)


def _walk_value(place: _Place) -> Iterator[_Place]:
    yield place
    if is_config(place.value):
        yield from _walk(place.value, place.steps)
    elif isinstance(place.value, tuple) and any(map(is_config, place.value)):
        for i, item in enumerate(place.value):
            hint = _item_hint(place.hint, i)
            yield from _walk_value(dataclasses.replace(place, steps=(*place.steps, i), hint=hint, value=item))
    elif isinstance(place.value, dict):
        for key, item in place.value.items():
            hint = _item_hint(place.hint, 1)
            yield from _walk_value(
                dataclasses.replace(place, steps=(*place.steps, key), hint=hint, value=item)
            )


def _item_hint(hint: Any, i: int) -> Any:
    for choice in members(hint):
        args = getattr(choice, "__args__", ())
        if args:
            return args[0] if args[-1] is Ellipsis else args[min(i, len(args) - 1)]
    return Any


def _is_choice(config: Any, name: str) -> bool:
    place = _places(config).get(name)
    return place is not None and place.is_group


def _chosen_class(name: str, values: tuple[str, ...], place: _Place) -> Any:
    classes = {type_name(choice): choice for choice in members(place.hint)}
    if len(classes) == 1:
        inner = ", ".join(
            f"--{name}.{field.name.replace('_', '-')}" for field in dataclasses.fields(place.value)
        )
        raise UserError(f"--{name} is a group of fields: {inner}")
    if len(values) != 1 or values[0] not in classes:
        raise UserError(f"--{name}: {' '.join(values) or 'no value'}; expected one of {', '.join(classes)}")
    chosen = classes[values[0]]
    if chosen is type(None):
        return None
    try:
        return chosen()
    except TypeError as error:  # fields without a default
        raise UserError(
            f"--{name} {values[0]} has fields without a default; choose it in the run file"
        ) from error


def _read(name: str, values: tuple[str, ...], places: dict[str, _Place], prog: str) -> tuple[_Place, Any]:
    head, _, last = name.rpartition(".")
    if name not in places and last.startswith("no-"):
        positive = places.get(f"{head}.{last[3:]}" if head else last[3:])
        if positive is not None and bool in members(positive.hint):
            if values:
                raise UserError(f"--{name} takes no value; given {' '.join(values)}")
            return positive, False
    if name not in places:
        raise UserError(_unknown(name, places, prog))
    place = places[name]
    if isinstance(place.value, tuple) and any(
        map(dataclasses.is_dataclass, members(_item_hint(place.hint, 0)))
    ):
        raise UserError(
            f"--{name}: members are set one by one, --{name}.0.…; their number is set in the run file"
        )
    if bool in members(place.hint) and not values:
        return place, True
    value = _parsed(name, values, place)
    if value is _REFUSED or not accepts(place.hint, value):  # tyro takes NaN for a number
        given = " ".join(values) if values else "no value"
        raise UserError(f"--{name}: {given!r}; expected {type_name(place.hint)} (now {place.value!r})")
    return place, value


def _parsed(name: str, values: tuple[str, ...], place: _Place) -> Any:
    import tyro

    if place.hint is str and len(values) == 1:
        return values[0]  # also when it begins with a dash
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(place.hint, args=values, console_outputs=False, registry=_registry())
    except SystemExit:
        return _REFUSED
    except tyro.constructors.UnsupportedTypeAnnotationError as error:
        raise UserError(f"--{name}: a {type_name(place.hint)} can only be set in the run file") from error


def _unknown(name: str, places: dict[str, _Place], prog: str) -> str:
    head = name
    while "." in head:
        head = head.rpartition(".")[0]
        if head in places and places[head].value is None and places[head].is_group:
            choices = ", ".join(type_name(choice) for choice in members(places[head].hint))
            return f"unknown --{name}: {head} is None in this run; choose with --{head} one of {choices}"
    leaves = [known for known, place in places.items() if not is_config(place.value)]
    ends = {known.rpartition(".")[2]: known for known in leaves}
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, leaves, n=3, cutoff=0.6)
    near += [
        ends[end] for end in difflib.get_close_matches(last, ends, n=2, cutoff=0.75) if ends[end] not in near
    ]
    hint = f"nearest known: {', '.join('--' + known for known in near)}; " if near else ""
    return f"unknown --{name}; {hint}{prog} --help lists all"


def _replaced(value: Any, changes: dict[tuple[str | int, ...], Any]) -> Any:
    """The value with those at the given steps changed; each dataclass on the way is built once, with all changes."""
    if () in changes:
        return changes[()]
    below: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for steps, new in changes.items():
        below.setdefault(steps[0], {})[steps[1:]] = new
    if not below:
        return value
    if isinstance(value, tuple):
        return tuple(_replaced(item, below.get(i, {})) for i, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _replaced(item, below.get(key, {})) for key, item in value.items()}
    inner = {str(name): _replaced(getattr(value, str(name)), change) for name, change in below.items()}
    return dataclasses.replace(value, **inner)

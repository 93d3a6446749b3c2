"""Configurations as JSON, for checkpoints: classes go by name, and a name leads only to dataclasses of maxstack.

Classes and functions of the user's own go by name too, once `register` has let them in.
"""

import dataclasses
import enum
import importlib
import inspect
import json
import math
from pathlib import Path, PurePath
from typing import Any

from maxstack.config.errors import UserError
from maxstack.config.fields import is_config, short, wrong_types

_PACKAGE = "maxstack."
_REGISTERED: dict[str, Any] = {}


def register[T](thing: T, name: str | None = None) -> T:
    """Lets `from_dict` find this dataclass, Enum or function of the user's; also one that moved, by its old name.

    Returns it, so it serves as a decorator. Raises UserError when the name is another's already.
    """
    name = name or _full_name(thing)
    if _REGISTERED.setdefault(name, thing) is not thing:
        raise UserError(f"{name} is registered for another class, {_REGISTERED[name]}")
    return thing


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON values: `{"class": "maxstack.….Name", field: …}`, tuples as arrays.

    Raises UserError for a value that JSON cannot carry, and for a class that `from_dict` would refuse.
    """
    if not is_config(config):
        raise UserError(f"expected a dataclass, got {short(config)}")
    return _encode(config, type(config).__name__)


def to_json(config: Any) -> str:
    """`to_dict` as text."""
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Any:
    """The configuration that `to_json` wrote."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not a configuration: {error}") from error
    return from_dict(data)


def from_dict(data: Any) -> Any:
    """The configuration that `to_dict` made. A field absent from the data has its default.

    Raises UserError for a class that is neither in maxstack nor registered, a field that the class does not have, and
    values that it refuses.
    """
    if not isinstance(data, dict) or "class" not in data:
        raise UserError(f"not a configuration: {short(data)}")
    try:
        config = _decode(data, "")
    except (
        TypeError,
        KeyError,
        ValueError,
    ) as error:  # a __post_init__ refuses, or the data are of another form
        raise (
            error if isinstance(error, UserError) else UserError(f"not a configuration: {error!r}")
        ) from error
    wrong = next(wrong_types(config), None)
    if wrong:
        raise UserError(f"{type(config).__name__}.{wrong}")
    return config


def _full_name(thing: Any) -> str:
    """The name of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def _encode(value: Any, place: str) -> Any:
    if is_config(value):
        if _find_class(_full_name(type(value)), place) is not type(value):
            raise UserError(f"{place}: another class has the name {_full_name(type(value))}")
        names = [field.name for field in dataclasses.fields(value) if field.init]
        items = {name: _encode(getattr(value, name), f"{place}.{name}") for name in names}
        return {"class": _full_name(type(value)), **items}
    if isinstance(value, enum.Enum):
        _find_class(_full_name(type(value)), place)
        return {"enum": _full_name(type(value)), "name": value.name}
    if inspect.isfunction(value):
        if _function(_full_name(value), place) is not value:
            raise UserError(f"{place}: another function has the name {_full_name(value)}")
        return {"function": _full_name(value)}
    if isinstance(value, tuple):
        return [_encode(item, f"{place}.{i}") for i, item in enumerate(value)]
    if isinstance(value, list):
        return {"list": [_encode(item, f"{place}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        pairs = [[_encode(key, place), _encode(item, f"{place}.{key}")] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UserError(f"{place}: {short(value)}, a {type(value).__name__}, cannot be written as JSON")


def _decode(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, f"{place}.{i}") for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "class" in value:
        return _decode_config(value, place)
    if "enum" in value:
        return _find_class(value["enum"], place)[value["name"]]
    if "function" in value:
        return _function(value["function"], place)
    if "list" in value:
        return list(_decode(value["list"], place))
    if "dict" in value:
        return {_decode(key, place): _decode(item, f"{place}.{key}") for key, item in value["dict"]}
    if "path" in value:
        return Path(value["path"])
    if "float" in value:
        return float(value["float"])
    raise UserError(f"{place or 'configuration'}: not understood: {short(value)}")


def _decode_config(value: dict[str, Any], place: str) -> Any:
    cls = _find_class(value["class"], place)
    items = {name: _decode(item, f"{place}.{name}") for name, item in value.items() if name != "class"}
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    unknown = sorted(set(items) - set(known))
    if unknown:
        raise UserError(
            f"{place or 'configuration'}: {cls.__name__} has no {', '.join(unknown)} (it has {', '.join(known)}); "
            "was this written by a newer version?"
        )
    try:
        return cls(**items)
    except TypeError as error:  # fields without default are absent
        raise UserError(f"{place or 'configuration'}: {error}") from error


def _function(name: Any, place: str) -> Any:
    """The registered function of that name; none but these, or a name would lead to any code."""
    found = _REGISTERED.get(name) if isinstance(name, str) else None
    if not inspect.isfunction(found):
        raise UserError(
            f"{place}: {name} is not a registered function; it needs maxstack.config.register, and its module imported "
            "(maxstack --import MODULE …)"
        )
    return found


def _find_class(name: Any, place: str) -> Any:
    """The class of that name, if it is registered or a dataclass or Enum defined in a module of maxstack."""
    place = place or "configuration"
    if not isinstance(name, str):
        raise UserError(f"{place}: a class name is text, got {short(name)}")
    if name in _REGISTERED:
        return _REGISTERED[name]
    module_name, _, class_name = name.rpartition(".")
    if not module_name.startswith(_PACKAGE) or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"{place}: {name} is not a class of maxstack; one of yours needs maxstack.config.register, and its module "
            "imported (maxstack --import MODULE …)"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{place}: {name}: there is no module {module_name} in this version") from error
    is_class = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
    if not is_class or found.__module__ != module_name:
        raise UserError(f"{place}: {name} is not a configuration class of maxstack in this version")
    return found

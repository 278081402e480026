"""Words what is wrong with a configuration, and prints a class with its defaults and help texts."""

from __future__ import annotations

import difflib
import inspect
import json
import types
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from r1engine.config.aliases import answer_to

KeyPath = tuple[str, ...]

_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    date: "a day as 2024-08-01",
    types.NoneType: "null",
    Any: "any value",
}


def commented_defaults(model: type[BaseModel]) -> str:
    """Every key with its default, its choices and its help text, as YAML."""
    return "\n".join(_default_lines(model, model())) + "\n"


def _default_lines(model: type[BaseModel], defaults: BaseModel | None) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        value = getattr(defaults, name) if defaults is not None else field.default
        section = section_of(field)
        if section is None:
            shown = "(required)" if defaults is None and field.is_required() else show(plain_value(value))
            words = [" ".join(field.description.split())] if field.description else []
            words += [requirement(field)] if get_origin(field.annotation) is Literal else []
            lines.append(f"{name}: {shown}" + (f"  # {' '.join(words)}" if words else ""))
            continue
        about = f"  # {inspect.cleandoc(section.__doc__)}" if section.__doc__ else ""
        # An optional section is off by default: its keys are shown, but as comments.
        lead = "# " if value is None else ""
        given = value if isinstance(value, BaseModel) else None  # nor has one that is required a default
        lines += [f"{lead}{name}:{about}", *(f"{lead}  {line}" for line in _default_lines(section, given))]
    return lines


def plain_value(value: Any) -> Any:
    """A path as text, anything else as it is."""
    return str(value) if isinstance(value, Path) else value


def explain(
    item: Any, model: type[BaseModel], data: Any, others: Mapping[str, type[BaseModel]]
) -> list[tuple[KeyPath, str]]:
    """One pydantic error in our words, and the key that each line is about.

    Args:
        item:   of ValidationError.errors().
        model:  the class that was asked for.
        data:   its values.
        others: kind -> class of the other kinds of stage.
    """
    loc = tuple(str(part) for part in item["loc"])
    if item["type"] == "value_error":  # a check of ours, already worded, the keys too if it is of the whole
        key = f"{'.'.join(loc)}: " if loc else ""
        return [(loc, key + line) for line in str(item["ctx"]["error"]).splitlines()]
    if item["type"] in ("extra_forbidden", "invalid_key"):
        inside = list(_names_in(_value_at(data, loc)))  # verl's keys have three parts, of which none is ours
        return [(loc, _unknown_key(loc, model, others, inside))]
    path, required = _required_at(loc, model)
    found = _value_at(data, path)
    what = "nothing" if item["type"] == "missing" else show(found)
    return [(path, f"{'.'.join(path)}: found {what}, required {required}")]


def _required_at(loc: KeyPath, model: type[BaseModel]) -> tuple[KeyPath, str]:
    """The innermost field, or section of a list or by name, on the way to `loc`, and what it takes.

    pydantic appends union branches and mapping keys to a location.
    """
    depth = 0
    while depth < len(loc):
        field = model.model_fields[loc[depth]]
        depth += 1
        section, required = section_of(field), requirement(field)
        if section is None and (section := _named_section(field)) is not None and depth < len(loc):
            depth += 1  # the name
            required = _words(section, [])
        if section is None or depth == len(loc):
            return loc[:depth], required
        model = section
    raise ValueError(f"_required_at: empty location in {model.__name__}")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section class a field holds, also when it may be null; None for a plain value, or several sections."""
    if get_origin(field.annotation) in (dict, list):
        return None
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _named_section(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the sections that a field holds by names of the user's choice, or in a list; None: it holds none."""
    kind = get_args(field.annotation)[-1] if get_origin(field.annotation) in (dict, list) else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def requirement(field: FieldInfo) -> str:
    """What a field takes, in words: "a number > 0 and <= 1"."""
    return _words(field.annotation, field.metadata)


def _words(kind: Any, metadata: list[Any]) -> str:
    if hasattr(kind, "__metadata__"):  # Annotated[kind, Field(...)]
        inner = [bound for item in kind.__metadata__ for bound in getattr(item, "metadata", [item])]
        return _words(kind.__origin__, inner)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(show(value) for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg, []) for arg in args)
    if origin is list:
        return f"a list, each {_words(args[0], [])}"
    if origin is dict:
        return f"a mapping from {_words(args[0], [])} to {_words(args[1], [])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        needed = [name for name, inner in kind.model_fields.items() if inner.is_required()]
        return f"a mapping with {', '.join(needed)}" if needed else "a mapping (leave the key out to take the defaults)"
    bounds = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in _BOUNDS if hasattr(m, name)]
    return " ".join([_TYPE_WORDS[kind], " and ".join(bounds)]).strip()


def _names_in(value: Any) -> Iterator[str]:
    """The last parts of the keys of a section."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _names_in(inner) if isinstance(inner, dict) else [str(key)]


def _unknown_key(loc: KeyPath, model: type[BaseModel], others: Mapping[str, type[BaseModel]], inside: list[str]) -> str:
    section: type[BaseModel] = model
    for part in loc[:-1]:
        if part in section.model_fields:  # else it is the name of a section, or its place in a list
            field = section.model_fields[part]
            section = section_of(field) or _named_section(field) or section
    names, key = list(section.model_fields), loc[-1]
    close = difflib.get_close_matches(key, names, n=1)
    elsewhere = [path for path in _leaves(model, ()) if path[-1] == key]
    if not close:
        close = [".".join(path) for path in elsewhere]
    message = f"unknown key {'.'.join(loc)}"
    owners = [kind for kind, other in others.items() if other is not model and _has_key(other, loc)]
    if owners:
        return f"{message}; it belongs to stage: {' or '.join(owners)}"
    if aliases := [answer for name in (key, *inside) if (answer := answer_to(name))]:
        return f"{message}; {'; '.join(aliases)}"
    if close:
        return f"{message}; did you mean {' or '.join(repr(name) for name in close)}?"
    owner = ".".join(loc[:-1]) or "the config"
    return f"{message}; the keys of {owner} are {', '.join(names)}"


def _has_key(model: type[BaseModel], loc: KeyPath) -> bool:
    section: type[BaseModel] | None = model
    for part in loc:
        if section is None or part not in section.model_fields:
            return False
        section = section_of(section.model_fields[part])
    return True


def _leaves(model: type[BaseModel], path: KeyPath) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            yield (*path, name)
        else:
            yield from _leaves(section, (*path, name))


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(data, list):
            data = data[int(part)] if part.isdigit() and int(part) < len(data) else None
        else:
            data = data.get(part) if isinstance(data, dict) else None
    return data


def show(value: Any) -> str:
    """A value as it would stand in YAML, cut to one short line."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(show, value)) + "]"
    elif isinstance(value, str) and not value.isprintable():
        text = json.dumps(value)  # in double quotes a line feed can be written
    else:
        text = (
            {None: "null", True: "true", False: "false"}[value]
            if value is None or value is True or value is False
            else repr(value)
        )
    return text if len(text) <= 80 else text[:77] + "..."

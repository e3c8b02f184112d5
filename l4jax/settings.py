"""Settings files to frozen dataclasses: YAML, then `key.sub=value` words over it, then checks that name the key.

The command line comes before the file, the file before the defaults of the dataclasses. An unknown key stops the
program and names the nearest known one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from l4jax.config import Llama4Config, preset


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the content of a YAML file with `key.sub=value` words put over it, unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML or holds no settings, or a word is no `key=value`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}; the ones that come with l4jax are in configs/")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; expected lines such as `steps: 100`")
    override(content, overrides)
    return content


def override(content: dict[str, Any], words: Sequence[str]) -> None:
    """Puts `key.sub=value` words into nested dicts; values are read as YAML.

    Raises:
        ValueError: a word is no `key=value`, or its key leads through a single value.
    """
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} is no setting; write key=value, for example optimizer.learning_rate=1e-3")
        *parents, last = key.split(".")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: {parent} is a single value and has nothing inside")
        inner[last] = yaml.safe_load(value)


def build(cls, content: Any, where: str = "", *, root=None):
    """Returns a dataclass filled from nested dicts.

    Fields may be plain values, `Literal`s, dataclasses, a `Llama4Config` (a preset or the content of a `config.json`),
    lists and dicts by name of these, `Any`, and each of these or None.

    Args:
        cls: the dataclass.
        content: what the file has for it.
        where: key that leads to `content`, for errors.
        root: the dataclass of the whole file, in whose keys the nearest one is looked for; `cls` by default.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type.
    """
    root = root or cls
    if cls is Llama4Config:
        if isinstance(content, str):
            return preset(content)
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: expected a preset or the content of a config.json, got {content!r}")
        return Llama4Config.from_hf(content)
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected settings inside, got {content!r}")
    prefix = f"{where}." if where else ""
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            raise ValueError(f"unknown key {prefix}{key}; {_nearest(str(key), prefix, list(fields), root)}")
    missing = [name for name, field in fields.items() if name not in content and _is_required(field)]
    if missing:
        raise ValueError(f"missing key {', '.join(prefix + name for name in missing)}; {cls.__doc__.splitlines()[0]}")
    return cls(**{key: _value(hints[key], value, f"{prefix}{key}", root) for key, value in content.items()})


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint, value: Any, where: str, root):
    if _is_union(hint):
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, root=root)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected settings by name, got {value!r}")
        _, inner = typing.get_args(hint)
        return {str(name): _value(inner, content, f"{where}.{name}", root) for name, content in value.items()}
    if typing.get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        (inner,) = typing.get_args(hint)
        return [_value(inner, entry, f"{where}[{i}]", root) for i, entry in enumerate(value)]
    if hint is typing.Any:
        return value
    if typing.get_origin(hint) is typing.Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ValueError(f"{where}={value!r} must be one of {', '.join(map(str, allowed))}")
        return value
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML reads 1e-3, without a point, as a word.
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise ValueError(f"{where}={value!r} is a {type(value).__name__}, expected {hint.__name__}")
    return value


def _is_union(hint) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _known_keys(cls, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(prefix + name)
        for inner in typing.get_args(hint) if _is_union(hint) else (hint,):
            path = f"{prefix}{name}."
            if typing.get_origin(inner) is dict:
                inner, path = typing.get_args(inner)[1], f"{path}NAME."
            if dataclasses.is_dataclass(inner) and inner is not Llama4Config:
                keys += _known_keys(inner, path)
    return keys


def _nearest(name: str, prefix: str, beside: Sequence[str], root) -> str:
    """Returns a hint: the known key most like `prefix + name`, among those beside it or anywhere; else those beside."""
    # Of keys that end alike, the one in the same part of the file is meant.
    known = sorted(_known_keys(root), key=lambda key: key.partition(".")[0] == prefix.partition(".")[0])
    last_names = {key.rpartition(".")[2]: key for key in known} | {key: prefix + key for key in beside}
    near = [name] if name in last_names else difflib.get_close_matches(name, beside, n=1)
    near = near or difflib.get_close_matches(name, last_names, n=1)
    return f"did you mean {last_names[near[0]]}?" if near else f"known keys here are {', '.join(beside)}"

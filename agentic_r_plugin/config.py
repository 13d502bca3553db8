"""Typed configuration: a YAML file and `key=value` overrides into a frozen dataclass, on OmegaConf.

Unknown keys and wrong types are errors that name the file and the key; what was resolved is saved beside the output.
A file may build on another one: `extends: FILE`, a path seen from its own folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from agentic_r_plugin import components
from agentic_r_plugin.credentials import redacted
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.store import atomic_path

T = TypeVar("T")

FREE: Mapping[str, Any] = {"decides": False}
"""Metadata of a setting that cannot change the result (speed, memory, retries, log output, the output's own path).

It may differ when work is resumed. A setting without one of these flags decides the result.
"""

BY_CONTENTS: Mapping[str, Any] = {"decides": "contents"}
"""Metadata of a setting that names a file, a folder or a model: its contents decide the result, its name does not."""


def options_of(kind: str, field: str = "backend") -> dict[str, Any]:
    """Metadata of a dictionary with the options of one component; `field` next to it holds the component's name.

    A component declares its options in a dataclass `Options` in its class, whose fields carry the same flags.
    An option that is not declared decides the result.
    """
    return {"options_of": (kind, field)}


def load_config(
    cls: type[T],
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    append: Mapping[str, Sequence[Any]] | None = None,
) -> T:
    """Defaults of `cls`, then the YAML file, then `values`, then the overrides (`a.b=value`), the later winning.

    Args:
        cls: a dataclass; a field without a default must be given. With `PRESETS` and a field `preset`, the values of
            the preset that was chosen anywhere come right after the defaults.
        values: fields by name, as plain Python values (flags of a command, paths a caller fills in).
        append: items added to list fields, after everything else.

    Raises:
        ConfigError: no such file, broken YAML, unknown key, wrong type, or a value the dataclass refuses.
    """
    merged: Any = _writable(OmegaConf.structured(cls))
    preset = _preset(cls, file, overrides, values or {})
    if preset:
        merged = _merge(merged, preset, f"preset of {cls.__name__}")
    if file is not None:
        merged = _merge(merged, _read(Path(file)), str(file))
    for name, value in (values or {}).items():
        merged = _merge(merged, {name: value}, cls.__name__)
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: expected key=value")
        merged = _merge(merged, _parsed(override), f"override {redacted(override)!r}")
    for name, items in (append or {}).items():
        merged[name] = [*merged[name], *items]
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{cls.__name__}: no value for {', '.join(missing)}" + (f" in {file}" if file else ""))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error, cls.__name__)) from error


def _parsed(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"override {redacted(override)!r}: the value is not YAML: {problem}") from error


def _preset(
    cls: type, file: str | Path | None, overrides: Sequence[str], values: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The values of the preset that file, values or overrides choose; None where `cls` refuses or has none."""
    presets = getattr(cls, "PRESETS", None)
    if presets is None:
        return None
    chosen = (_read(Path(file)) or {}).get("preset") if file is not None else None
    chosen = values.get("preset", chosen)
    for override in overrides:
        name, _, value = override.partition("=")
        chosen = value if name == "preset" else chosen
    return presets.get(chosen)


def _writable(node: Any) -> Any:
    """OmegaConf makes the nodes of frozen dataclasses read-only; until they are objects they must take values."""
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, False)
        for key in node:
            if not OmegaConf.is_missing(node, key):
                _writable(node[key])
    return node


def _read(file: Path, extended_by: tuple[Path, ...] = ()) -> Any:
    """The file's content, over that of the file it extends."""
    try:
        content = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(
            f"{file}: expected a mapping of settings, found {type(OmegaConf.to_container(content)).__name__}"
        )
    if "extends" not in content:
        return content
    parent, chain = (file.parent / str(content.pop("extends"))).resolve(), (*extended_by, file.resolve())
    if parent in chain:
        raise ConfigError(f"{file}: extends {parent}, which extends it in turn")
    return _merge(_read(parent, chain), content, str(file))


def _merge(base: Any, update: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(base, update)
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error, source)) from error


def _reason(error: OmegaConfBaseException, source: str) -> str:
    """In one line: where it was given, which key, and why it cannot be."""
    reason, key = str(error).partition("\n")[0], getattr(error, "full_key", None)
    return f"{source}: key {key!r}: {reason}" if key else f"{source}: {reason}"


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, key by key, also within mappings.

    >>> merged({"llm": {"model": "m", "dtype": "auto"}, "topk": 3}, {"llm": {"dtype": "float16"}})
    {'llm': {'model': 'm', 'dtype': 'float16'}, 'topk': 3}
    """
    both = {
        key: merged(base[key], value) if isinstance(value, Mapping) and isinstance(base[key], Mapping) else value
        for key, value in over.items()
        if key in base
    }
    return {**base, **over, **both}


def to_dict(config: Any) -> dict[str, Any]:
    """Plain types, for saving and hashing."""
    return dataclasses.asdict(config)


def deciding(config: Any, *, names: bool = False) -> dict[str, Any]:
    """The settings that can change the result, nested ones too, as plain types.

    Work that is resumed compares these with the settings it was begun with.

    Args:
        config: an object of a dataclass of settings. The metadata `decides` of a field is True (the default), False
            (`FREE`), "contents" (`BY_CONTENTS`), another string (compared elsewhere), or a function that reduces the
            value to what decides.
        names: whether the names of files and models are compared (work that does not know their contents).

    >>> @dataclasses.dataclass
    ... class Settings:
    ...     out: str = dataclasses.field(metadata=FREE)
    ...     model: str = dataclasses.field(metadata=BY_CONTENTS)
    ...     seed: int = 0
    >>> deciding(Settings("runs/1", "e5")), deciding(Settings("runs/1", "e5"), names=True)
    ({'seed': 0}, {'model': 'e5', 'seed': 0})
    """
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        decides, value = item.metadata.get("decides", True), getattr(config, item.name)
        if _left_out(decides, names):
            continue
        if callable(decides):
            value = decides(value)
        elif "options_of" in item.metadata:
            kind, named_by = item.metadata["options_of"]
            value = _deciding_options(kind, getattr(config, named_by), value, names)
        elif dataclasses.is_dataclass(value):
            value = deciding(value, names=names)
        found[item.name] = value
    return found


def _left_out(decides: Any, names: bool) -> bool:
    return decides is False or (isinstance(decides, str) and not (names and decides == BY_CONTENTS["decides"]))


def _deciding_options(kind: str, name: str, options: Mapping[str, Any], names: bool) -> dict[str, Any]:
    declared = getattr(components.load(kind, name), "Options", None) if options else None
    known = {item.name: item.metadata.get("decides", True) for item in dataclasses.fields(declared or _NoOptions)}
    return {option: value for option, value in options.items() if not _left_out(known.get(option, True), names)}


@dataclasses.dataclass
class _NoOptions:
    """Of a component that declares none."""


def free_settings(cls: type) -> list[str]:
    """Names of the fields of `cls` that may differ when work is resumed."""
    return [item.name for item in dataclasses.fields(cls) if _left_out(item.metadata.get("decides", True), names=True)]


def save_config(config: Any, file: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    with atomic_path(file) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), encoding="utf-8")


def fingerprint(*parts: Any) -> str:
    """Short stable hash of plain values (16 hex digits): the key of work that may be resumed.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

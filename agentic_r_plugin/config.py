"""Typed configuration: a YAML file and `key=value` overrides, merged into a frozen dataclass with OmegaConf.

Unknown keys and wrong types are errors that name the file and the key. The resolved configuration is saved with the
output. A file may build on another one with `extends: FILE`, a path relative to its own folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from agentic_r_plugin import components
from agentic_r_plugin.credentials import redacted, refuse_secrets
from agentic_r_plugin.errors import ConfigError, not_utf8
from agentic_r_plugin.store import atomic_path

T = TypeVar("T")

FREE: Mapping[str, Any] = {"decides": False}
"""Metadata of a setting that cannot change the result (speed, memory, retries, log output, the output's own path).

It may differ when work is resumed. A setting without this or the next flag can change the result.
"""

BY_CONTENTS: Mapping[str, Any] = {"decides": "contents"}
"""Metadata of a setting that names a file, folder or model: its contents can change the result, its name cannot."""


LATER: Mapping[str, Any] = {"later": True}
"""Metadata of a deciding setting that earlier versions did not have.

Its default is what they did, so only other values are compared, and work that they began can be resumed.
"""


@overload
def setting(text: str, *flags: Mapping[str, Any], default: T) -> T: ...
@overload
def setting(text: str, *flags: Mapping[str, Any], default_factory: Callable[[], T]) -> T: ...
@overload
def setting(text: str, *flags: Mapping[str, Any]) -> Any: ...
def setting(text: str, *flags: Mapping[str, Any], **options: Any) -> Any:
    """A field of a settings class.

    Args:
        text: what the setting is, for `--help` and `docs/settings.md`.
        flags: further metadata: `FREE`, `BY_CONTENTS`, `LATER`, `options_of(...)`, `section_of(...)`.
        options: `default` or `default_factory`, as in `dataclasses.field`.
    """
    metadata: dict[str, Any] = {"help": text}
    for flag in flags:
        metadata |= flag
    return dataclasses.field(metadata=metadata, **options)


def check_least(settings: Any, where: str = "", **least: int) -> None:
    """Raise ConfigError if a number among the fields of `settings` is below its least value; None is not checked.

    >>> from types import SimpleNamespace
    >>> check_least(SimpleNamespace(topk=0, depth=None), "search.", topk=1, depth=1)
    Traceback (most recent call last):
    agentic_r_plugin.errors.ConfigError: search.topk: expected at least 1, found 0
    """
    for name, lowest in least.items():
        if (value := getattr(settings, name)) is not None and value < lowest:
            raise ConfigError(f"{where}{name}: expected at least {lowest}, found {value}")


def options_of(kind: str, field: str = "backend") -> dict[str, Any]:
    """Metadata of a dictionary with the options of one component; the field `field` holds the component's name.

    A component declares its options in a dataclass `Options`, an attribute of it, with the same flags on its fields.
    An undeclared option counts as one that can change the result.
    """
    return {"options_of": (kind, field)}


def section_of(cls: type) -> dict[str, Any]:
    """Metadata of a dictionary with some of the settings of another class, of which the caller fills in the others.

    `load_config` checks the names and types of those that are given.
    """
    return {"section": cls}


def entries_of(cls: type[T], entries: Mapping[str, Any], name: str) -> dict[str, T]:
    """Entries of a dictionary setting as instances of a settings class.

    Raises:
        ConfigError: an unknown key or a wrong value; the message names the entry.
    """
    found = {}
    for key, values in entries.items():
        try:
            found[key] = values if isinstance(values, cls) else load_config(cls, values=values or {})
        except ConfigError as error:
            raise ConfigError(f"{name}.{key}: {error}") from error
    return found


def load_config(
    cls: type[T],
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    append: Mapping[str, Sequence[Any]] | None = None,
) -> T:
    """Merge the defaults of `cls`, the YAML file, `values` and the overrides (`a.b=value`), in rising precedence.

    Args:
        cls: a dataclass; a field without a default must be given. If it has `PRESETS` and a field `preset`, the values
            of the chosen preset come directly after the defaults, wherever it was chosen. `REMOVED` maps deciding
            settings of earlier versions to the value that is the rule now; they are accepted with this value, wherever
            the class is a command's settings, a group or a section of them.
        values: fields by name, as plain Python values (flags of a command, paths filled in by a caller).
        append: items added to list fields, after everything else.

    Raises:
        ConfigError: no such file, broken YAML, unknown key, wrong type, or a value that the dataclass rejects.
    """
    merged: Any = _writable(OmegaConf.structured(cls))
    # Found before merging: the file, a value or an override may choose it, and all of them override it.
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
        merged = _overridden(merged, override)
    for name, items in (append or {}).items():
        merged[name] = [*merged[name], *items]
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if "section" in item.metadata:
            # Merged only to check names and types: the caller fills in the other settings later.
            section = _writable(OmegaConf.structured(item.metadata["section"]))
            _merge(section, merged[item.name], f"{file or cls.__name__}: {item.name}")
    try:
        missing = sorted(str(key).removesuffix("_") for key in OmegaConf.missing_keys(merged))
        if missing:
            place = f" in {file}" if file else ""
            given = ", ".join(f"{key}=VALUE" for key in missing)
            raise ConfigError(f"{cls.__name__}: no value for {', '.join(missing)}{place}; give {given}")
        _check_texts(cls, merged, str(file or cls.__name__))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error, cls.__name__)) from error


def _check_texts(cls: type, merged: Any, source: str) -> None:
    """Refuse a mapping within a mapping of texts, which OmegaConf lets pass: it reads `agents.qwen2.5=X` as one."""
    for item in dataclasses.fields(cls):
        if item.type != "dict[str, str]":
            continue
        for name, value in (OmegaConf.to_container(merged[item.name]) or {}).items():  # type: ignore[union-attr]
            if not isinstance(value, str):
                raise ConfigError(
                    f"{source}: {item.name}.{name!s}: expected text, found {value!r}; a name with a dot is written "
                    f"'{item.name}[NAME]=VALUE'"
                )


def _overridden(base: Any, override: str) -> Any:
    """`base` with one override. `key=` is null where the setting may be null, else the empty text."""
    source = f"override {redacted(override)!r}"
    try:
        return _merge(base, _parsed(override), source)
    except ConfigError:
        if not override.endswith("="):
            raise
        return _merge(base, _parsed(f"{override}''"), source)


def _parsed(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"override {redacted(override)!r}: the value is not YAML: {problem}") from error


def _preset(
    cls: type, file: str | Path | None, overrides: Sequence[str], values: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Values of the preset chosen by file, values or overrides; None if there is no such preset."""
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
    """Make nodes of frozen dataclasses writable: OmegaConf makes them read-only, but they must accept values here."""
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, False)
        for key in node:
            if not OmegaConf.is_missing(node, key):
                _writable(node[key])
    return node


def _read(file: Path, extended_by: tuple[Path, ...] = ()) -> Any:
    """Content of the file, merged over that of the file it extends."""
    try:
        content = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: {not_utf8(error)}") from error
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
        return OmegaConf.merge(base, _without_removed(base, update, source))
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error, source)) from error


def _without_removed(base: Any, update: Any, source: str) -> Any:
    """`update` without the settings that `base` no longer has, if they hold the value that is the rule now."""
    if not isinstance(base, DictConfig) or not isinstance(update, Mapping):
        return update
    removed = getattr(OmegaConf.get_type(base), "REMOVED", {})
    for name in removed.keys() & update.keys():
        if update[name] != removed[name]:
            raise ConfigError(
                f"{source}: key {name!r}: this setting was removed and {removed[name]!r} is the rule, found "
                f"{update[name]!r}"
            )
    values: Any = OmegaConf.to_container(update) if isinstance(update, DictConfig) else update
    return {
        name: _without_removed(base.get(name), value, source) for name, value in values.items() if name not in removed
    }


def _reason(error: OmegaConfBaseException, source: str) -> str:
    """One line with the source, the key, the reason of an error, and where it is known the way out."""
    reason, key = str(error).partition("\n")[0], getattr(error, "full_key", None)
    settings = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(settings):
        names = [item.name.removesuffix("_") for item in dataclasses.fields(settings)]
        if near := difflib.get_close_matches(str(key).rpartition(".")[2], names, n=1):
            reason += f"; did you mean {near[0]!r}?"
    elif "is not a ListConfig" in reason:
        reason = f"expected a list: {key}=[VALUE]"
    elif isinstance(error, ValidationError) and "to Dict[" in reason:
        reason = f"expected names with values: {key}.NAME=VALUE"
    return f"{source}: key {key!r}: {reason}" if key else f"{source}: {reason}"


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` merged on top, recursively in mappings.

    >>> merged({"llm": {"model": "m", "dtype": "auto"}, "topk": 3}, {"llm": {"dtype": "float16"}})
    {'llm': {'model': 'm', 'dtype': 'float16'}, 'topk': 3}
    """
    both = {
        key: merged(base[key], value) if isinstance(value, Mapping) and isinstance(base[key], Mapping) else value
        for key, value in over.items()
        if key in base
    }
    return {**base, **over, **both}


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings; an empty mapping is a leaf.

    >>> dict(flat({"a": {"b": 1, "c": {}}, "d": 2}))
    {'a.b': 1, 'a.c': {}, 'd': 2}
    """
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain types, for saving and hashing."""
    return dataclasses.asdict(config)


def deciding(config: Any, *, names: bool = False) -> dict[str, Any]:
    """Settings that can change the result, nested ones included, as plain types.

    Resumed work compares these with the settings it was started with.

    Args:
        config: an instance of a settings dataclass. The metadata `decides` of a field is True (the default), False
            (`FREE`), "contents" (`BY_CONTENTS`), another string (compared elsewhere), or a function that reduces the
            value to the part that can change the result.
        names: whether to compare names of files and models (for work that does not know their contents).

    >>> @dataclasses.dataclass
    ... class Settings:
    ...     out: str = dataclasses.field(metadata=FREE)
    ...     model: str = dataclasses.field(metadata=BY_CONTENTS)
    ...     seed: int = 0
    >>> deciding(Settings("runs/1", "e5")), deciding(Settings("runs/1", "e5"), names=True)
    ({'seed': 0}, {'model': 'e5', 'seed': 0})
    """
    found: dict[str, Any] = dict(getattr(config, "REMOVED", {}))  # as in work that was started before
    for item in dataclasses.fields(config):
        decides, value = item.metadata.get("decides", True), getattr(config, item.name)
        if _left_out(decides, names) or ("later" in item.metadata and value == _default(item)):
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


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def _left_out(decides: Any, names: bool) -> bool:
    return decides is False or (isinstance(decides, str) and not (names and decides == BY_CONTENTS["decides"]))


def _deciding_options(kind: str, name: str, options: Mapping[str, Any], names: bool) -> dict[str, Any]:
    # A component is imported only if it has options to classify.
    declared = getattr(components.load(kind, name), "Options", None) if options else None
    fields = dataclasses.fields(declared) if declared else ()
    known = {item.name: item.metadata.get("decides", True) for item in fields}
    found: dict[str, Any] = {}
    for option, value in options.items():
        if not _left_out(decides := known.get(option, True), names):
            found[option] = decides(value) if callable(decides) else value
    return found


def free_settings(cls: type) -> list[str]:
    """Names of the fields of `cls` that may differ when work is resumed."""
    return [item.name for item in dataclasses.fields(cls) if _left_out(item.metadata.get("decides", True), names=True)]


def save_config(config: Any, file: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically.

    Raises:
        ConfigError: a setting holds a secret; nothing is written.
    """
    values = to_dict(config)
    refuse_secrets(type(config).__name__, values, "put it into an environment variable and give that variable's name")
    with atomic_path(file) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")


def fingerprint(*parts: Any) -> str:
    """Short stable hash of plain values (16 hex digits), used as key of resumable work.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

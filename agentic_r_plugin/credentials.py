"""Secrets: read from environment variables, checked, and kept out of errors, logs and files. Handled only here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from agentic_r_plugin.errors import ConfigError

HIDDEN = "***"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Anchored, because `prompt_cache_key` and `max_tokens` are ordinary options.
_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:api[_-]?key|secret[_-]?key|secret|password|passwd|authorization|credentials?)$"
    r"|^(?:key|(?:access|auth|bearer|hf|api)?[_-]?token)$",
    re.IGNORECASE,
)
_NAMES_VARIABLE = re.compile(r"(?:key|token|secret|password)_env$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_BEARER = re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/=-]{6,}")
_ASSIGNED = re.compile(
    r"((?:api[_-]?key|access[_-]?token|token|secret|password|passwd|authorization)[\"']?\s*[=:]\s*[\"']?"
    r"(?:Bearer |Basic )?)(?!Bearer |Basic )[^\s\"'&,;}\])]+",
    re.IGNORECASE,
)


def read_secret(variable: str, setting: str, *, required: bool = True) -> str | None:
    """The secret in an environment variable, stripped of white space; None for an empty variable name.

    Args:
        variable: name of the variable, from a configuration.
        setting: the setting that holds the name, for errors.
        required: whether an unset or empty variable is an error; otherwise it gives None.

    Raises:
        ConfigError: the variable is unset or empty, or an HTTP header cannot hold its value, which is never shown.
    """
    if not variable:
        return None
    value = os.environ.get(variable)
    if value is None or not (secret := value.strip()):
        if not required:
            return None
        state = "is not set" if value is None else "is empty"
        raise ConfigError(f"{setting}: environment variable {shown(variable)} {state}; it must hold the key or token")
    if not all(" " <= character <= "~" for character in secret):
        raise ConfigError(
            f"{setting}: the value of environment variable {shown(variable)} holds a line break or another character "
            "that no HTTP header can hold; expected printable ASCII (the value is not shown)"
        )
    return secret


def shown(variable: str) -> str:
    """Name of a variable for messages, hidden if it may be the secret itself, entered in place of the name."""
    if _NAME.fullmatch(variable) and variable == variable.upper():
        return variable
    return "(a name that is not shown, since it may be the secret itself; give the name of a variable)"


def authorization(secret: str | None) -> dict[str, str]:
    """HTTP header for a secret: a bearer token, or the scheme in the secret itself (`Basic ...`)."""
    if secret is None:
        return {}
    return {"Authorization": secret if secret.startswith(("Basic ", "Bearer ")) else f"Bearer {secret}"}


def redacted(text: str, *secrets: str | None) -> str:
    """Text for an error, log or file, without these secrets, passwords in URLs and values of keys.

    >>> redacted("http://ann:pw@host/v1?api_key=k1&n=2, k2", "k2")
    'http://***@host/v1?api_key=***&n=2, ***'
    """
    for secret in secrets:
        if secret:
            text = text.replace(secret, HIDDEN)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", _BEARER.sub(HIDDEN, _IN_URL.sub(HIDDEN, text)))


def _may_be_secret(variable: str) -> bool:
    return shown(variable) != variable and variable not in os.environ


def refuse_secrets(setting: str, value: Any, way_out: str) -> None:
    """Refuse a secret in a setting, because settings are written to manifests.

    Args:
        setting: name of the setting.
        value: a URL, or options by name, which may be nested.
        way_out: where to put the secret instead.

    Raises:
        ConfigError: a URL with a user or a key, an option named like a secret, or (in `..._env`) what may be a key in
            place of the name of a variable; the value is never shown.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            if _SECRET_NAME.search(str(name)) and isinstance(item, str):
                raise ConfigError(f"{setting}.{name}: settings are written to files; {way_out}")
            if _NAMES_VARIABLE.search(str(name)) and isinstance(item, str) and item and _may_be_secret(item):
                raise ConfigError(f"{setting}.{name}: environment variable {shown(item)} is not set; {way_out}")
            refuse_secrets(f"{setting}.{name}", item, way_out)
    elif isinstance(value, str) and "://" in value and redacted(value) != value:
        raise ConfigError(f"{setting}: the address holds a password or a key, and is written to files; {way_out}")

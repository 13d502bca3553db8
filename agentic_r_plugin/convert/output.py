"""The output of a conversion: claimed, written once, with a report next to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import deciding, to_dict
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.store import file_fingerprint

REPORT = ".report.json"
"""Suffix of the report, or its name in a folder; written last, so its existence means done."""


def convert_once(
    config: Any,
    write: Callable[[Path], Mapping[str, Any]],
    *,
    inputs: Mapping[str, str],
    made_from: Mapping[str, Any] | None = None,
    resume: bool,
    folder: bool = False,
) -> dict[str, Any]:
    """Write `config.out` with `write`, which returns the report; a finished output is left as it is on resume.

    An interrupted conversion begins again. The report is printed on stderr.

    Args:
        config: settings of the command; those that decide the result are compared on resume.
        inputs: input files by role; empty names are left out.
        made_from: what else is compared on resume.

    Raises:
        OutputExistsError: the output exists and `resume` is off.
        ManifestMismatchError: it was made from other inputs or settings.
        RecordError: no such input.
    """
    files = {f"input {role}": file_fingerprint(path) for role, path in inputs.items() if path}
    output = Output(
        out=Path(config.out), made_from=deciding(config) | files | dict(made_from or {}), done=REPORT, folder=folder
    )
    with output.claim(resume=resume) as held:
        held.begin(config=to_dict(config))
        if held.finished is None:
            try:
                held.finish(write(held.out))
            except Exception:
                if not folder:  # a file is written whole or not at all: nothing to go on from
                    held.manifest.unlink(missing_ok=True)
                raise
    assert held.finished is not None
    print(f"{config.out}: {json.dumps(held.finished, ensure_ascii=False)}", file=sys.stderr)
    return held.finished

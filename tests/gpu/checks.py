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
    """Seconds of the fastest of some calls, after one that is not counted; in the small form of one call."""
    if not small():
        work()
    best = float("inf")
    for _ in range(1 if small() else repeats):
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

    from agentic_r_plugin.agent import packed_attention
    from agentic_r_plugin.attention import has_kernel

    packed_attention.register()
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
    found = {packed_attention.NAME: packed(packed_attention.NAME)}
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


def retriever_training() -> Outcome:
    """50 steps of train-retriever in float32 and bfloat16, one killed after its checkpoint and resumed."""
    from agentic_r_plugin.retriever.training import TrainRetrieverConfig, train
    from agentic_r_plugin.store import read_json, read_lines

    steps, layers, dim = (4, 1, 32) if small() else (50, 12, 768)
    losses, measured = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = {
            **_retriever_task(folder, layers=layers, dim=dim), "max_steps": steps, "checkpoint_steps": steps // 2,
            "batch_size": 8, "group_size": 8, "temperature": 0.05, "learning_rate": 1e-3 if small() else 1e-4,
            "device": device().type,
        }  # fmt: skip
        for precision in ("float32", "bfloat16"):
            out = folder / precision
            train(TrainRetrieverConfig(**given, precision=precision, out=str(out)))
            lines = [line for _, line in read_lines(out / "metrics.jsonl") if "loss" in line]
            losses[precision] = [line["loss"] for line in lines]
            warm = lines[len(lines) // 5 :]
            speed = sum(line["tokens"] for line in warm) / sum(line["seconds"] for line in warm)
            peak = read_json(out / "done.json")["peak_memory_bytes"] / 2**30
            measured[precision] = {"loss": losses[precision][-1], "tokens_per_s": speed, "peak_gib": peak}
        killed = folder / "killed"
        settings = [f"{key}={value}" for key, value in given.items()] + ["precision=bfloat16", f"out={killed}"]
        command = [sys.executable, "-m", "agentic_r_plugin.cli", "train-retriever", *settings]
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and not (killed / "checkpoint.pt").is_file():
            time.sleep(0.01)
        early = process.poll() is None
        process.kill()
        process.wait()
        train(TrainRetrieverConfig(**given, precision="bfloat16", out=str(killed)), resume=True)
        same = _same_weights(folder / "bfloat16", killed)
    tail = max(1, steps // 5)
    last = {name: sum(values[-tail:]) / tail for name, values in losses.items()}
    apart = abs(last["bfloat16"] / last["float32"] - 1)
    return Outcome(
        "the loss falls; losses of the last steps within 2 % of each other; the killed run's weights are equal",
        last["float32"] < losses["float32"][0] and apart < 0.02 and early and same,
        {**measured, "losses_apart": apart, "weights_equal": same, "killed_in_time": early},
    )


def _retriever_task(folder: Path, *, layers: int, dim: int) -> dict[str, Any]:
    """An untrained BERT, a corpus and groups, as settings of train-retriever."""
    import random

    from tests.search import tiny_retriever

    count, generator = 400, random.Random(0)
    numbers = tiny_retriever.passage_numbers(count)
    groups = [
        {"schema": "group/1", "id": str(i), "turn": 1, "question": tiny_retriever.query(numbers[i][:1]),
         "query": tiny_retriever.query(numbers[i][1:]), "history": [], "positive": f"d{i}",
         "negatives": [f"d{j}" for j in generator.sample(range(count), 8) if j != i][:7]}
        for i in range(count)
    ]  # fmt: skip
    (folder / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    return {
        "retriever": tiny_retriever.make_model(folder / "base", dim=dim, layers=layers),
        "corpus": str(tiny_retriever.write_corpus(folder / "corpus.jsonl", count)),
        "groups": str(folder / "groups.jsonl"),
        "preset": "e5",
    }


def _same_weights(one: Path, two: Path) -> bool:
    from safetensors.torch import load_file

    first, second = (load_file(next(folder.rglob("model.safetensors"))) for folder in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def exact_search() -> Outcome:
    """The backend `torch` over 2 million vectors of 768 dimensions against faiss Flat on the CPU."""
    import faiss

    from agentic_r_plugin.search.dense import _on_device, _Part

    rows, dim, queries, topk, block = (3000, 32, 16, 20, 512) if small() else (2_000_000, 768, 64, 20, 65_536)
    generator = torch.Generator().manual_seed(0)

    def vectors(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)

    stored = torch.cat([vectors(min(block, rows - start)) for start in range(0, rows, block)])
    asked = vectors(queries)
    flat = faiss.IndexFlatIP(dim)
    flat.add(stored.numpy())
    expected_scores, expected_rows = flat.search(asked.numpy(), topk)
    measured: dict[str, Any] = {}
    right = True
    for dtype in (torch.float16, torch.float32):
        kept = _on_device(lambda start, stop: stored[start:stop].numpy(), 0, rows, device(), dtype, block)
        part = _Part(0, rows, device(), block, kept=kept)
        scores, found = (item.cpu() for item in part.nearest(asked, topk))
        shared = sum(len({*one} & {*two}) for one, two in zip(found.tolist(), expected_rows.tolist(), strict=True))
        error = float((scores - torch.from_numpy(expected_scores)).abs().max())
        # a vector kept in half precision is rounded to 11 bits, in each of its dimensions
        allowed = 1e-5 if dtype == torch.float32 else 2**-11 * float(expected_scores.max())
        right &= shared >= 0.999 * queries * topk and error < allowed
        measured[str(dtype)] = {
            "same": shared / (queries * topk), "score_error": error,
            "ms_per_batch": 1000 * timed(lambda part=part: part.nearest(asked, topk)),  # type: ignore[misc]
        }  # fmt: skip
        del kept, part
    return Outcome(
        "at least 99.9 % of the 20 nearest rows; scores within 1e-5 (float32) or a half's rounding (float16)",
        right,
        measured | {"rows": rows, "queries_per_batch": queries},
    )


def seeded_sampling() -> Outcome:
    """Tokens per second of 256 sampled requests in vLLM, each with its own seed and without."""
    from agentic_r_plugin.backends import LLMSpec, open_llm
    from agentic_r_plugin.llm.base import Request, Sampling

    spec, count, length = LLMSpec(model=str(AGENT), dtype="float32", device="cpu"), 4, 8
    if find_spec("vllm") is not None:
        spec, count, length = LLMSpec(backend="vllm", model=str(AGENT), options={"max_model_len": 1280}), 256, 256
    elif not small():
        raise Skip("vLLM is not installed")
    with open_llm(spec) as model:
        prompt = model.codec.encode("Question: Who wrote it?")
        requests = [Request(prompt_ids=(*prompt, index % 50 + 10), max_tokens=length) for index in range(count)]
        speed = {}
        for name, seed in (("seeded", 0), ("free", None)):
            sampling = Sampling(temperature=1.0, seed=seed)
            tokens = sum(len(item.token_ids) for item in model.generate(requests, sampling))
            speed[name] = tokens / timed(lambda sampling=sampling: model.generate(requests, sampling), repeats=2)  # type: ignore[misc]
    loss = 1 - speed["seeded"] / speed["free"]
    return Outcome(
        "seeds cost less than 30 % of the tokens per second (on a GPU)", small() or loss < 0.3,
        {"tokens_per_s": speed, "loss": loss},
    )  # fmt: skip


def agent_training() -> Outcome:
    """train-agent with the shipped agent, FSDP2 and vLLM in bfloat16: 10 steps, saved, stopped and resumed at 6."""
    from agentic_r_plugin.search.service.server import ServeConfig, running_service
    from agentic_r_plugin.store import read_lines
    from agentic_r_plugin.world.generate import WorldConfig
    from agentic_r_plugin.world.generate import run as write_world
    from tests.vllm import opener

    if not small() and find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    with tempfile.TemporaryDirectory() as name:
        world = Path(name) / "w"
        write_world(WorldConfig(out=name, name="w", train_questions=200, dev_questions=4, test_questions=4))
        with running_service(ServeConfig(backend="bm25", corpus=str(world / "corpus.jsonl"), port=0)) as url:
            command = [
                sys.executable, "-m", "agentic_r_plugin.cli", "train-agent", f"model={AGENT}",
                f"questions={world / 'train.jsonl'}", f"retrieval_url={url}", f"out={name}/run", "protocol=compact",
                "batch_size=16", "mini_batch_size=16", "samples=2", "save_every=2", "actor_lr=1e-5", "critic_lr=1e-4",
                "micro_batch_tokens=4096", "attention=auto", f"cpu={str(small()).lower()}",
                *(f"limits.{key}={value}" for key, value in asdict(opener.LIMITS).items()),
            ]  # fmt: skip
            for more in [["steps=2", "--dry-run"]] if small() else [["steps=6"], ["steps=10", "--resume"]]:
                run = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise RuntimeError((run.stdout + run.stderr)[-3000:])
        if small():
            return Outcome("the dry run passes", "FAILED" not in run.stdout, {})
        lines = [line for _, line in read_lines(Path(name) / "run" / "metrics.jsonl")]
    memory = [line["perf/max_memory_allocated_gb"] for line in lines if "perf/max_memory_allocated_gb" in line]
    apart = max(line["training/rollout_probs_diff_mean"] for line in lines)
    pearson = min(line["training/rollout_actor_probs_pearson_corr"] for line in lines)
    return Outcome(
        "10 steps without a gap; mean difference of probabilities < 0.01, correlation > 0.99; memory grows by < 5 % "
        "after the second step of a process",
        [line["step"] for line in lines] == list(range(1, 11)) and apart < 0.01 and pearson > 0.99
        and memory[5] < 1.05 * memory[1] and memory[9] < 1.05 * memory[7],
        {"probs_diff_mean": apart, "pearson": pearson, "memory_gb": memory,
         "em": [line["agentic_r/em"] for line in lines], "step_s": [line["timing_s/step"] for line in lines]},
    )  # fmt: skip


def memory_estimate() -> Outcome:
    """One update of an actor of Qwen2.5-0.5B's shape in FSDP2: memory that is allocated against the estimate."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.utils.torch_functional import logprobs_from_logits

    from agentic_r_plugin.agent import memory_estimate, prepare
    from agentic_r_plugin.agent.settings import TrainAgentConfig
    from agentic_r_plugin.protocol import Limits

    tokens, shape = 64, {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500,
    }  # fmt: skip
    if not small():
        tokens, shape = 8192, {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "vocab_size": 151_936,
        }  # fmt: skip
    model_config = Qwen2Config(**shape, max_position_embeddings=tokens, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as name:
        model_config.save_pretrained(name)
        settings = TrainAgentConfig(
            model=name, questions="q", retrieval_url="http://127.0.0.1:1", out=f"{name}/run", cpu=False,
            micro_batch_tokens=tokens, limits=Limits(max_tokens=tokens, max_response_tokens=tokens // 2),
        )  # fmt: skip
        composed, _ = prepare.compose(settings, num_questions=10_000, prompt_lengths=[tokens // 4])
        size = memory_estimate.model_size(name)
    moments = memory_estimate.estimate(composed, size, None, device_memory_gb=141).moments["update of the actor"]
    parts = ("weights", "gradients", "optimizer", "gathered block, twice", "activations", "logits")
    expected = sum(moments[part] for part in parts)
    before = torch.cuda.memory_allocated() if not small() else 0
    backend = "gloo" if small() else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh(device().type, (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = Qwen2ForCausalLM(model_config).to(device()).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        ids = torch.randint(shape["vocab_size"], (1, tokens), device=device())
        losses = []
        for _ in range(2):  # the first update makes the optimizer's states
            logits = model(input_ids=ids, use_cache=False).logits[0]
            loss = -logprobs_from_logits(logits[:-1], ids[0, 1:]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        peak = (torch.cuda.max_memory_allocated() - before) / memory_estimate.GIB if not small() else 0.0
    finally:
        torch.distributed.destroy_process_group()
    return Outcome(
        "within 20 % of the estimate without its reserve (on a GPU)",
        losses[0] > 0 and (small() or abs(peak / expected - 1) < 0.2),
        {"allocated_gib": peak, "estimated_gib": expected, "parts": {part: moments[part] for part in parts}},
    )


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
    retriever_packing, retriever_training, exact_search, hf_backend, agent_attention, detection, encoding, vllm_engine,
    vllm_server, agent_training, memory_estimate, seeded_sampling,
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

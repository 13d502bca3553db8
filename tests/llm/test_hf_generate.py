"""Batched generation gives each row what it would get alone, and ends it exactly where it should."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agentic_r_plugin.errors import BackendError
from agentic_r_plugin.llm import hf_generate
from agentic_r_plugin.llm.hf_generate import HFGenerator
from agentic_r_plugin.llm.sampling import StopStrings, sample

TEXT = "the cat sat on a mat and then went home to sleep with two small kittens near the river bank"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def prompts(count: int, *, seed: int = 0, low: int = 3, high: int = 90) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(1, 300, (length,), generator=generator).tolist() for length in lengths]


def greedy_by_definition(model: Qwen2ForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    """Recompute everything at every token; no cache, no batch."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("prefix_cache_tokens", [0, 10_000])
@pytest.mark.parametrize("max_batch_tokens", [200, 32_768])
def test_greedy_batch_equals_token_by_token_without_cache(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prefix_cache_tokens: int, max_batch_tokens: int
) -> None:
    generator = HFGenerator(
        model, tokenizer, max_batch_tokens=max_batch_tokens, prefix_cache_tokens=prefix_cache_tokens
    )
    batch = prompts(12)
    limits = [1 + index % 9 for index in range(12)]
    outputs = generator.generate(batch, max_tokens=limits, ignore_eos=False)
    assert [list(output.token_ids) for output in outputs] == [
        greedy_by_definition(model, prompt, limit) for prompt, limit in zip(batch, limits, strict=True)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prefill_tokens", [8, 100])
def test_prompts_in_many_passes_over_used_memory_equal_token_by_token(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    prefill_tokens: int,
    attention: str,
) -> None:
    monkeypatch.setattr(hf_generate, "PREFILL_TOKENS", prefill_tokens)
    model.set_attn_implementation(attention)
    generator = HFGenerator(model, tokenizer, prefix_cache_tokens=10_000)
    turn, new = prompts(9, seed=8, low=3, high=60), prompts(9, seed=9, low=5, high=40)
    try:
        generator.generate(prompts(9, low=150, high=200), max_tokens=[20] * 9)  # no later turn needs more memory
        for _ in range(3):
            for layer in generator._cache.batch_layers:  # what is not written or blanked must not be read
                assert layer._storage is not None
                with torch.inference_mode():
                    for states in layer._storage:
                        states.fill_(torch.nan)
            outputs = generator.generate(turn, max_tokens=[6] * 9)
            written = [list(output.token_ids) for output in outputs]
            assert written == [greedy_by_definition(model, prompt, 6) for prompt in turn]
            turn = [[*prompt, *ids, *tail] for prompt, ids, tail in zip(turn, written, new, strict=True)]
    finally:
        model.set_attn_implementation("sdpa")


def test_later_turns_reuse_kept_prefixes_and_give_the_same(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    keeping = HFGenerator(model, tokenizer, prefix_cache_tokens=10_000)
    turn = prompts(6, seed=3, low=20, high=60)
    for observation in (7, 40, 18):
        outputs = keeping.generate(turn, max_tokens=[8] * 6, ignore_eos=True)
        expected = HFGenerator(model, tokenizer).generate(turn, max_tokens=[8] * 6, ignore_eos=True)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
        kept = [[*turn[row], *outputs[row].token_ids[:-1]] for row in range(6)]
        assert [keeping.prefixes.length(ids) for ids in kept] == [len(ids) // 16 * 16 for ids in kept]
        new = prompts(6, seed=observation, low=observation, high=observation + 1)
        turn = [[*turn[row], *outputs[row].token_ids, *new[row]] for row in range(6)]
    assert keeping.prefixes.num_tokens == sum(len(ids) // 16 * 16 for ids in kept)


def test_a_beginning_shared_by_many_prompts_is_computed_once(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    computed: list[int] = []
    forward = model.forward

    def counting(*args: object, **kwargs: object) -> object:
        computed.append(kwargs["input_ids"].numel())  # type: ignore[attr-defined]
        return forward(*args, **kwargs)

    shared = prompts(1, seed=5, low=64, high=65)[0]
    batch = [[*shared, *tail] for tail in prompts(10, seed=6, low=8, high=9)]
    generator = HFGenerator(model, tokenizer, prefix_cache_tokens=10_000)
    model.forward = counting  # type: ignore[method-assign]
    try:
        outputs = generator.generate(batch, max_tokens=[4] * 10, ignore_eos=True)
    finally:
        model.forward = forward  # type: ignore[method-assign]
    assert computed == [64, 10 * 8, 10, 10, 10]
    assert [list(output.token_ids) for output in outputs] == [
        list(HFGenerator(model, tokenizer).generate([prompt], max_tokens=[4], ignore_eos=True)[0].token_ids)
        for prompt in batch
    ]


def test_beginnings_within_shared_beginnings_are_computed_once_too(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, *branches = (prompts(1, seed=seed, low=64, high=65)[0] for seed in (11, 12, 13))
    tails = prompts(6, seed=14, low=8, high=9)
    batch = [[*root, *branches[number % 2], *tail] for number, tail in enumerate(tails)]
    expected = [greedy_by_definition(model, ids, 1) for ids in batch]
    computed: list[int] = []
    forward = model.forward

    def counting(*args: object, **kwargs: object) -> object:
        computed.append(kwargs["input_ids"].numel())  # type: ignore[attr-defined]
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    outputs = HFGenerator(model, tokenizer, prefix_cache_tokens=10_000).generate(batch, max_tokens=[1] * 6)
    assert computed == [64, 2 * 64, 6 * 8]
    assert [output.cached_tokens for output in outputs] == [128] * 6
    assert [list(output.token_ids) for output in outputs] == expected


def test_sampled_rows_depend_on_their_own_seed_only(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = HFGenerator(model, tokenizer)
    batch = prompts(8, seed=1)
    together = generator.generate(batch, max_tokens=[10] * 8, temperature=1.0, seed=list(range(8)))
    alone = [
        generator.generate([prompt], max_tokens=[10], temperature=1.0, seed=[row])[0]
        for row, prompt in enumerate(batch)
    ]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    other = generator.generate(batch, max_tokens=[10] * 8, temperature=1.0, seed=list(range(100, 108)))
    assert [output.token_ids for output in together] != [output.token_ids for output in other]


def test_log_probabilities_are_those_of_the_model_at_the_sampling_temperature(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = prompts(1, seed=2)[0]
    output = HFGenerator(model, tokenizer).generate(
        [prompt], max_tokens=[12], temperature=0.7, seed=4, with_logprobs=True, ignore_eos=True
    )[0]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids) == 12
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *output.token_ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
    expected = logits.log_softmax(-1).gather(1, torch.tensor(output.token_ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(output.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_a_row_ends_with_end_of_sequence_kept(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = HFGenerator(model, tokenizer)
    batch = prompts(4, seed=8)
    free = generator.generate(batch, max_tokens=[6] * 4, ignore_eos=True)
    third = {output.token_ids[2] for output in free}
    generator.eos_ids = frozenset(third)
    for output, before in zip(generator.generate(batch, max_tokens=[6] * 4), free, strict=True):
        first = next(index for index, token in enumerate(before.token_ids) if token in third)
        assert output.token_ids == before.token_ids[: first + 1]
        assert (output.finish_reason, output.stop_string) == ("eos", None)


def test_a_row_ends_with_the_token_that_completes_a_stop_string(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = HFGenerator(model, tokenizer)
    prompt = prompts(1, seed=9)[0]
    free = generator.generate([prompt], max_tokens=[20], ignore_eos=True)[0]
    pieces = [tokenizer.decode([token]) for token in free.token_ids]
    stop = next(pieces[at][-1:] + pieces[at + 1][:1] for at in range(3, 19) if pieces[at] and pieces[at + 1].isascii())
    ends = next(n for n in range(1, 21) if stop in tokenizer.decode(free.token_ids[:n]))
    output = generator.generate([prompt], max_tokens=[20], stop=[stop, "never this"], ignore_eos=True)[0]
    assert output.token_ids == free.token_ids[:ends]
    assert (output.finish_reason, output.stop_string) == ("stop", stop)


def test_stop_strings_are_found_across_tokens_and_only_when_new(tokenizer: PreTrainedTokenizerFast) -> None:
    stops = StopStrings(tokenizer, ["</search>", "</answer>"])
    ids = tokenizer.encode("the cat</search> sat", add_special_tokens=False)
    found = [stops.completed_by_last(ids[: n + 1]) for n in range(len(ids))]
    at = next(n for n in range(len(ids)) if "</search>" in tokenizer.decode(ids[: n + 1]))
    assert found == [None] * at + ["</search>"] + [None] * (len(ids) - at - 1)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({}, {0, 1, 2, 3}), ({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"temperature": 0.0}, {0})],
)
def test_sampling_follows_the_distribution(options: dict[str, float], allowed: set[int]) -> None:
    probability_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    number = 20_000
    settings = {"temperature": 1.0, **options}
    token_B, _ = sample(
        probability_V.log().expand(number, 4), torch.rand(number, generator=torch.Generator().manual_seed(0)),
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    assert set(token_B.tolist()) == allowed
    kept_V = torch.tensor([p if token in allowed else 0.0 for token, p in enumerate(probability_V.tolist())])
    frequency_V = torch.bincount(token_B, minlength=4) / number
    torch.testing.assert_close(frequency_V, kept_V / kept_V.sum(), atol=0.012, rtol=0)


def test_bad_requests_are_refused(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = HFGenerator(model, tokenizer)
    with pytest.raises(BackendError, match="prompt 1 is empty"):
        generator.generate([[1], []], max_tokens=[1, 1])
    with pytest.raises(BackendError, match="2 prompts, 1 token limits"):
        generator.generate([[1], [2]], max_tokens=[1])
    assert generator.generate([[1, 2]], max_tokens=[0])[0].token_ids == ()


@pytest.mark.parametrize("prefix_cache_tokens", [0, 10_000])
@pytest.mark.parametrize("prefill_tokens", [40, 512])
def test_the_likelihood_of_a_text_is_that_of_the_models_own_forward_pass(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    prefix_cache_tokens: int,
    prefill_tokens: int,
) -> None:
    monkeypatch.setattr(hf_generate, "PREFILL_TOKENS", prefill_tokens)
    generator = HFGenerator(model, tokenizer, max_batch_tokens=600, prefix_cache_tokens=prefix_cache_tokens)
    shared = prompts(1, low=64, high=65)[0]
    texts = [shared + rest for rest in prompts(6, seed=1)] + prompts(5, seed=2)
    scored = [1 + index % min(7, len(text) - 1) for index, text in enumerate(texts)]
    found = generator.likelihoods(texts, scored)
    for text, last, (logprobs, _) in zip(texts, scored, found, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        wanted = own.gather(1, torch.tensor(text[1:])[:, None])[-last:, 0].tolist()
        assert list(logprobs) == pytest.approx(wanted, abs=1e-4)
    if prefix_cache_tokens:
        again = generator.likelihoods(texts, scored)
        assert sum(cached for _, cached in again) > sum(cached for _, cached in found) > 0
        assert [logprobs for logprobs, _ in again] == [pytest.approx(logprobs, abs=1e-4) for logprobs, _ in found]
        # what was computed for a likelihood serves a later continuation, and does not change it
        (output,) = generator.generate([texts[0]], max_tokens=[6], ignore_eos=True)
        assert output.cached_tokens > 0
        assert list(output.token_ids)[:1] == greedy_by_definition(model, texts[0], 1)

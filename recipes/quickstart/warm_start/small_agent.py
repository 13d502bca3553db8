"""The small agent: a byte-level tokenizer and a Qwen2 model of a few million parameters, built from scratch.

Attention is initialised with hand-built copy heads (ordinary Qwen2 weights). In layer 0, two heads attend one and two
tokens back by means of query and key biases under RoPE, and write those tokens to separate parts of the residual
stream. In the next two layers, one head attends to earlier positions that follow the current token, another to
positions that follow the current pair of tokens, and both write the token found there. The model then learns to copy
names within about 100,000 training tokens instead of many millions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/"))
END, PAD = "<|endoftext|>", "<|pad|>"

TOOL_MARKS = {
    '<tool_call>\n{"name": "search", "arguments": {"query": "': "<search>",
    '"}}\n</tool_call>': "</search>",
    "<tool_response>": "<information>",
    "</tool_response>": "</information>",
}
"""Tokens of the small agent that calls tools (`tool_template.jinja`) -> the tags whose embeddings they start from."""
OPEN_MARKS = {'<tool_call>\n{"name": "open", "arguments": {"id": "': "<search>"}
"""The same for the tool `open`."""

HIDDEN, HEAD_DIM, HEADS, LAYERS, FEED_FORWARD = 256, 64, 4, 4, 576
ROPE_THETA = 1e6
_TOKEN, _BEFORE, _TWO_BEFORE = slice(0, 128), slice(128, 192), slice(192, 256)
"""Parts of the residual stream at the start of training: the current token and the two tokens before it."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; each digit and each tag of the protocol is one token (tags are not special tokens).

    `AutoTokenizer` loads it as a `Qwen2Tokenizer` because of the model's type. Therefore the end token has Qwen2's
    name, and no token crosses a boundary of Qwen2's pre-tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS) - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END, PAD])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def teach_tool_calls(tokenizer: PreTrainedTokenizerFast, model: Qwen2ForCausalLM, *, opens: bool = False) -> None:
    """Add the tokens and the chat template of tool calls, in place; `model` gets the embeddings of those it lacks."""
    known, marks = tokenizer.get_vocab(), TOOL_MARKS | (OPEN_MARKS if opens else {})
    new = {mark: tag for mark, tag in marks.items() if mark not in known}
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in new])
    tokenizer.chat_template = Path(__file__).with_name("tool_template.jinja").read_text(encoding="utf-8")
    model.resize_token_embeddings(len(tokenizer))
    rows_VD = model.model.embed_tokens.weight.data
    for mark, tag in new.items():
        rows_VD[tokenizer.convert_tokens_to_ids(mark)] = rows_VD[tokenizer.convert_tokens_to_ids(tag)]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, layers: int = LAYERS) -> Qwen2ForCausalLM:
    """Build an untrained float32 model with copy heads, in at least 3 layers."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        _copy_heads(model)
    return model


def _copy_heads(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    code_DT = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0][:64]
    """Projection of a token's 128 numbers to the 64 that represent it as a previous token."""
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, _TOKEN] = 0.04 * torch.randn(embedding.shape[0], 128, generator=generator)
    first = model.model.layers[0].self_attn
    for head, (offset, part) in enumerate(((1, _BEFORE), (2, _TWO_BEFORE))):
        _look_back(first, head, offset)
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        first.v_proj.weight[rows] = 0
        first.v_proj.weight[rows, _TOKEN] = code_DT
        first.o_proj.weight[:, rows] = 0
        first.o_proj.weight[part, rows] = 0.04 * torch.eye(HEAD_DIM)
    for layer in model.model.layers[1:3]:
        _match(layer.self_attn, 0, [(_TOKEN, _BEFORE, 32)], code_DT)
        _match(layer.self_attn, 1, [(_TOKEN, _BEFORE, 16), (_BEFORE, _TWO_BEFORE, 16)], code_DT)
        for head in (0, 1):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            # Each of the two heads copies one half of a token's 128 numbers.
            part = slice(head * 64, head * 64 + 64)
            layer.self_attn.v_proj.weight[rows] = 0
            layer.self_attn.v_proj.weight[rows, part] = torch.eye(64)
            layer.self_attn.o_proj.weight[:, rows] = 0
            layer.self_attn.o_proj.weight[part, rows] = 0.1 * torch.eye(64)


def _look_back(attention: Any, head: int, offset: int, strength: float = 7.5) -> None:
    """Set a head to attend `offset` tokens back, independent of the tokens."""
    # RoPE rotates the constant query and key biases by position; rotating the query back by `offset` moves the maximum
    # of their product to that distance. Only fast frequencies are used, because slow ones cannot resolve one token.
    frequency_P = ROPE_THETA ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    strength_P = strength * (frequency_P > 0.05)
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    attention.q_proj.weight[rows] *= 0.1
    attention.k_proj.weight[rows] *= 0.1
    turned = offset * frequency_P
    attention.q_proj.bias[rows] = torch.cat([strength_P * turned.cos(), -strength_P * turned.sin()])
    attention.k_proj.bias[rows] = torch.cat([strength_P, torch.zeros_like(strength_P)])


def _match(attention: Any, head: int, parts: list[tuple[slice, slice, int]], code_DT: torch.Tensor) -> None:
    """Set a head to attend to positions whose `seen` part equals the `own` part of the current position.

    It uses only the low frequencies of RoPE, so that distance hardly matters.
    """
    # RoPE rotates dimensions i and i + 32 together, the more slowly the larger i is.
    slow = [*range(16, 32), *range(48, 64)]
    query, key = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HEAD_DIM, HIDDEN)
    at = 0
    for own, seen, count in parts:
        used = slice(at, at + count)
        rows = slow[at : at + count]
        query[rows, own] = code_DT[used] if own == _TOKEN else torch.eye(64)[used]
        key[rows, seen] = torch.eye(64)[used]
        at += count
    rows_all = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    attention.q_proj.weight[rows_all] = 1.8 * query
    attention.k_proj.weight[rows_all] = 1.8 * key

"""Replies of a model in this process: its thoughts are found by their marks, special tokens or not."""

from __future__ import annotations

import pickle

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.reply import Reply

WORDS = ["[THINK]", "[/THINK]", "<|end|>", "<think>", "</think>", "draft", "final"]


@pytest.fixture(scope="module")
def codec() -> TokenizerCodec:
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="draft"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", additional_special_tokens=["[THINK]", "[/THINK]"]
    )
    return TokenizerCodec(made)


@pytest.mark.parametrize(
    ("written", "text", "cut"),
    [
        ("final <|end|>", "final", False),
        ("[THINK] draft [/THINK] final <|end|>", "final", False),
        ("draft [/THINK] final <|end|>", "final", False),
        ("[THINK] draft", "[THINK] draft", True),
        ("<think> draft </think> final <|end|>", "final", False),
    ],
)
def test_a_thought_between_special_tokens_is_no_part_of_a_reply(
    codec: TokenizerCodec, written: str, text: str, cut: bool
):
    reply = codec.reply([WORDS.index(word) for word in written.split()], cut=False)
    assert reply.strip() == text and reply.cut is cut


def test_a_reply_keeps_that_it_was_cut_when_it_goes_to_another_process():
    reply = pickle.loads(pickle.dumps(Reply("x", cut=True)))
    assert reply == "x" and reply.cut

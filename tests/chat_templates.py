"""Tiny tokenizers with chat templates in the style of well-known families; nothing is downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.tools import ToolProtocol

FOLDER = Path(__file__).with_name("templates")
PROTOCOLS = {
    "qwen3": ToolProtocol(name="qwen3"),
    "hermes": ToolProtocol(name="hermes", answer="boxed", system=""),
    "qwen3_coder": ToolProtocol(name="qwen3_coder", call_form="xml"),
    "llama3": ToolProtocol(name="llama3", call_form="bare_json", answer="message"),
    "qwen3_thinking": ToolProtocol(name="qwen3_thinking", answer="message"),
}
OPENS_THOUGHT = (
    ("{% if thought and loop.index0 > last.at %}", "{% if true %}"),
    (
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}\n",
        "{{ '<think>\n' }}",
    ),
)
"""What makes the template of Qwen3 one that opens the thought itself, as those of its thinking models do."""
_SPECIAL = (
    "<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens with the template `tests/templates/NAME.jinja`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([file.read_text() for file in sorted(FOLDER.glob("*.jinja"))], trainer)
    made.add_special_tokens(list(_SPECIAL))
    made.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in _TAGS])
    template = (FOLDER / f"{name.removesuffix('_thinking')}.jinja").read_text()
    for before, after in OPENS_THOUGHT if name.endswith("_thinking") else ():
        assert before in template
        template = template.replace(before, after)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>" if name == "llama3" else "<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_SPECIAL),
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def codec(name: str) -> TokenizerCodec:
    return TokenizerCodec(tokenizer(name))

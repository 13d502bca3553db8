"""A Hugging Face tokenizer as the protocol's codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TokenizerCodec:
    """Encodes and decodes without adding or dropping anything, so that ids written by a model stay as they are.

    Args:
        tokenizer: any Hugging Face tokenizer. With a chat template the prompt becomes one user message and the
            generation prompt is added (Search-R1 does so for base models too); without one it is plain text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the prompt."""
        if not self.tokenizer.chat_template:
            return self.encode(text)
        message = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no special tokens added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens kept, spaces untouched."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

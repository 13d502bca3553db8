"""A Hugging Face tokenizer as the protocol's codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentic_r_plugin.llm.reply import Reply, after_thoughts


class TokenizerCodec:
    """Encodes and decodes without adding or dropping anything, so that ids written by a model stay as they are.

    Args:
        tokenizer: any Hugging Face tokenizer. With a chat template the prompt becomes one user message and the
            generation prompt is added (Search-R1 does so for base models too); without one it is plain text after what
            the tokenizer puts before every text (Llama's and Gemma's beginning-of-sequence token).
        template_arguments: for the chat template, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.template_arguments = tokenizer, dict(template_arguments or {})

    def encode_plain_prompt(self, text: str) -> list[int]:
        """Ids of a prompt without chat template: what the tokenizer puts before a text, then the text, and no end."""
        plain, whole = self.encode("a"), list(self.tokenizer.encode("a", add_special_tokens=True))
        before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:before] + self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the prompt."""
        if not self.tokenizer.chat_template:
            return self.encode_plain_prompt(text)
        message = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False, **self.template_arguments
        )
        return list(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no special tokens added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def reply(self, ids: Sequence[int], *, cut: bool) -> Reply:
        """A reply of ids, special tokens left out. Where they mark a thought, so is the thought.

        Without its marks a thought could not be told from the reply.
        """
        marked = self.decode(ids)
        text, within_thought = after_thoughts(marked)
        if text == marked and not within_thought:
            text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        elif not within_thought:
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return Reply(text, cut=cut or within_thought)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens kept, spaces untouched."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

"""A Hugging Face tokenizer as the protocol's codec."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from agentic_r_plugin.errors import ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Completion, Request
from agentic_r_plugin.llm.reply import Reply, after_thoughts
from agentic_r_plugin.protocol import disarm


class TokenizerCodec:
    """Encodes and decodes without adding or dropping tokens, so that ids written by a model are preserved.

    Args:
        tokenizer: any Hugging Face tokenizer. With a chat template the prompt becomes one user message followed by the
            generation prompt (Search-R1 does this for base models too). Without one the prompt is plain text after the
            tokenizer's prefix (the beginning-of-sequence token of Llama and Gemma).
        template_arguments: arguments of the chat template, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.template_arguments = tokenizer, dict(template_arguments or {})

    def encode_plain_prompt(self, text: str) -> list[int]:
        """Ids of a prompt without chat template: the tokenizer's prefix, then the text, without its suffix."""
        # The prefix is found by encoding a probe text with and without special tokens.
        plain, whole = self.encode("a"), list(self.tokenizer.encode("a", add_special_tokens=True))
        before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:before] + self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, with the chat template if the tokenizer has one."""
        if not self.tokenizer.chat_template:
            return self.encode_plain_prompt(text)
        message = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False, **self.template_arguments
        )
        return list(ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        reply: bool = True,
    ) -> str:
        """Text of a conversation in the chat template.

        Args:
            tools: schemas of the tools, as functions in JSON Schema.
            arguments: further arguments of the template; they take precedence over `template_arguments`.
            reply: whether the text ends with the beginning of the assistant's next message.

        Raises:
            ConfigError: there is no template, or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template, which an agent that calls tools needs")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=list(tools), add_generation_prompt=reply, tokenize=False,
                    **(self.template_arguments | dict(arguments)),
                )
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"the tokenizer's chat template refuses a conversation with tools: {error}") from error

    @cached_property
    def _tokens(self) -> re.Pattern[str] | None:
        """The beginning of each special or added token that `disarm` does not break, and that is no word or space."""
        special = set(self.tokenizer.all_special_tokens)
        known = special | set(getattr(self.tokenizer, "get_added_vocab", dict)())
        kept = [token for token in known if token in special or not all(c.isalnum() or c.isspace() for c in token)]
        # A token of one character cannot be broken by a space.
        marks = sorted(re.escape(token) for token in kept if len(token) > 1 and disarm(token) == token)
        return re.compile(f"(?={'|'.join(marks)}).", re.DOTALL) if marks else None

    def without_tokens(self, text: str) -> str:
        """`text` with a space within each special or added token that it would write; see `protocol.without_tokens`.

        Words and white space that are added tokens stay, since they are text.
        """
        return text if self._tokens is None else self._tokens.sub(r"\g<0> ", text)

    @property
    def special_tokens(self) -> Sequence[str]:
        """The texts of the special tokens, such as the end of a turn."""
        return tuple(self.tokenizer.all_special_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without added special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def reply(self, ids: Sequence[int], *, cut: bool) -> Reply:
        """Decode a reply, without special tokens and without the thought that they may mark."""
        # Thoughts are removed first: without its marks a thought cannot be distinguished from the reply.
        marked = self.decode(ids)
        text, within_thought = after_thoughts(marked)
        if text == marked and not within_thought:
            text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        elif not within_thought:
            # The thought was cut off the text, not off the ids, so special tokens are removed as text.
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return Reply(text, cut=cut or within_thought)

    def message_requests(self, messages: Sequence[str], max_tokens: int) -> list[Request]:
        """One request per message, for a reply of at most `max_tokens` tokens."""
        return [Request(prompt_ids=tuple(self.encode_prompt(text)), max_tokens=max_tokens) for text in messages]

    def replies(self, found: Sequence[Completion | RequestRefusedError]) -> list[Reply | RequestRefusedError]:
        """The completions of `message_requests` as replies; refusals stay."""
        return [
            done if isinstance(done, RequestRefusedError) else self.reply(done.token_ids, cut=done.cut)
            for done in found
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, with special tokens and unchanged whitespace."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

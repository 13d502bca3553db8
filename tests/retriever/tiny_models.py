"""Untrained models of a few thousand parameters, one of each architecture that the presets are for."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}


def architectures(vocabulary: int) -> dict[str, torch.nn.Module]:
    """Model type -> an untrained model."""
    torch.manual_seed(0)
    small = SMALL | {"vocab_size": vocabulary}
    return {
        "bert": BertModel(BertConfig(**small)),
        "xlm-roberta": XLMRobertaModel(XLMRobertaConfig(**small, pad_token_id=1)),
        "llama": LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2)).model,
        "qwen3": Qwen3Model(Qwen3Config(**small, num_key_value_heads=2, head_dim=8)),
    }


def write_decoder(folder: Path) -> str:
    """A Llama language model of made-up words whose tokenizer adds nothing to a text; returns its folder."""
    torch.manual_seed(0)
    names = ["<unk>", "<end>", *(f"{letter}{i}" for letter in "pq" for i in range(30)), "title", '"', ":", "Query"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", model_max_length=66
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(**SMALL, vocab_size=len(names), num_key_value_heads=2, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


QWEN3_PROMPT = "Instruct: p1 p2 p3\nQuery:"


def write_qwen3_embedding(folder: Path) -> str:
    """An untrained model in the form of Qwen3-Embedding; returns its folder.

    Last-token pooling, left padding, 8,192 positions, prompts in its configuration; the tokenizer ends each text with
    the padding token, which is not its end-of-text token.
    """
    torch.manual_seed(0)
    names = ["<unk>", "<|endoftext|>", "<|im_end|>", *(f"{letter}{i}" for letter in "pq" for i in range(30)), "title"]
    names += ['"', ":", "Query", "Instruct", "Reasoning", "Question"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[("<|endoftext|>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        padding_side="left", model_max_length=8192,
    ).save_pretrained(folder / "plain")  # fmt: skip
    small = SMALL | {"max_position_embeddings": 8192, "vocab_size": len(names), "num_key_value_heads": 2, "head_dim": 8}
    Qwen3Model(Qwen3Config(**small)).save_pretrained(folder / "plain")
    modules = [Transformer(str(folder / "plain")), Pooling(SMALL["hidden_size"], "lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": QWEN3_PROMPT, "document": ""})
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")

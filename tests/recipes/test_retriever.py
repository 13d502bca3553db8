"""The retriever recipe: its settings are ones the command takes, and its groups are what they are said to be."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification

from agentic_r_plugin import components
from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import ManifestMismatchError
from agentic_r_plugin.records import Candidates, Group, Relevance, ScoredPassage
from agentic_r_plugin.retriever.batches import read_examples
from agentic_r_plugin.retriever.reranker import TrainRerankerConfig
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.cross_encoder import load_cross_encoder
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.families import FAMILIES
from agentic_r_plugin.store import read_records, write_records
from tests.search.tiny_retriever import make_model

RECIPE = Path(__file__).parents[2] / "recipes" / "retriever"
PAPER = {"epochs": 2, "batch_size": 32, "group_size": 16, "learning_rate": 2e-5, "temperature": 0.01}


RERANKER = RECIPE / "reranker.yaml"


@pytest.mark.parametrize("file", sorted({*RECIPE.glob("*.yaml")} - {RERANKER}), ids=lambda file: file.name)
def test_every_configuration_is_one_the_command_takes(file):
    config = load_config(TrainRetrieverConfig, file, ["groups=g", "corpus=c", "out=o"])
    assert config.trainer in components.names("retriever_trainer")
    assert config.preset in ("auto", *FAMILIES)


def test_the_rerankers_configuration_is_one_its_command_takes():
    config = load_config(TrainRerankerConfig, RERANKER, ["candidates=c", "relevance=r", "corpus=c", "out=o"])
    assert (config.model, config.epochs) == ("builtin:minilm", 2)


def test_the_papers_settings_are_the_defaults_and_those_of_its_recipe():
    for file in (None, RECIPE / "e5.yaml", RECIPE / "bge.yaml"):
        config = load_config(TrainRetrieverConfig, file, ["groups=g", "corpus=c", "out=o"])
        assert {name: getattr(config, name) for name in PAPER} == PAPER
        assert (
            not config.mask_false_negatives and config.cross_device and config.formulation in (None, "question_query")
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A benchmark of three questions, and what `make_groups.py` makes of it."""
    folder = tmp_path_factory.mktemp("made")
    words = ["river", "bridge", "tower", "castle", "forest", "island", "harbour", "palace"]
    corpus = [{"id": str(i), "contents": f'"{word} {i}"\nThe {word} number {i}.'} for i, word in enumerate(words * 3)]
    questions = [
        {
            "id": f"q{i}",
            "question": f"Who built the {words[i]} and the {words[i + 1]}?",
            "golden_answers": ["x"],
            "metadata": {"gold_doc_ids": [str(i), str(i + 1)], "context_doc_ids": [str(i), str(i + 1), str(i + 9)]},
        }
        for i in range(3)
    ]
    for name, lines in (("corpus", corpus), ("train", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        sys.executable, RECIPE / "make_groups.py", "--data", folder, "--out", folder / "groups.jsonl",
        "--pool", folder / "pool.jsonl", "--scored", folder / "scored", "--candidates", "6", "--negatives", "3",
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=120)
    return folder


def test_every_supporting_passage_gives_a_group_with_the_questions_words_as_query(made):
    groups = list(read_records(made / "groups.jsonl", Group))
    assert [(group.id, group.positive) for group in groups] == [
        ("q0", "0"), ("q0", "1"), ("q1", "1"), ("q1", "2"), ("q2", "2"), ("q2", "3"),
    ]  # fmt: skip
    assert groups[0].query == "built river bridge" and groups[0].turn == groups[1].turn == 1
    for first, second in zip(groups[::2], groups[1::2], strict=True):
        assert first.negatives == second.negatives and 1 <= len(first.negatives) <= 3
        assert not {first.positive, second.positive} & set(first.negatives)
    pool = [json.loads(line)["id"] for line in (made / "pool.jsonl").read_text().splitlines()]
    assert pool == ["0", "1", "9", "2", "10", "3", "11"]


def test_the_best_passages_of_a_question_are_candidates_of_which_the_supporting_ones_are_relevant(made):
    candidates = list(read_records(made / "scored" / "candidates.jsonl", Candidates))
    relevance = list(read_records(made / "scored" / "relevance.jsonl", Relevance))
    assert [(item.id, item.query) for item in candidates] == [
        (f"q{i}", f"Who built the {one} and the {other}?")
        for i, (one, other) in enumerate(pairwise(["river", "bridge", "tower", "castle"]))
    ]
    for number, (item, scored) in enumerate(zip(candidates, relevance, strict=True)):
        assert (item.id, item.turn) == (scored.id, scored.turn) and list(scored.scores) == [
            passage.id for passage in item.passages
        ]
        assert {name for name, score in scored.scores.items() if score} <= {str(number), str(number + 1)}
    assert sum(sum(scored.scores.values()) for scored in relevance) > 0


def test_the_table_has_every_model_input_and_seed_once_however_often_the_command_is_run(
    made, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(RECIPE))  # where a script finds its neighbours
    spec = importlib.util.spec_from_file_location("hotpotqa_recipe", RECIPE / "hotpotqa.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    for split in ("train", "test"):
        shutil.copy(made / "groups.jsonl", tmp_path / f"{split}.jsonl")
        shutil.copy(made / "pool.jsonl", tmp_path / f"pool_{split}.jsonl")
    model = make_model(tmp_path / "tiny")
    command = [
        "hotpotqa.py",
        "--data",
        str(made),
        "--out",
        str(tmp_path),
        "--model",
        f"tiny={model}",
        "--seeds",
        "0",
        "1",
    ]
    settings = ["--set", "batch_size=2", "group_size=3", "learning_rate=1e-2", "precision=float32"]
    for limit in (["--cells", "3"], [], []):
        monkeypatch.setattr("sys.argv", [*command, *limit, *settings])
        recipe.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["formulation"], line["seed"]) for line in lines] == [
        ("query", None), ("question_query", None),
        ("query", 0), ("question_query", 0),
        ("query", 1), ("question_query", 1),
    ]  # fmt: skip
    assert all(line["queries"] == 3 and line["pool"] == 7 for line in lines)
    assert all(line["corpus_recall_at_20"] == 1.0 for line in lines)
    assert [line.get("steps") for line in lines] == [None, None, 3, 3, 3, 3]
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split(" | ")[1:4] for row in table] == [
        ["query", "no", "-"], ["query", "yes", "2"], ["question_query", "no", "-"], ["question_query", "yes", "2"],
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*command, *settings, "temperature=0.5"])
    with pytest.raises(ManifestMismatchError, match="begun with other settings"):
        recipe.main()


def test_gain_and_loss_are_measured_for_every_weight_and_set_once(made, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(RECIPE))
    elsewhere = importlib.import_module("elsewhere")
    base, trained = make_model(tmp_path / "base"), make_model(tmp_path / "trained", seed=1)
    command = [
        "elsewhere.py", "--base", base, "--trained", trained, "--set", f"own={made}", "--set", f"other={made}",
        "--split", "train", "--precision", "float32", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    for weights in (["1"], ["0", "0.5", "1"], ["0", "0.5", "1"]):
        monkeypatch.setattr("sys.argv", [*command, "--weights", *weights])
        elsewhere.main()
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(line["weight"], line["set"]) for line in lines] == [
        (1, "own"), (1, "other"), (0, "own"), (0, "other"), (0.5, "own"), (0.5, "other"),
    ]  # fmt: skip
    found = {line["weight"]: line["recall"] for line in lines if line["set"] == "own"}
    with Corpus(tmp_path / "out" / "pool_own.jsonl") as pool, Corpus(made / "corpus.jsonl") as whole:
        test = elsewhere.in_pool(read_examples(tmp_path / "out" / "own.jsonl", whole), whole, pool)
        for weight, model in ((0, base), (1, trained)):
            assert found[weight] == elsewhere.recalls(Retriever.load(model, precision="float32"), pool, test)
    assert found[0][1] == [1.0, 1.0, 1.0], "all seven passages of the pool are among the best 20"
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[0].startswith("| 0 | own | ") and "| +0.000 [+0.000, +0.000] |" in table[0]
    # With --each, another checkpoint has separate rows; its differences are from weight 0 of the first checkpoint.
    third = make_model(tmp_path / "third", seed=1)
    command[command.index("--trained") + 1] = third
    monkeypatch.setattr("sys.argv", [*command, "--weights", "1", "--each"])
    elsewhere.main()
    table = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    first, other = Path(trained).parent.name, Path(third).parent.name
    assert [row[:3] for row in table] == [
        *([first, weight, name] for weight in ("0", "0.5", "1") for name in ("own", "other")),
        *([other, "1", name] for name in ("own", "other")),
    ]
    assert table[-2][3:] == table[4][3:], "the same model, and the same base"


def test_four_bit_weights_become_a_model_with_e5s_prompts(tmp_path):
    """A file in the package's format, of one layer, with weights that are known."""
    hidden, inner, words, positions = 32, 64, 12, 8
    generator = np.random.default_rng(0)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁river", "▁query", ":", "▁passage", "a", "b", "<mask>"]
    shapes = {"emb.word": (words, hidden), "emb.pos": (positions, hidden), "emb.type": (2, hidden)}
    shapes |= {"emb.ln.w": (hidden,), "emb.ln.b": (hidden,)}
    for part, (out, into) in {
        "q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "ao": (hidden, hidden),
        "fi": (inner, hidden), "fo": (hidden, inner),
    }.items():  # fmt: skip
        shapes |= {f"l0.{part}.w": (out, into), f"l0.{part}.b": (out,)}
    for part in ("aln", "oln"):
        shapes |= {f"l0.{part}.w": (hidden,), f"l0.{part}.b": (hidden,)}
    expected, blobs, directory = {}, b"", []
    for name, shape in shapes.items():
        four_bit = len(shape) == 2 and name not in ("emb.pos", "emb.type")
        if four_bit:
            numbers = generator.integers(0, 16, size=(np.prod(shape) // 32, 32), dtype=np.uint8)
            scales = generator.uniform(0.01, 0.1, size=len(numbers)).astype("<f2")
            packed = numbers[:, :16] | (numbers[:, 16:] << 4)
            blob = b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, packed, strict=True))
            expected[name] = ((numbers.astype(np.float32) - 8) * scales.astype(np.float32)[:, None]).reshape(shape)
        else:
            expected[name] = generator.normal(size=shape).astype("<f4")
            blob = expected[name].tobytes()
        directory.append((name, int(four_bit), int(np.prod(shape)), len(blobs), len(blob)))
        blobs += blob
    texts = [piece.encode() for piece in pieces]
    ends = np.cumsum([0, *map(len, texts)])
    head = b"E5S1" + struct.pack("<I7ifi", 1, hidden, 1, 4, inner, words, positions, 2, 1e-12, 32)
    head += struct.pack("<5iQ", words, 0, 2, 1, 3, ends[-1]) + struct.pack(f"<{words + 1}I", *ends)
    head += struct.pack(f"<{words}f", *([-1.0] * words)) + b"".join(texts) + struct.pack("<iI", 0, 0)
    size = len(head) + 4 + sum(2 + len(name) + 21 for name, *_ in directory)
    head += struct.pack("<i", len(directory))
    for name, kind, count, place, length in directory:
        head += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, count, size + place, length)
    (tmp_path / "weights.bin").write_bytes(head + blobs)
    command = [sys.executable, RECIPE / "prepare_e5_small.py", "--weights", tmp_path / "weights.bin", "--out"]
    subprocess.run([str(x) for x in (*command, tmp_path / "e5")], check=True, capture_output=True, timeout=120)
    model = SentenceTransformer(str(tmp_path / "e5"), device="cpu")
    assert model.prompts["query"] == "query: " and model.prompts["document"] == "passage: "
    weights = {name.partition("model.")[2]: tensor.numpy() for name, tensor in model[0].state_dict().items()}
    names = {"emb.word": "embeddings.word_embeddings.weight", "l0.fo.w": "encoder.layer.0.output.dense.weight"}
    names |= {"l0.q.w": "encoder.layer.0.attention.self.query.weight", "emb.ln.b": "embeddings.LayerNorm.bias"}
    for short, long in names.items():
        np.testing.assert_array_equal(weights[long], expected[short])
    ids = model.tokenizer("query:\triver  a")["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁query", ":", "▁river", "▁", "a", "</s>"]


def test_eight_bit_weights_of_an_onnx_file_become_a_cross_encoder(tmp_path):
    """A graph with the names that the package's file has, of one layer, with weights that are known."""
    config = BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=48,
        max_position_embeddings=16, num_labels=1,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    expected, stored, nodes = {}, {}, []
    for name, tensor in BertForSequenceClassification(config).state_dict().items():
        if tensor.ndim == 1 or "LayerNorm" in name:
            expected[name] = stored[name] = generator.normal(size=tuple(tensor.shape)).astype(np.float32)
            continue
        numbers = generator.integers(0, 256, size=tuple(tensor.shape), dtype=np.uint8)
        scale, zero = np.float32(generator.uniform(0.001, 0.01)), np.uint8(generator.integers(100, 150))
        expected[name] = (numbers.astype(np.float32) - np.float32(zero)) * scale
        kept = name
        if ".layer.0." in name:
            kept = f"onnx::MatMul_{len(nodes)}"
            path = name.removesuffix(".weight").replace("bert.encoder.layer.0.", "/bert/encoder/layer.0/")
            first, _, rest = path.rpartition("layer.0/")
            product = f"{first}layer.0/{rest.replace('.', '/')}/MatMul_quant"
            nodes.append(onnx.helper.make_node("MatMulInteger", ["x", f"{kept}_quantized"], ["y"], name=product))
        stored[f"{kept}_quantized"] = numbers if "embeddings" in name else np.ascontiguousarray(numbers.T)
        stored |= {f"{kept}_scale": np.asarray(scale), f"{kept}_zero_point": np.asarray(zero)}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = onnx.helper.make_graph(nodes, "bert", [], [], tensors)
    (tmp_path / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "river", "bridge", "who", "built"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    command = [sys.executable, RECIPE / "prepare_ms_marco.py", "--model", tmp_path, "--out", tmp_path / "made"]
    subprocess.run([str(x) for x in command], check=True, capture_output=True, timeout=120)
    model = load_cross_encoder(str(tmp_path / "made"), "test", device="cpu")
    weights = model.model.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name].numpy(), tensor)
    assert model.max_seq_length == 16 and isinstance(model.activation_fn, torch.nn.Identity)
    ids = model.tokenizer("who built", "Bridge")["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "who", "built", "[SEP]", "bridge", "[SEP]"]


def test_retrievers_are_compared_on_the_queries_of_the_agent(tmp_path):
    def candidates(name, found, query="q", topk=20, **shorter):
        fillers = [f"x{number}" for number in range(topk)]
        items = [
            Candidates(
                id=question, turn=turn, question="?", golden_answers=("a",), query=query, history=(), prefix="",
                passages=tuple(
                    ScoredPassage(id=id, score=1.0)
                    for id in [*fillers[:rank], *gold, *fillers[rank:]][: shorter.get(question, topk)]
                ),
            )
            for question, turn, gold, rank in found
        ]  # fmt: skip
        write_records(tmp_path / f"{name}.jsonl", items)
        return f"{name}={tmp_path / name}.jsonl"

    questions = [{"id": id, "question": "?", "golden_answers": ["a"], "metadata": {"gold_doc_ids": gold}}
                 for id, gold in (("one", ["g1", "g2"]), ("two", ["g3"]), ("asked nothing", ["g4"]))]  # fmt: skip
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in questions))
    # one: g1 first, then g2 at rank 6; two: nothing before, found at rank 2 after
    before = candidates("before", [("one", 1, ["g1"], 0), ("one", 2, ["g2"], 5), ("two", 1, ["g1"], 0)])
    after = candidates("after", [("one", 1, ["g1"], 0), ("one", 2, ["g2"], 5), ("two", 1, ["g3"], 1)])
    command = [sys.executable, str(RECIPE / "agent_queries.py"), "--questions", str(tmp_path / "test.jsonl"), before]
    shown = subprocess.run([*command, after], check=True, capture_output=True, text=True).stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown]
    assert cells[0] == ["retriever", "questions", "queries", "hit@3", "recall@3", "hit@20", "recall@20"]
    assert cells[2] == ["before", "2", "3", "25.0", "25.0", "50.0", "50.0"]
    assert cells[3][:3] == ["after", "2", "3"] and cells[3][3].startswith("75.0 (+50.0 [")
    assert [cell.split()[0] for cell in cells[3][3:]] == ["75.0", "75.0", "100.0", "100.0"]
    # BM25 has fewer passages where fewer share a word with the query; a smaller topk shortens every list.
    short = candidates("short", [("one", 1, ["g1"], 0), ("one", 2, ["g2"], 5), ("two", 1, ["g3"], 1)], two=2)
    shown = subprocess.run([*command, short], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [cell.split()[0] for cell in shown[3].strip("|").split("|")[3:]] == ["75.0", "75.0", "100.0", "100.0"]
    cut = candidates("cut", [("one", 1, ["g1"], 0), ("one", 2, ["g2"], 5), ("two", 1, ["g3"], 1)], topk=10)
    refused = subprocess.run([*command, cut], capture_output=True, text=True)
    assert refused.returncode == 1 and "cut.jsonl: expected 20 passages of a query, found at most 10" in refused.stderr
    others = candidates("others", [("one", 1, ["g1"], 0)], query="another")
    refused = subprocess.run([*command, others], capture_output=True, text=True)
    assert refused.returncode == 1 and "others.jsonl: holds other queries than" in refused.stderr

"""The other relevance scorers, and prompts that users bring."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agentic_r_plugin.components import load
from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.judge import load_prompt, parse_score
from agentic_r_plugin.data.relevance import RelevanceConfig, score_candidates, task_of
from agentic_r_plugin.data.scorers.base import Resources, ScoringTask
from agentic_r_plugin.data.scorers.cross_encoder import CrossEncoderScorer
from agentic_r_plugin.data.scorers.listwise_judge import ListwiseJudge
from agentic_r_plugin.data.scorers.noisy import Noisy
from agentic_r_plugin.data.scorers.pointwise_judge import PointwiseJudge
from agentic_r_plugin.errors import ConfigError, JudgeError
from agentic_r_plugin.llm.openai import OpenAIBackend
from agentic_r_plugin.records import Candidates, Passage, Relevance, ScoredPassage
from tests.data.scripted import Passages, passage
from tests.llm.loopback import chat, serve

STORE = Passages({key: passage(key) for key in "abc"})
QUERY = Candidates(
    id="q", turn=1, question="Who?", golden_answers=("x",), query="find it", history=(), prefix="",
    passages=tuple(ScoredPassage(id=key, score=1.0) for key in STORE),
)  # fmt: skip


def resources(url: str = "http://127.0.0.1:1/v1", cost: Cost | None = None) -> Resources:
    return Resources(open_judge=lambda: OpenAIBackend(url, "judge"), cost=cost or Cost())


def reply_with(score_of: dict[str, str]):
    def answer(path: str, body: dict):
        shown = re.search(r"text of (\w)", body["messages"][0]["content"]).group(1)
        status, content = chat(score_of[shown])
        return status, content | {"usage": {"prompt_tokens": 100, "completion_tokens": 2}}

    return answer


def test_the_pointwise_judge_asks_once_a_passage_and_counts_its_tokens():
    cost = Cost()
    with serve(reply_with({"a": "85", "b": " [7].", "c": "0"})) as server:
        scorer = PointwiseJudge.build({}, resources(server.url, cost))
        (scored,) = score_candidates([task_of(QUERY, STORE, sub_answer="Oslo")], scorer)
    assert isinstance(scored, Relevance) and scored.scores == {"a": 85, "b": 7, "c": 0}
    assert (cost.judge_requests, cost.judge_prompt_tokens, cost.judge_generated_tokens) == (3, 300, 6)
    assert (cost.judge_cached_tokens, cost.judge_cache_unknown_tokens) == (0, 300)
    prompt = server.requests[0][1]["messages"][0]["content"]
    assert "Query: find it\nReference answer to the query: Oslo\n" in prompt and "{" not in prompt


def test_one_passage_without_a_score_keeps_the_query_apart():
    with serve(reply_with({"a": "85", "b": "about 7", "c": "0"})) as server:
        scorer = PointwiseJudge.build({"max_retries": 1}, resources(server.url))
        (scored,) = score_candidates([task_of(QUERY, STORE)], scorer)
    assert isinstance(scored, JudgeError) and "found 'about 7'" in str(scored) and len(server.requests) == 4


@pytest.mark.parametrize("reply", ["101", "-1", "8.5", "85 or 90", "", "[1, 2]", "٣", "85/100", "1000"])
def test_a_reply_that_is_not_one_score_is_refused(reply: str):
    with pytest.raises(JudgeError, match="expected one whole number"):
        parse_score(reply)


def test_the_judges_windows_are_presets():
    assert ListwiseJudge.build({}, resources()).window == 20
    assert ListwiseJudge.build({"preset": "released_code"}, resources()).window == 10
    assert ListwiseJudge.build({"preset": "released_code", "window": 5}, resources()).window == 5
    with pytest.raises(ConfigError, match=r"preset='papre': expected one of paper, released_code"):
        ListwiseJudge.build({"preset": "papre"}, resources())


def test_a_user_may_bring_a_prompt_which_must_hold_the_placeholders_and_changes_the_fingerprint(tmp_path: Path):
    own = tmp_path / "mine.txt"
    own.write_text("{question} / {query} / {passages} / exactly {num_passages}")
    mine, ours = ListwiseJudge.build({"prompt": str(own)}, resources()), ListwiseJudge.build({}, resources())
    assert mine.render(task_of(QUERY, STORE), [STORE["a"]]) == "Who? / find it / [1] T a: text of a / exactly 1"
    assert mine.fingerprint() != ours.fingerprint()
    own.write_text("{question} {query}")
    with pytest.raises(ConfigError, match=r"mine\.txt: it lacks \{num_passages\}, \{passages\}"):
        load_prompt("listwise_relevance", str(own))
    with pytest.raises(ConfigError, match="no such file"):
        load_prompt("sub_answers", str(tmp_path / "none.txt"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny cross-encoder with random weights and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "text", "of", "T", "a", "b", "c", "find", "it", "Who", "?", ":"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=1, initializer_range=0.6,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_cross_encoder_scores_every_pair_by_its_own_probability(encoder: Path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scorer = load("relevance_scorer", "cross_encoder").build({"model": str(encoder), "device": "cpu"}, resources())
    empty = Candidates(**{**vars(QUERY), "id": "none", "passages": ()})
    scored, nothing = score_candidates([task_of(QUERY, STORE), task_of(empty, STORE)], scorer)
    assert isinstance(scored, Relevance) and isinstance(nothing, Relevance) and nothing.scores == {}
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    for key, score in scored.scores.items():
        with torch.no_grad():
            logit = model(**tokenizer("find it", f"T {key}\ntext of {key}", return_tensors="pt")).logits
        assert score == round(100 * float(torch.sigmoid(logit)))
    assert len(set(scored.scores.values())) > 1


def test_a_cross_encoder_scores_long_passages_by_their_beginning(encoder: Path):
    options = {"model": str(encoder), "device": "cpu", "max_length": 16}
    scorer = CrossEncoderScorer.build(options, resources())
    text, read = "text of a b c ? " * 6_000, []
    passage = Passage(id="long", title="T", text=text)
    task = ScoringTask(query=QUERY, passages=(passage,), question=None, sub_answer=None)
    predict = scorer._encoder.predict
    expected = round(100 * float(predict([("find it", f"T\n{text}")], activation_fn=torch.nn.Sigmoid())[0]))
    scorer._encoder.predict = lambda pairs, **options: read.extend(pairs) or predict(pairs, **options)
    assert scorer.score([task]) == [{"long": expected}]
    assert [len(given) for _, given in read] == [16 * 16]


def test_a_cross_encoders_length_is_limited_to_its_positions(encoder: Path, capsys: pytest.CaptureFixture[str]):
    passage = Passage(id="long", title="T", text="text of a b c ? " * 500)
    task = ScoringTask(query=QUERY, passages=(passage,), question=None, sub_answer=None)
    scored = []
    for length in (512, 100_000, 0):
        scorer = CrossEncoderScorer.build({"model": str(encoder), "device": "cpu", "max_length": length}, resources())
        scored += scorer.score([task])
    assert scored[0] == scored[1] == scored[2]
    assert "max_length=100000 is limited to the 512 tokens" in capsys.readouterr().err


def test_a_cross_encoder_of_another_kind_or_with_other_options_is_refused(encoder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"give options\.model"):
        CrossEncoderScorer.build({}, resources())
    with pytest.raises(ConfigError, match="no option 'modle'"):
        CrossEncoderScorer.build({"modle": "x"}, resources())
    with pytest.raises(ConfigError, match="text='passage'"):
        CrossEncoderScorer(str(encoder), text="passage")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        CrossEncoderScorer(str(tmp_path))


def test_the_text_used_for_the_query_is_part_of_the_fingerprint(encoder: Path):
    one, other = (CrossEncoderScorer(str(encoder), text=text, device="cpu") for text in ("query", "question_query"))
    assert one.fingerprint() != other.fingerprint() != fingerprint("cross_encoder")
    assert other._text(task_of(QUERY, STORE)) == "Who? find it"


def test_a_cross_encoders_fingerprint_follows_its_files_and_not_its_place(encoder: Path, tmp_path: Path):
    def fingerprint_of(folder: Path) -> str:
        return CrossEncoderScorer(str(folder), device="cpu").fingerprint()

    moved = shutil.copytree(encoder, tmp_path / "moved")
    assert fingerprint_of(moved) == fingerprint_of(encoder)
    from safetensors.torch import load_file

    weights = load_file(moved / "model.safetensors")
    (moved / "model.safetensors").unlink()
    torch.save(weights, moved / "pytorch_model.bin")
    found = [fingerprint_of(moved), fingerprint_of(shutil.copytree(moved, tmp_path / "again"))]
    assert found[0] == found[1]
    weights["classifier.bias"] += 1
    torch.save(weights, moved / "pytorch_model.bin")
    found.append(fingerprint_of(moved))
    for name, old, new in (
        ("config.json", '"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-3'),
        ("tokenizer.json", '"find"', '"found"'),
    ):
        text = (moved / name).read_text()
        assert old in text
        (moved / name).write_text(text.replace(old, new))
        found.append(fingerprint_of(moved))
    assert len(set(found)) == 4


# --- Noisy ------------------------------------------------------------------------------------------------------------

MANY = Passages({str(n): Passage(id=str(n), title=f"T{n}", text="find it" if n == 19 else "none") for n in range(20)})


class Falling:
    """Scores 100, 95, ... in retrieval order; the last passage scores 5."""

    needs_questions = False

    def score(self, tasks):
        return [{item.id: 100 - 5 * place for place, item in enumerate(task.passages)} for task in tasks]

    def fingerprint(self):
        return "falling"


def noisy(turn: int = 1, **options) -> tuple[dict[str, int], dict[str, int]]:
    """Scores without and with errors."""
    passages = tuple(ScoredPassage(id=key, score=1.0) for key in MANY)
    task = task_of(replace(QUERY, turn=turn, passages=passages), MANY)
    (right,), (found,) = Falling().score([task]), Noisy(Falling(), Noisy.Options(**options)).score([task])
    assert list(found) == list(right)
    return right, found


def changed(turns: int, **options) -> float:
    pairs = [noisy(turn, **options) for turn in range(turns)]
    return sum(found[id] != right[id] for right, found in pairs for id in right) / (20 * turns)


def test_noise_is_the_same_for_a_query_and_another_for_another_query_or_seed():
    assert noisy(rate=0.5) == noisy(rate=0.5)
    assert len({tuple(noisy(turn, rate=0.5, seed=seed)[1].values()) for turn in (1, 2) for seed in (0, 1)}) == 4
    right, found = noisy(rate=0.0)
    assert found == right


def test_a_swap_exchanges_scores_and_hits_the_stated_share():
    right, found = noisy(rate=1.0, ways=["swap"])
    assert sorted(found.values()) == sorted(right.values()) and found != right
    # a swap moves two passages; at a low rate they rarely coincide
    assert changed(400, rate=0.05, ways=["swap"]) == pytest.approx(0.1, abs=0.01)


def test_a_tie_takes_the_next_better_score_and_the_best_stays():
    right, found = noisy(rate=1.0, ways=["tie"])
    assert found == {key: min(score + 5, 100) if key in "01" else 100 for key, score in right.items()}
    assert changed(400, rate=0.3, ways=["tie"]) == pytest.approx(0.3 * 19 / 20, abs=0.01)


def test_optimism_raises_passages_that_share_the_querys_words_alone():
    right, found = noisy(rate=1.0, ways=["overlap"])
    assert right["19"] == 5 and found == right | {"19": 100}


def test_a_higher_rate_only_adds_errors():
    (right, few), (_, more) = noisy(rate=0.2, ways=["overlap"]), noisy(rate=1.0, ways=["overlap"])
    assert {key for key in right if few[key] != right[key]} <= {key for key in right if more[key] != right[key]}


def test_noise_is_around_any_registered_scorer_and_needs_what_that_one_needs(tmp_path: Path):
    given = {"scorer": "noisy", "candidates": "c", "out": "o", "corpus": "x"}
    around = RelevanceConfig(**given, options={"rate": 0.1})
    assert around.needs_questions and around.passages_per_prompt() == 0
    with pytest.raises(ConfigError, match="the scorer noisy uses the benchmark's metadata"):
        around.check()
    twice = {"scorer": "noisy", "options": {"scorer": "pointwise_judge", "options": {"max_tokens": 4}}}
    judged = RelevanceConfig(**given, options=twice)
    assert judged.passages_per_prompt() == 1 and not judged.needs_questions
    judged.check()
    with serve(reply_with({"a": "85", "b": "7", "c": "about 9"})) as server:
        scorer = load("relevance_scorer", "noisy").build(
            {"scorer": "pointwise_judge", "rate": 0.5}, resources(server.url)
        )
        (scored,) = score_candidates([task_of(QUERY, STORE)], scorer)
    assert isinstance(scored, JudgeError), "an error of the judge stays one"
    prints = {
        Noisy(Falling(), Noisy.Options(rate=rate, ways=ways)).fingerprint()
        for rate in (0.1, 0.2)
        for ways in (["tie"], ["swap"])
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rat": 1}, "relevance scorer noisy: .*rat"),
        ({"rate": 1.5}, "rate: expected a share from 0 to 1, found 1.5"),
        ({"ways": ["swaps"]}, "ways: expected some of swap, overlap, tie, found swaps"),
        ({"ways": []}, "found none"),
        ({"scorer": "gold"}, "unknown relevance_scorer 'gold'"),
        ({"options": {"x": 1}}, "gold_documents has no options"),
    ],
)
def test_wrong_options_of_noise_are_errors(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Noisy.build(options, resources())

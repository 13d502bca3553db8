"""The losses against their formulas over every slot of a batch, in double precision, down to the model's parameters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.retriever import loss as losses
from agentic_r_plugin.retriever.batches import Batch, Example, epoch_batches, read_examples
from agentic_r_plugin.retriever.loop import Training
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.retriever.start import initial_retriever
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus

TEMPERATURE, TEACHER = 0.05, 0.2


def example(name, positive, negatives, scores=None, known=()):
    return Example(
        key=(name, 1),
        request=SearchRequest(query=name),
        positive=positive,
        negatives=negatives,
        known_positives=frozenset({positive, *known}),
        scores=scores,
    )


EXAMPLES = (
    example("a", 9, (2, 4), (0.9, 0.3, 0.3), known=(2,)),  # 2 is another positive of the same query
    example("b", 2, (7, 9), (1.0, 0.0, 0.6)),  # the positive of a is a negative here
    example("c", 4, (9, 5), (0.2, 0.8, 0.5)),  # and here again
)
"""Rows 9, 2 and 4 are in several slots."""


def batch_of(examples):
    slots = [row for item in examples for row in (item.positive, *item.negatives)]
    rows = tuple(dict.fromkeys(slots))
    return Batch(examples=tuple(examples), rows=rows, counts=tuple(slots.count(row) for row in rows))


def unit(count, seed):
    vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1).requires_grad_()


def slot_scores(queries, vector_of, i):
    """(example, place in its group, row, score) of every slot of the batch for query i."""
    return [
        (k, place, row, queries[i] @ vector_of[row] / TEMPERATURE)
        for k, item in enumerate(EXAMPLES)
        for place, row in enumerate((item.positive, *item.negatives))
    ]


def contrastive_by_hand(queries, vector_of, masked):
    total = 0.0
    for i, item in enumerate(EXAMPLES):
        terms = [
            score
            for k, place, row, score in slot_scores(queries, vector_of, i)
            if not masked or (k, place) == (i, 0) or row not in item.known_positives
        ]
        own = queries[i] @ vector_of[item.positive] / TEMPERATURE
        total = total - torch.log(torch.exp(own) / sum(torch.exp(term) for term in terms))
    return total / len(EXAMPLES)


def replug_by_hand(queries, vector_of):
    total = 0.0
    for i, item in enumerate(EXAMPLES):
        scores = [queries[i] @ vector_of[row] / TEMPERATURE for row in (item.positive, *item.negatives)]
        retriever = [torch.exp(s) / sum(torch.exp(t) for t in scores) for s in scores]
        teacher = [math.exp(s / TEACHER) / sum(math.exp(t / TEACHER) for t in item.scores) for s in item.scores]
        total = total + sum(p * (torch.log(p) - math.log(t)) for p, t in zip(retriever, teacher, strict=True))
    return total / len(EXAMPLES)


def llm_embedder_by_hand(queries, vector_of):
    total = 0.0
    for i, item in enumerate(EXAMPLES):
        slots = slot_scores(queries, vector_of, i)
        for place, score in enumerate(item.scores):
            weight = math.exp(score / TEACHER) / sum(math.exp(t / TEACHER) for t in item.scores)
            own = next(s for k, g, _, s in slots if (k, g) == (i, place))
            rivals = [s for k, g, _, s in slots if k != i or item.scores[g] < score]
            total = total - weight * torch.log(torch.exp(own) / (torch.exp(own) + sum(torch.exp(r) for r in rivals)))
    return total / len(EXAMPLES)


CASES = {
    "contrastive": (losses.contrastive, lambda q, v: contrastive_by_hand(q, v, masked=False), False),
    "contrastive, masked": (losses.contrastive, lambda q, v: contrastive_by_hand(q, v, masked=True), True),
    "replug": (
        lambda scores, known: losses.distillation(scores, known, teacher_temperature=TEACHER),
        replug_by_hand,
        False,
    ),
    "llm_embedder": (
        lambda scores, known: losses.reward_weighted(scores, known, teacher_temperature=TEACHER),
        llm_embedder_by_hand,
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_over_distinct_passages_are_those_of_the_formula_over_all_slots(name):
    loss, by_hand, masked = CASES[name]
    batch = batch_of(EXAMPLES)
    queries, passages = unit(3, 0), unit(len(batch.rows), 1)
    expected = by_hand(queries, {row: passages[j] for j, row in enumerate(batch.rows)})
    wanted = torch.autograd.grad(expected, (queries, passages))
    known = losses.targets(batch, mask_false_negatives=masked).to(queries)
    found = loss(losses.similarities(queries, passages, TEMPERATURE), known)
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    for gradient, by_formula in zip(torch.autograd.grad(found, (queries, passages)), wanted, strict=True):
        torch.testing.assert_close(gradient, by_formula, atol=1e-10, rtol=0)
        assert by_formula.abs().max() > 0.1


def test_masking_leaves_out_known_positives_and_counts_the_own_positive_once():
    batch = batch_of(EXAMPLES)
    assert batch.rows == (9, 2, 4, 7, 5) and batch.counts == (3, 2, 2, 1, 1)
    paper = losses.targets(batch, mask_false_negatives=False)
    assert paper.weights_BP.tolist() == [[3, 2, 2, 1, 1]] * 3
    masked = losses.targets(batch, mask_false_negatives=True)
    assert masked.weights_BP.tolist() == [[1, 0, 2, 1, 1], [3, 1, 2, 1, 1], [3, 2, 1, 1, 1]]


def test_an_even_batch_has_the_logarithm_of_its_slots_as_loss():
    batch = batch_of(EXAMPLES)
    same = torch.ones(len(batch.rows), 1, dtype=torch.float64)
    known = losses.targets(batch, mask_false_negatives=False)
    loss = losses.contrastive(losses.similarities(same[:3], same, TEMPERATURE), known.to(same))
    assert loss.item() == pytest.approx(math.log(9))


def test_groups_of_different_lengths_and_a_batch_of_one_query_have_finite_gradients():
    examples = (example("a", 1, (2,), (1.0, 0.5)), example("b", 3, (4, 5), (0.1, 0.2, 0.3)))
    for chosen in (examples, examples[:1]):
        batch = batch_of(chosen)
        for name in ("contrastive", "replug", "llm_embedder"):
            queries, passages = unit(len(chosen), 0), unit(len(batch.rows), 1)
            known = losses.targets(batch, mask_false_negatives=False).to(queries)
            loss = CASES[name][0](losses.similarities(queries, passages, TEMPERATURE), known)
            for gradient in torch.autograd.grad(loss, (queries, passages)):
                assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0, name


# --- the whole step, in double precision


@pytest.fixture(scope="module")
def step(base, corpus, groups):
    """A batch whose groups share passages, and what the formula over all slots gives for it."""
    config = TrainRetrieverConfig(
        groups=str(groups / "train.jsonl"), corpus=str(corpus), out="unused", retriever=base, preset="e5",
        temperature=TEMPERATURE, precision="float32",
    )  # fmt: skip
    opened = Corpus(corpus)
    read = read_examples(config.groups, opened)
    shared = [replace(item, negatives=(*item.negatives[:2], read[k - 1].positive)) for k, item in enumerate(read[:12])]
    batch = next(epoch_batches(shared, epoch=0, seed=0, batch_size=12, group_size=4))
    assert len(batch.rows) < sum(batch.counts) == 48
    retriever = initial_retriever(config)
    retriever.model.double().eval()
    loss = every_slot_encoded(retriever, opened, batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in retriever.model.named_parameters() if p.grad is not None}
    return config, opened, batch, loss.item(), expected


def every_slot_encoded(retriever, corpus, batch):
    def vectors(texts, prompt):
        return retriever.model(retriever.model.preprocess(texts, prompt=prompt))["sentence_embedding"]

    slots = [row for item in batch.examples for row in (item.positive, *item.negatives)]
    queries = vectors([retriever.query_text(item.request) for item in batch.examples], retriever.record.query_prompt)
    passages = vectors([corpus[row].contents for row in slots], retriever.record.passage_prompt)
    scores = queries @ passages.T / TEMPERATURE
    return (torch.logsumexp(scores, dim=1) - scores[torch.arange(12), torch.arange(0, 48, 4)]).mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mini_batch_tokens": 10**6},
        {"mini_batch_tokens": 40, "kept_tokens": 0},
        {"mini_batch_tokens": 40, "kept_tokens": 100},
        {"mini_batch_tokens": 40, "kept_tokens": 0, "packing": False},
        {"mini_batch_tokens": 40, "kept_tokens": 0, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_every_speed_up_leaves_loss_and_parameter_gradients_as_in_the_formula(step, settings):
    config, corpus, batch, expected_loss, expected = step
    config = replace(config, **settings)
    retriever = initial_retriever(config)
    retriever.model.double()
    run = Training(config, corpus, retriever, losses.contrastive, rank=0, world=1)
    assert run.encoder.packs == config.packing
    retriever.model.eval() if not config.gradient_checkpointing else without_dropout(retriever.model)
    loss, _, _ = run.accumulate(batch)
    assert loss == pytest.approx(expected_loss, abs=1e-10)
    found = {name: p.grad for name, p in retriever.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=0, msg=name)
    assert max(gradient.abs().max() for gradient in found.values()) > 0.1


def without_dropout(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def test_caching_draws_the_same_dropout_in_both_passes(step):
    config, corpus, batch, without, _ = step
    gradients = []
    for kept in (0, None):
        changed = replace(config, mini_batch_tokens=40, kept_tokens=kept if kept == 0 else 10**6)
        retriever = initial_retriever(changed)
        retriever.model.double().train()
        run = Training(changed, corpus, retriever, losses.contrastive, rank=0, world=1)
        loss, _, _ = run.accumulate(batch)
        gradients.append((loss, {n: p.grad for n, p in retriever.model.named_parameters() if p.grad is not None}))
    (loss, found), (other_loss, expected) = gradients
    assert loss == pytest.approx(other_loss, abs=1e-12) and abs(loss - without) > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("name", ["contrastive", "distillation", "reward_weighted"])
def test_the_weight_of_a_group_multiplies_the_loss_of_its_query(name):
    loss = (
        getattr(losses, name) if name == "contrastive" else partial(getattr(losses, name), teacher_temperature=TEACHER)
    )
    weights = (0.5, 1.0, 2.0)
    scores_BP = losses.similarities(unit(3, 1), unit(5, 2), TEMPERATURE)
    plain = losses.targets(batch_of(EXAMPLES), mask_false_negatives=True)
    assert plain.factor_B is None
    weighted = batch_of([replace(item, weight=weight) for item, weight in zip(EXAMPLES, weights, strict=True)])
    found = loss(scores_BP, losses.targets(weighted, mask_false_negatives=True).to(scores_BP))
    rows = range(3)
    alone = [
        loss(
            scores_BP[i : i + 1],
            replace(plain, **{key: value[i : i + 1] for key, value in vars(plain).items() if value is not None}),
        )
        for i in rows
    ]
    assert found.item() == pytest.approx(sum(w * one.item() for w, one in zip(weights, alone, strict=True)) / 3)
    assert loss(scores_BP, plain).item() == pytest.approx(sum(one.item() for one in alone) / 3)


def test_a_weight_is_read_from_the_groups_and_must_be_above_zero(groups, corpus, tmp_path):
    (line, *_) = [json.loads(text) for text in (groups / "train.jsonl").read_text().splitlines()]
    file = tmp_path / "groups.jsonl"
    with Corpus(corpus) as passages:
        file.write_text(json.dumps(line | {"schema": "group/2", "weight": 0.25}) + "\n")
        assert read_examples(file, passages)[0].weight == 0.25
        file.write_text(json.dumps(line | {"schema": "group/2", "weight": 0.0}) + "\n")
        with pytest.raises(RecordError, match=r"groups.jsonl:1: expected a weight above 0, found 0"):
            read_examples(file, passages)

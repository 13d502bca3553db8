"""Ten thousand hostile requests against the retrieval service: wrong types, huge, deep, bad UTF-8, slow.

    python tests/benchmarks/retrieval_hostile.py --index INDEX [--requests 10000] [--slow 200]

Starts the service with two workers, keeps slow clients on it, sends the requests, and asks a good one after every
hundred. Prints how many got which status, as a Markdown table; fails when a worker died, an answer was not a typed
4xx, or a good request failed.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx

from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.service.server import ServeConfig, running_service

Hostile = tuple[str, str, bytes]
"""Method, path, body."""


def hostile_bodies(count: int, seed: int, *, huge: int = 30_000) -> Iterator[Hostile]:
    """`count` requests that no service should answer with 200 or 5xx; `huge` bytes are more than it takes."""
    draw = random.Random(seed)

    def wrong_types() -> bytes:
        body = {"queries": ["q"], "topk": 3}
        name = draw.choice(["queries", "topk", "return_scores", "questions", "histories"])
        wrong = {
            "queries": [1, {}, "q", [None], [["q"]], ["ok", 3]],
            "topk": ["3", -1, 1.5, True, [], {}, float("inf")],
            "return_scores": ["yes", 1, [], {}],
            "questions": ["q", [1], ["a", "b"], {}, 7],
            "histories": ["q", ["h"], [[1]], {}, [[], []]],
        }
        return json.dumps(body | {name: draw.choice(wrong[name])}).encode("utf-8", "surrogatepass")

    def deep() -> bytes:
        depth = draw.choice([1000, 3000, 8000])
        opening, closing = draw.choice([("[", "]"), ('{"queries":', "}")])
        middle = "" if opening == "[" else "1"
        return (opening * depth + middle + closing * draw.choice([0, depth]))[: huge - 1].encode()

    def bad_utf8() -> bytes:
        return b'{"queries": ["' + bytes(draw.choices(range(128, 256), k=draw.randint(1, 200))) + b'\xff"]}'

    def random_bytes() -> bytes:
        return bytes(draw.choices(range(256), k=draw.randint(0, 300)))

    def cut() -> bytes:
        whole = json.dumps({"queries": ["a b c"] * 5, "topk": 3}).encode()
        return whole[: draw.randrange(len(whole))]

    def lone_surrogate() -> bytes:
        return b'{"queries": ["\\ud8' + draw.choice(string.hexdigits).encode() + b'0"]}'

    makers = [wrong_types, deep, bad_utf8, random_bytes, cut, lone_surrogate]
    for number in range(count):
        kind = number % 10
        if kind == 0:
            yield "POST", "/retrieve", b'{"queries": ["' + b"x" * huge + b'"]}'
        elif kind == 1:
            yield draw.choice(["GET", "PUT", "DELETE", "PATCH"]), "/retrieve", b""
        elif kind == 2:
            yield "POST", "/" + "".join(draw.choices(string.ascii_letters + "/.%~", k=12)), b"{}"
        else:
            yield "POST", "/retrieve", draw.choice(makers)()


def send_all(url: str, requests: Iterable[Hostile], *, connections: int) -> Counter[int]:
    """Send them; how many got which status. A connection that was closed in the middle of a huge body counts as 413."""

    def send(request: Hostile) -> int:
        method, path, body = request
        try:
            answer = client.request(method, url + path, content=body)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return 413 if len(body) > 10_000 else -1
        if answer.status_code >= 400 and method != "HEAD":
            error = answer.json()["error"]
            assert set(error) == {"type", "message"}, answer.text
        return answer.status_code

    with (
        httpx.Client(timeout=60, limits=httpx.Limits(max_connections=connections)) as client,
        ThreadPoolExecutor(connections) as pool,
    ):
        return Counter(pool.map(send, requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--slow", type=int, default=200)
    args = parser.parse_args()
    statuses: Counter[int] = Counter()
    good = 0
    config = ServeConfig(index=args.index, port=0, workers=2, max_body_bytes=200_000, header_timeout_s=5)
    with running_service(config) as url:
        port = int(url.rpartition(":")[2])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(args.slow)]
        for number, connection in enumerate(slow):
            head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
            connection.sendall([b"", b"POST /ret", head + b"{"][number % 3])
        client = RetrievalClient(url, retries=0, timeout_s=30)
        bodies = list(hostile_bodies(args.requests, seed=0, huge=250_000))
        for start in range(0, len(bodies), 100):
            statuses += send_all(url, bodies[start : start + 100], connections=16)
            good += len(client.search([SearchRequest(query=f"who is number {start}")], 3)[0]) == 3
        metrics = httpx.get(f"{url}/metrics").text
        deaths = httpx.get(f"{url}/health").status_code != 200
        for connection in slow:
            connection.close()
    print("| status | answers |\n|---|---|")
    for status, count in sorted(statuses.items()):
        print(f"| {status} | {count:,} |")
    print(
        f"\n{good} of {-(-args.requests // 100)} good requests in between answered; {args.slow} slow clients held on."
    )
    counted = [line for line in metrics.splitlines() if line.startswith("agentic_r_search_requests_total")]
    print("The service's own count: " + ", ".join(line.partition("total")[2] for line in counted))
    if deaths or good != -(-args.requests // 100) or not set(statuses) <= {400, 404, 405, 413}:
        raise SystemExit("the service did not survive it")


if __name__ == "__main__":
    main()

"""Our own cost per request: items a second through the openai engine against a server that only echoes.

    python benchmarks/openai_overhead.py
    python benchmarks/openai_overhead.py --concurrency 64 --items 2000 --prompt 1000

The server runs in a process of its own and answers every request at once with the same stream of `--tokens` events, so
all time is ours and the sockets'. `engine` sends prompts of `--prompt` token ids through the openai engine; `bare`
sends the same bodies to the same server through the HTTP client alone, with as many threads, and reads the streams
without looking into them. They take turns, one round warms up; read the ratio (median over rounds). Prints a table,
then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import numpy as np

from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.engines.base import Sampling
from longspan.engines.openai import OpenAIEngine
from longspan.engines.source import EndpointArguments


def serve(tokens: int, port: Any) -> None:
    """Echo for ever."""
    choices = [{"choices": [{"text": " a", "token_ids": [7], "finish_reason": None}]} for _ in range(tokens)]
    choices[-1]["choices"][0]["finish_reason"] = "length"
    events = [*choices, {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": tokens}}]
    stream = ("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n").encode()
    plain = json.dumps({"choices": [{"text": " a"}], "usage": {}}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self.reply(b'{"data": []}', "application/json")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            streamed = b'"stream":true' in body
            self.reply(stream if streamed else plain, "text/event-stream" if streamed else "application/json")

        def reply(self, content: bytes, kind: str) -> None:
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
            self.wfile.write(head.encode() + content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.put(server.server_address[1])
    server.serve_forever()


def rate(run: Callable[[], Any], items: int) -> float:
    began = time.perf_counter()
    run()
    return items / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--items", type=int, default=1_000)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=4, help="events of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=serve, args=(options.tokens, port), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.get()}"
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=258), ["any text will do"])
    arguments = EndpointArguments(concurrency=options.concurrency)
    engine = OpenAIEngine(url, "m", tokenizer, markers=False, fingerprint="f", arguments=arguments)
    prompts = list(np.random.default_rng(0).integers(0, 256, (options.items, options.prompt)))
    sampling = Sampling(max_new_tokens=options.tokens)
    limits = httpx2.Limits(max_connections=options.concurrency, max_keepalive_connections=options.concurrency)
    client = httpx2.Client(base_url=url, timeout=60, limits=limits)
    bodies = [{"prompt": prompt.tolist(), "max_tokens": options.tokens, "stream": True} for prompt in prompts]

    def bare() -> None:
        with ThreadPoolExecutor(options.concurrency) as pool:
            list(pool.map(lambda body: client.post("/v1/completions", json=body).content, bodies))

    def ours() -> None:
        written = engine.generate(prompts, sampling)
        assert all(len(each.tokens) == options.tokens for each in written)

    rates: dict[str, list[float]] = {"engine": [], "bare": []}
    for turn in range(options.rounds + 1):
        for name, run in (("engine", ours), ("bare", bare)):
            found = rate(run, options.items)
            if turn:
                rates[name].append(found)
    ratio = statistics.median(a / b for a, b in zip(rates["engine"], rates["bare"], strict=True))
    print(f"{options.concurrency} at a time, prompts of {options.prompt} tokens, answers of {options.tokens} events")
    for name, values in rates.items():
        print(f"  {name:8} {statistics.median(values):8,.0f} items/s  ({min(values):,.0f} to {max(values):,.0f})")
    print(f"  ratio    {ratio:8.2f}")
    facts = {name: getattr(options, name) for name in ("concurrency", "items", "prompt", "tokens", "rounds")}
    medians = {f"{name}_items_per_second": round(statistics.median(values), 1) for name, values in rates.items()}
    print(
        json.dumps({"benchmark": "openai_overhead", "machine": platform.machine(), **facts, **medians, "ratio": ratio})
    )
    server.terminate()


if __name__ == "__main__":
    main()

"""Measures a server under load: time to the first token, time between tokens, tokens a second.

    python -m benchmarks.serve --url=http://127.0.0.1:8000 --rate=4 --requests=200 [--max_tokens=64]
        [--prompt_words=32] [--disconnect=0.3] [--seed=0] [--output=serve.json]
    python -m benchmarks.serve --url=http://127.0.0.1:8000 --concurrency=8 --requests=64
        [--peer_url=http://127.0.0.1:8001 --peer_model=NAME] [--rounds=3]

With --rate requests arrive at random times (a Poisson process), whether or not earlier ones are answered: an open loop,
as of many independent users. With --concurrency so many requests are in progress at all times. Each request is a
streamed chat completion with a prompt of random words. With --peer_url a second server, such as `transformers serve` of
the same weights, gets the same requests in turns with the first.

The tokens are those of the server's usage, or the number of its chunks where it reports none. The command fails if a
request has another outcome than 200, 429, or a disconnection that was asked for.
"""

import asyncio
import collections
import dataclasses
import json
import random
import statistics
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.files import expand

URL = flags.DEFINE_string("url", None, "Server, such as http://127.0.0.1:8000.")
MODEL = flags.DEFINE_string("model", None, "Model to ask for; default: the server's first.")
PEER_URL = flags.DEFINE_string("peer_url", None, "Second server, measured in turns with the first.")
PEER_MODEL = flags.DEFINE_string("peer_model", None, "Model of the second server; default: its first.")
RATE = flags.DEFINE_float("rate", None, "Requests a second, at random times.", lower_bound=0.0)
CONCURRENCY = flags.DEFINE_integer("concurrency", None, "Requests in progress at all times.", lower_bound=1)
REQUESTS = flags.DEFINE_integer("requests", 64, "Requests of a round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 1, "Rounds; each measures every server.", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Maximum tokens of a completion.", lower_bound=1)
PROMPT_WORDS = flags.DEFINE_integer("prompt_words", 32, "Words of a prompt.", lower_bound=1)
DISCONNECT = flags.DEFINE_float("disconnect", 0.0, "Share of clients that leave at a random time.", 0.0, 1.0)
API_KEY = flags.DEFINE_string("api_key", "none", "API key of the servers.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of prompts and arrivals.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results.")

WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not")
LONGEST_SECONDS = 3.0  # that a client waits before it leaves
EXPECTED = ("200", "429", "left")


@dataclasses.dataclass(frozen=True)
class Side:
    """A server: its name in the results, address and model."""

    name: str
    url: str
    model: str


@dataclasses.dataclass
class Outcome:
    """One request: its HTTP status, "left" or the name of an error, and times in seconds."""

    status: str = "unanswered"
    first: float | None = None
    gaps: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def main() -> None:
    if URL.value is None:
        raise UserError("needs --url=URL of a server, such as http://127.0.0.1:8000")
    if (RATE.value is None) == (CONCURRENCY.value is None):
        raise UserError("needs --rate=N, for requests at random times, or --concurrency=N")
    sides = [Side("server", URL.value, MODEL.value or first_model(URL.value))]
    if PEER_URL.value is not None:
        sides.append(Side("peer", PEER_URL.value, PEER_MODEL.value or first_model(PEER_URL.value)))
    rounds: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(ROUNDS.value):
        for side in sides:
            found = asyncio.run(measure(side, SEED.value + number))
            rounds[side.name].append(found)
            print(f"{side.name}: {json.dumps(found)}", flush=True)
    if OUTPUT.value is not None:
        expand(OUTPUT.value).write_text(json.dumps(rounds, indent=2) + "\n")
    for name, all_found in rounds.items():
        statuses = {status for found in all_found for status in found["statuses"]}
        if unexpected := sorted(statuses - set(EXPECTED)):
            sys.exit(f"requests to the {name} ended with {', '.join(unexpected)}")
    medians = {name: statistics.median(found["tokens_per_second"] for found in rounds[name]) for name in rounds}
    if len(sides) == 2:
        print(f"tokens a second relative to the peer: {medians['server'] / medians['peer']:.2f}")


def first_model(url: str) -> str:
    """Asks a server for its first model; UserError if it does not answer."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {API_KEY.value}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"cannot read {url}/v1/models: {error}") from None


async def measure(side: Side, seed: int) -> dict[str, Any]:
    """Sends the requests of a round to a server; returns what its clients saw."""
    rng = random.Random(seed)
    outcomes = [Outcome() for _ in range(REQUESTS.value)]
    bodies = [request_body(side.model, rng, number) for number in range(REQUESTS.value)]
    leaves = [rng.uniform(0, LONGEST_SECONDS) if rng.random() < DISCONNECT.value else None for _ in outcomes]
    begun = time.perf_counter()
    if RATE.value is not None:
        tasks = []
        for body, outcome, leave in zip(bodies, outcomes, leaves, strict=True):
            tasks.append(asyncio.create_task(ask(side.url, body, outcome, leave)))
            await asyncio.sleep(rng.expovariate(RATE.value))
        await asyncio.gather(*tasks)
    else:
        places = asyncio.Semaphore(CONCURRENCY.value or 1)

        async def next_place(body: bytes, outcome: Outcome, leave: float | None) -> None:
            async with places:
                await ask(side.url, body, outcome, leave)

        await asyncio.gather(*map(next_place, bodies, outcomes, leaves))
    return summary(outcomes, time.perf_counter() - begun)


def request_body(model: str, rng: random.Random, seed: int) -> bytes:
    prompt = " ".join(rng.choices(WORDS, k=PROMPT_WORDS.value))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS.value,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


async def ask(url: str, body: bytes, outcome: Outcome, leave: float | None) -> None:
    """Sends a request and reads its stream; closes the connection after `leave` seconds."""
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(leave):
            await read_stream(url, body, outcome, begun)
    except TimeoutError:
        outcome.status = "left"
    except (OSError, EOFError, ValueError) as error:
        outcome.status = type(error).__name__
    outcome.seconds = time.perf_counter() - begun


async def read_stream(url: str, body: bytes, outcome: Outcome, begun: float) -> None:
    parts = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=1 << 20)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {API_KEY.value}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        outcome.status = (await reader.readline()).split()[1].decode()
        last, chunks = 0.0, 0
        # Each event is a chunk of its own, so that lines need no other decoding.
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            event, now = json.loads(line.removeprefix(b"data: ")), time.perf_counter()
            if error := event.get("error"):
                outcome.status = f"error in the stream: {error['message'] if isinstance(error, dict) else error}"
            usage = event.get("usage")
            outcome.tokens = usage["completion_tokens"] if usage else outcome.tokens
            if not any(choice.get("delta", {}).get("content") for choice in event.get("choices", [])):
                continue
            chunks += 1
            if outcome.first is None:
                outcome.first = now - begun
            else:
                outcome.gaps.append(now - last)
            last = now
        outcome.tokens = outcome.tokens or chunks
    finally:
        writer.close()


def summary(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Returns the counts, quantiles in milliseconds, and tokens a second of a round."""
    firsts = [outcome.first for outcome in outcomes if outcome.first is not None]
    gaps = [gap for outcome in outcomes for gap in outcome.gaps]
    return {
        "statuses": dict(collections.Counter(outcome.status for outcome in outcomes)),
        "seconds": round(seconds, 2),
        "first_token_ms": quantiles(firsts),
        "between_tokens_ms": quantiles(gaps),
        "tokens_per_second": round(sum(outcome.tokens for outcome in outcomes) / seconds, 1),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """Returns the median, the 90th and the 99th percentile of seconds, in milliseconds."""
    ordered = sorted(values)
    return {
        f"p{percent}": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2)
        for percent in (50, 90, 99)
        if ordered
    }


if __name__ == "__main__":
    cli.run(main)

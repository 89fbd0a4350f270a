"""Clients of `serve_drill`: they send random requests, some leave before the answer, and all outcomes are noted."""

import asyncio
import collections
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not")
MOST_WORDS = 60  # of a prompt
MOST_TOKENS = 128  # of a completion


def authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@dataclasses.dataclass(frozen=True)
class Wish:
    """A request, and when its client leaves: after so many events of the stream, or seconds; None: it stays."""

    path: str
    body: dict[str, Any]
    leaves_after_events: int | None = None
    leaves_after_seconds: float | None = None


@dataclasses.dataclass
class Outcome:
    """One request: "200", "429", "left" or what was wrong, and `time.monotonic()` of its beginning, first event, end.

    Attributes:
      wished: beginning of the first attempt, where earlier ones had status 429.
      refusals: number of these.
    """

    client: int
    wished: float
    refusals: int
    begun: float
    status: str = ""
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    retry_after: float | None = None


def draw(rng: random.Random, leaves: float, typical_seconds: float) -> Wish:
    """Returns a random request.

    Args:
      leaves: share of clients that leave.
      typical_seconds: of an answer; they leave before that, or after a part of the stream.
    """
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, MOST_WORDS)))
    tokens = round(MOST_TOKENS ** rng.random())
    stream = rng.random() < 0.5
    body: dict[str, Any] = {"model": "drill", "max_tokens": tokens, "seed": rng.randrange(2**32), "stream": stream}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    if rng.random() < 0.5:
        path, body = "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
    else:
        path, body = "/v1/completions", {**body, "prompt": prompt}
    if rng.random() >= leaves:
        return Wish(path, body)
    if stream and rng.random() < 0.5:
        return Wish(path, body, leaves_after_events=rng.randint(1, tokens))
    return Wish(path, body, leaves_after_seconds=rng.uniform(0, typical_seconds))


class Load:
    """Clients of a server, and the outcomes of their requests.

    Args:
      keys: API keys of the clients.
      leaves: share of requests whose client leaves before the answer is complete.

    Attributes:
      ends_at: `time.monotonic()` after which no request begins.
    """

    def __init__(
        self, url: str, keys: Sequence[str], session: aiohttp.ClientSession, rng: random.Random, leaves: float
    ) -> None:
        self._url, self._keys, self._session, self._rng, self._leaves = url, keys, session, rng, leaves
        self.outcomes: list[Outcome] = []
        self._typical = 1.0  # seconds of an answer, a moving average
        self.ends_at = float("inf")

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self._client(i) for i in range(clients)))

    async def _client(self, number: int) -> None:
        """Sends one request after the other until the time is over, or the server shuts down."""
        wish, wished, refusals = draw(self._rng, self._leaves, self._typical), time.monotonic(), 0
        while time.monotonic() < self.ends_at:
            outcome = await self.ask(number, wish, wished, refusals)
            if outcome.status == "429":
                refusals += 1
                await asyncio.sleep(min(outcome.retry_after or 0.0, max(0.0, self.ends_at - time.monotonic())))
                continue
            if outcome.status == "200":
                self._typical += 0.02 * (outcome.ended - outcome.begun - self._typical)
            elif outcome.status != "left":
                return
            wish, wished, refusals = draw(self._rng, self._leaves, self._typical), time.monotonic(), 0

    async def ask(self, number: int, wish: Wish, wished: float, refusals: int = 0) -> Outcome:
        """Sends a request; notes and returns its outcome."""
        outcome = Outcome(number, wished, refusals, time.monotonic())
        headers = authorization(self._keys[number])
        try:
            async with asyncio.timeout(wish.leaves_after_seconds):
                async with self._session.post(self._url + wish.path, json=wish.body, headers=headers) as response:
                    outcome.status = str(response.status)
                    if "Retry-After" in response.headers:
                        outcome.retry_after = float(response.headers["Retry-After"])
                    await read(response, wish, outcome)
        except TimeoutError:  # also the session's
            stays = wish.leaves_after_events is None and wish.leaves_after_seconds is None
            outcome.status = "no answer in time" if stays else "left"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            outcome.status = f"{outcome.status} {type(error).__name__}".strip()
        outcome.ended = time.monotonic()
        self.outcomes.append(outcome)
        return outcome


async def read(response: aiohttp.ClientResponse, wish: Wish, outcome: Outcome) -> None:
    """Reads a response; TimeoutError when the client leaves, ValueError for one that is not complete."""
    if response.status != 200:
        await response.json()
        return
    if not wish.body["stream"]:
        answer = await response.json()
        outcome.tokens = answer["usage"]["completion_tokens"]
        if answer["choices"][0]["finish_reason"] not in ("stop", "length"):
            raise ValueError("no finish_reason")
        return
    finished, events = False, 0
    async for line in response.content:
        if line == b"data: [DONE]\n":
            if not finished:
                raise ValueError("no finish_reason")
            return
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            outcome.status = f"error in the stream: {event['error']['message']}"
            return
        if outcome.first is None:
            outcome.first = time.monotonic()
        events += 1
        if events == wish.leaves_after_events:
            raise TimeoutError
        finished = finished or any(choice["finish_reason"] is not None for choice in event["choices"])
        outcome.tokens = (event.get("usage") or {}).get("completion_tokens", 0)
    raise ValueError("the stream ended early")


def summary(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    answers = [outcome for outcome in outcomes if outcome.status == "200"]
    return {
        "seconds": round(seconds, 1),
        "statuses": dict(collections.Counter(outcome.status for outcome in outcomes)),
        "requests_per_second": round(len(answers) / seconds, 1),
        "tokens_per_second": round(sum(outcome.tokens for outcome in outcomes) / seconds, 1),
        "first_token_seconds": quantiles([o.first - o.begun for o in answers if o.first is not None]),
        "refusals_in_a_row": quantiles([float(o.refusals) for o in answers]),
        "answer_seconds": quantiles([o.ended - o.begun for o in answers]),
        "answer_seconds_with_refusals": quantiles([o.ended - o.wished for o in answers]),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    found = {f"p{percent}": ordered[len(ordered) * percent // 100] for percent in (50, 99) if ordered}
    return {name: round(value, 3) for name, value in {**found, "longest": max(ordered, default=0.0)}.items()}


def wrong(outcomes: list[Outcome], expected: tuple[str, ...]) -> list[str]:
    """Returns a line for each unexpected status, and for refusals without Retry-After."""
    found = collections.Counter(outcome.status for outcome in outcomes if outcome.status not in expected)
    lines = [f"{count} requests ended with {status}" for status, count in found.items()]
    refused = [outcome for outcome in outcomes if outcome.status in ("429", "503")]
    if silent := sum(not (outcome.retry_after or 0) >= 1 for outcome in refused):
        lines.append(f"{silent} refusals had no Retry-After")
    return lines

"""Loads a server with clients that leave, and checks what docs/serving.md promises: `python -m benchmarks.serve_drill`.

The server is a process of its own that serves a small random model. Each of the --clients has an API key and always one
request in progress: chat completions and completions, streamed or not, of mixed lengths. In a share of the requests the
client closes its connection at a random time: in the queue, or in the midst of the completion. After status 429 it
waits as long as Retry-After says.

Promises: every response is complete, with status 200, or 429 with Retry-After. Afterwards no row, page, place in the
queue, file descriptor or thread is still in use, and the server's memory has not grown since a quarter of the time. No
client is starved. A row is free soon after its client has left. After SIGTERM under the same load, requests in progress
are answered, further ones get 503 with Retry-After, and the exit code is 0. The command ends with code 1 if one is
broken. It needs Linux, whose /proc has the server's memory.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from absl import flags

from benchmarks.drill_clients import Load, Wish, authorization, summary, wrong
from gptjax import cli
from gptjax.config import GPTConfig, UserError

ROOT = Path(__file__).parents[1]
CONTEXT = 512
MODEL = GPTConfig(context_length=CONTEXT, num_layers=2, num_heads=4, embed_dim=64, positions="rotary", dtype="float32")
ROWS = 16
GAUGES = ("queued", "engine_rows_in_use", "engine_waiting", "engine_pages_in_use")
WARM_SECONDS = 5.0  # without a new program, after which the load begins
PATIENCE = 1000.0  # seconds: a server that takes longer to start or to end hangs
SETTLE_SECONDS = 60.0  # for the server to notice the last disconnections
GROWTH_MIB = 32.0
LEAST_SHARE = 1 / 3  # of the median client's answers that the last client must have
LONGEST_WAIT = 10  # times the median time from an accepted request to its answer
DEPARTURES = 20
DEPARTURE_SECONDS = 0.5
SPARE_DESCRIPTORS = 8
SIGNAL_SECONDS = 1.0  # before and after SIGTERM, in which a request may be refused or served
LINGER_SECONDS = 0.3  # after its last answer the server still refuses requests for longer than that


def main() -> None:
    values = flags.FLAGS
    if not Path("/proc/self/status").is_file():
        raise UserError("benchmarks.serve_drill needs Linux: it reads the server's memory in /proc")
    rng = random.Random(values.seed)
    with tempfile.TemporaryDirectory(prefix="serve_drill_") as directory, served(Path(directory), values) as server:
        report, broken = asyncio.run(drill(server, values, rng))
    print(json.dumps(report, indent=2))
    if broken:
        sys.exit("\n".join(f"broken: {line}" for line in broken))
    print("all promises held")


# --- the server -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    """The server's process; `keys` are those of the clients, and then the key of the drill itself."""

    process: "subprocess.Popen[str]"
    url: str
    keys: list[str]

    def status(self, name: str) -> int:
        """Returns a number of /proc, such as VmRSS in KiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    def resident_mib(self) -> float:
        return self.status("VmRSS") / 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def served(directory: Path, values: Any) -> Iterator[Server]:
    """Serves a random model until the block ends."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tests.tiny_tasks import save_pretrained

    workdir = save_pretrained(directory / "drill", settings=MODEL)
    keys = [f"key-{i}" for i in range(values.clients + 1)]
    (directory / "keys").write_text("\n".join(keys))
    # Fewer places than clients, so that some are refused.
    arguments = [f"--workdir={workdir}", f"--api_keys_file={directory / 'keys'}", "--port=0", f"--rows={ROWS}"]
    arguments += [f"--max_queue={max(1, values.clients * 4 // 5)}", f"--request_log={directory / 'log'}"]
    arguments += ["--deterministic"] if values.deterministic else []
    process = subprocess.Popen(
        [sys.executable, "-m", "gptjax.serve", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise UserError("the server did not start")
        yield Server(process, found[0], keys)
    finally:
        process.kill()
        process.wait()


async def gauges(session: aiohttp.ClientSession, server: Server, names: Sequence[str] = GAUGES) -> dict[str, float]:
    """Reads metrics: by default, what requests have in use."""
    async with session.get(f"{server.url}/metrics", headers=authorization(server.keys[-1])) as response:
        text = await response.text()
    return {name: float(re.search(rf"^gptjax_{name} (\S+)", text, re.MULTILINE)[1]) for name in names}  # type: ignore[index]


# --- phases -----------------------------------------------------------------------------------------------------------


async def drill(server: Server, values: Any, rng: random.Random) -> tuple[dict[str, Any], list[str]]:
    """Runs all phases; returns the figures, and which promises were broken."""
    report: dict[str, Any] = {}
    broken: list[str] = []
    async with connections() as session:
        await warm_up(server, session, values, rng)
    before = server.descriptors()
    async with connections() as session:
        report["load"] = await load(server, session, values, rng, broken)
        report["departures"] = await departures(server, session, values, broken)
    async with connections() as session:
        report["in_use"] = await settled(server, session, before, broken)
        report["descriptors"] = [before, server.descriptors()]
        report["threads"] = server.status("Threads")
        report["drain"] = await drain(server, session, values, rng, broken)
    return report, broken


def connections() -> aiohttp.ClientSession:
    """Connections that end with their block, any number at a time."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE), connector=aiohttp.TCPConnector(limit=0))


async def warm_up(server: Server, session: aiohttp.ClientSession, values: Any, rng: random.Random) -> None:
    """Loads the server until it has compiled its programs."""
    clients = Load(server.url, server.keys, session, rng, values.disconnect)
    running = asyncio.create_task(clients.run(values.clients))
    since, programs = time.monotonic(), 0.0
    while time.monotonic() - since < WARM_SECONDS:
        await asyncio.sleep(0.2)
        found = (await gauges(session, server, ("engine_programs",)))["engine_programs"]
        if found != programs or not clients.outcomes:
            since, programs = time.monotonic(), found
    clients.ends_at = 0.0
    await running


async def load(
    server: Server, session: aiohttp.ClientSession, values: Any, rng: random.Random, broken: list[str]
) -> dict[str, Any]:
    """The load with clients that leave, and the server's memory meanwhile."""
    clients = Load(server.url, server.keys, session, rng, values.disconnect)
    begun = time.monotonic()
    clients.ends_at = begun + values.seconds
    memory: list[tuple[float, float]] = []

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - begun, server.resident_mib()))
            await asyncio.sleep(0.25)

    watching = asyncio.create_task(watch())
    await clients.run(values.clients)
    watching.cancel()
    seconds = time.monotonic() - begun
    report = summary(clients.outcomes, seconds)
    at_quarter, at_end = min(memory, key=lambda sample: abs(sample[0] - seconds / 4))[1], memory[-1][1]
    report["memory_mib"] = {
        "at_quarter": round(at_quarter, 1),
        "at_end": round(at_end, 1),
        "highest": round(max(m for _, m in memory), 1),
    }
    broken += wrong(clients.outcomes, ("200", "429", "left"))
    answers = collections.Counter(outcome.client for outcome in clients.outcomes if outcome.status == "200")
    counts = sorted(answers[i] for i in range(values.clients))
    report["answers_of_a_client"] = {"least": counts[0], "median": statistics.median(counts), "most": counts[-1]}
    if not values.check_times:
        return report
    if at_end - at_quarter > GROWTH_MIB:
        broken.append(f"memory grew by {at_end - at_quarter:.0f} MiB after a quarter of the time")
    if counts[0] < LEAST_SHARE * statistics.median(counts):
        broken.append(f"a client got {counts[0]} answers, and the median client {statistics.median(counts)}")
    waits = sorted(o.ended - o.begun for o in clients.outcomes if o.status == "200")
    if waits and waits[-1] > LONGEST_WAIT * statistics.median(waits):
        broken.append(f"an answer took {waits[-1]:.1f} s, and the median one {statistics.median(waits):.1f} s")
    return report


async def departures(
    server: Server, session: aiohttp.ClientSession, values: Any, broken: list[str]
) -> dict[str, float]:
    """The time from a disconnection, streamed or not, until nothing is in use."""
    clients = Load(server.url, server.keys, session, random.Random(0), 0.0)
    body = {"model": "drill", "prompt": "a", "max_tokens": CONTEXT - 1, "logit_bias": {"256": -100}}  # the end of text
    seconds = []
    for number in range(DEPARTURES):
        stream = number % 2 == 0
        wish = Wish("/v1/completions", {**body, "stream": stream}, 2 if stream else None, None if stream else 0.1)
        outcome = await clients.ask(0, wish, time.monotonic())
        if outcome.status != "left":
            broken.append(f"a request whose client leaves ended with {outcome.status}")
        while any((await gauges(session, server)).values()) and time.monotonic() < outcome.ended + PATIENCE:
            await asyncio.sleep(0.001)
        seconds.append(time.monotonic() - outcome.ended)
    if values.check_times and max(seconds) > DEPARTURE_SECONDS:
        broken.append(f"a row was free only {max(seconds):.2f} s after its client had left")
    return {"median_ms": round(1000 * statistics.median(seconds), 1), "longest_ms": round(1000 * max(seconds), 1)}


async def settled(
    server: Server, session: aiohttp.ClientSession, descriptors: int, broken: list[str]
) -> dict[str, float]:
    """What is in use when all clients have left."""
    end = time.monotonic() + SETTLE_SECONDS
    found = await gauges(session, server)
    while (any(found.values()) or server.descriptors() > descriptors + SPARE_DESCRIPTORS) and time.monotonic() < end:
        await asyncio.sleep(0.1)
        found = await gauges(session, server)
    broken += [f"{name} is {value:.0f} after all clients have left" for name, value in found.items() if value]
    if (now := server.descriptors()) > descriptors + SPARE_DESCRIPTORS:
        broken.append(f"the server has {now} open file descriptors, and had {descriptors} before the load")
    return found


async def drain(
    server: Server, session: aiohttp.ClientSession, values: Any, rng: random.Random, broken: list[str]
) -> dict[str, Any]:
    """SIGTERM under load."""
    clients = Load(server.url, server.keys, session, rng, 0.0)
    running = asyncio.create_task(clients.run(values.clients))
    await asyncio.sleep(min(5.0, values.seconds / 4))
    signalled = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(server.process.wait, PATIENCE)
    ended = time.monotonic()
    running.cancel()  # clients that wait as Retry-After said
    await asyncio.wait({running})
    before = [outcome for outcome in clients.outcomes if outcome.begun < signalled]
    after = [outcome for outcome in clients.outcomes if outcome.begun >= signalled]
    # On their way to the server when it received the signal; and begun when its last answer had ended.
    on_the_way = [outcome for outcome in clients.outcomes if abs(outcome.begun - signalled) < SIGNAL_SECONDS]
    last = max((outcome.ended for outcome in clients.outcomes if outcome.status == "200"), default=signalled)
    if values.check_times:
        broken += wrong([outcome for outcome in before if outcome not in on_the_way], ("200", "429"))
        broken += wrong(on_the_way, ("200", "429", "503"))
        broken += wrong([o for o in after if o not in on_the_way and o.begun < last + LINGER_SECONDS], ("503",))
    else:
        broken += wrong([o for o in clients.outcomes if o.begun < last - SIGNAL_SECONDS], ("200", "429", "503"))
    if code != 0:
        broken.append(f"after SIGTERM the exit code was {code}")
    in_progress = [outcome for outcome in before if outcome.ended > signalled]
    return {
        "exit_code": code,
        "seconds": round(ended - signalled, 2),
        "in_progress": dict(collections.Counter(outcome.status for outcome in in_progress)),
        "after": dict(collections.Counter(outcome.status for outcome in after)),
        "statuses": dict(collections.Counter(outcome.status for outcome in clients.outcomes)),
    }


if __name__ == "__main__":
    flags.DEFINE_integer("clients", 200, "Clients, each with one request in progress.", lower_bound=1)
    flags.DEFINE_float("seconds", 120.0, "Length of the load.", lower_bound=1.0)
    flags.DEFINE_float("disconnect", 0.3, "Share of requests whose client leaves.", 0.0, 1.0)
    flags.DEFINE_bool("deterministic", False, "Serves with --deterministic.")
    flags.DEFINE_bool("check_times", True, "Checks waiting times, fairness and memory, which vary on a busy machine.")
    flags.DEFINE_integer("seed", 0, "Seed of the requests.")
    cli.run(main)

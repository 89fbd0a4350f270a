"""Measures the policies of the sweep by the gold reward, and writes results.json and the figure.

python -m experiments.instructgpt.measure --root=runs/instructgpt
"""

import functools
import statistics
from pathlib import Path

from absl import app, flags

from experiments.instructgpt.gold import gold_reward, read_dictionary
from experiments.instructgpt.sweep import COMPLETION, ROOT
from experiments.policies import Judge, Point, Trace, over_optimisation, text_at_equal_proxy, win_rate
from experiments.study import Claim, Panel, report, runs_by, workdirs
from gptjax.data.conversations import read_prompts

DIRECTORY = flags.DEFINE_string("root", ROOT, "Directory of the data and of all runs.")
OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "Directory of results.json and the figure.")
NAMES = {"ppo": "PPO", "ppo_ptx": "PPO-ptx", "dpo": "DPO", "grpo": "GRPO", "ppo_without_kl": "PPO without KL penalty"}
TRACED = ("ppo", "ppo_ptx", "ppo_without_kl")


def points(traces: dict[int, Trace], x: str, y: str, first: int = 0) -> list[tuple[float, list[float]]]:
    """y of each checkpoint by seed, at the mean of x over the seeds."""

    def values(name: str, each: tuple[Point, ...]) -> list[float]:
        return [getattr(point, name) for point in each]

    checkpoints = list(zip(*traces.values(), strict=True))[first:]
    return [(statistics.mean(values(x, each)), values(y, each)) for each in checkpoints]


def main(_: list[str]) -> None:
    root = Path(DIRECTORY.value)
    data, sweep = root / "data", root / "policies"
    gold = functools.partial(gold_reward, dictionary=read_dictionary(data))
    prompts = read_prompts(f"jsonl:{data}/held_out.jsonl")
    judge = Judge(root / "sft", gold, prompts, f"jsonl:{data}/held_out_text.jsonl", COMPLETION)
    runs, rewards = runs_by(sweep, "method"), f"{root}/rewards/seed={{seed}}"
    traces = {m: judge.traces(sweep, of, rewards, all_checkpoints=m in TRACED) for m, of in runs.items()}
    wins = {method: [win_rate(trace) for trace in of.values()] for method, of in traces.items()}
    claims = [Claim(f"{NAMES[m]} against SFT: win rate", rates, 0.5) for m, rates in wins.items() if "without" not in m]
    both = [(ppo, traces["ppo_ptx"][seed]) for seed, ppo in traces["ppo"].items()]
    taxes, saved = [a[-1].text - a[0].text for a, _ in both], [text_at_equal_proxy(*pair) for pair in both]
    found = [over_optimisation(trace) for trace in traces["ppo_without_kl"].values()]
    begins, lost, gained = (list(values) for values in zip(*found, strict=True))
    claims += [
        Claim("PPO minus SFT: loss on text, nats per byte", taxes),
        Claim("PPO minus PPO-ptx at equal proxy reward: loss on text, nats per byte", saved),
        Claim("without KL penalty: highest gold reward minus that of the last checkpoint", lost),
        Claim("without KL penalty: proxy reward gained from the highest gold reward on", gained),
    ]
    free = traces["ppo_without_kl"]
    lines = {name: points(free, "root_kl", name) for name in ("gold", "proxy")}
    lines["highest gold"] = [(statistics.mean(begins), [max(p.gold for p in trace) for trace in free.values()])]
    last = {NAMES[m]: [(statistics.mean(t[-1].text for t in of.values()), wins[m])] for m, of in traces.items()}
    panels = [
        Panel("PPO without KL penalty", lines, "square root of the KL divergence", "reward"),
        Panel(
            "loss on text",
            {NAMES[m]: points(traces[m], "proxy", "text", 1) for m in TRACED},
            "proxy reward",
            "nats per byte",
        ),
        Panel("end of training", last, "loss on text, nats per byte", "win rate against SFT"),
    ]
    print("over-optimisation begins at", begins)
    report(Path(OUTPUT.value), claims, panels, workdirs(sweep, runs))


if __name__ == "__main__":
    app.run(main)

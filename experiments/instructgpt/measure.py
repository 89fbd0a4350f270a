"""Measures the policies of the sweep by the gold reward, and writes results.json and the figure.

python -m experiments.instructgpt.measure --root=runs/instructgpt
"""

from pathlib import Path

from absl import app, flags

from experiments.instructgpt.gold import gold_reward
from experiments.instructgpt.sweep import COMPLETION, ROOT
from experiments.policies import Judge, curve, over_optimisation, text_at_equal_proxy, win_rate
from experiments.study import Claim, Panel, report, runs_by, workdirs
from gptjax.data.conversations import read_prompts

DIRECTORY = flags.DEFINE_string("root", ROOT, "Directory of the data and of all runs.")
OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "Directory of results.json and the figure.")
NAMES = {"ppo": "PPO", "ppo_ptx": "PPO-ptx", "dpo": "DPO", "grpo": "GRPO"}
# Every so many checkpoints are measured; of other methods the last one.
EVERY = {"ppo": 2, "ppo_ptx": 2, "ppo_without_kl": 1}


def main(_: list[str]) -> None:
    root = Path(DIRECTORY.value)
    data, sweep, rewards = root / "data", root / "policies", f"{root}/rewards/seed={{seed}}"
    prompts = read_prompts(f"jsonl:{data}/held_out.jsonl")
    judge = Judge(root / "sft", gold_reward, prompts, f"jsonl:{data}/held_out_text.jsonl", COMPLETION)
    runs = runs_by(sweep, "method")
    traces = {m: judge.traces(sweep, of, rewards, EVERY.get(m)) for m, of in runs.items()}
    wins = {m: [win_rate(trace) for trace in of.values()] for m, of in traces.items()}
    free, both = traces["ppo_without_kl"], [(ppo, traces["ppo_ptx"][seed]) for seed, ppo in traces["ppo"].items()]
    taxes, saved = [a[-1].text - a[0].text for a, _ in both], [text_at_equal_proxy(*pair) for pair in both]
    begins, lost, gained = map(list, zip(*map(over_optimisation, free.values()), strict=True))
    claims = [
        *(Claim(f"{NAMES[m]} against SFT: win rate", rates, 0.5) for m, rates in wins.items() if m in NAMES),
        Claim("PPO minus SFT: loss on text, nats per byte", taxes),
        Claim("PPO minus PPO-ptx at equal proxy reward: loss on text, nats per byte", saved),
        Claim("without KL penalty: square root of the KL divergence at the highest gold reward", begins),
        Claim("without KL penalty: highest gold reward minus that of the last checkpoint", lost),
        Claim("without KL penalty: proxy reward gained from the highest gold reward on", gained),
    ]
    lines = {name: curve(free, "root_kl", name) for name in ("gold", "proxy")}
    texts = {NAMES.get(method, method): curve(traces[method], "proxy", "text") for method in EVERY}
    ends = {NAMES[m]: [(curve(traces[m], "text", "text")[-1][0], wins[m])] for m in NAMES}
    panels = [
        Panel("PPO without KL penalty", lines, "square root of the KL divergence", "reward"),
        Panel("loss on text", texts, "proxy reward", "nats per byte"),
        Panel("end of training", ends, "loss on text, nats per byte", "win rate against SFT"),
    ]
    report(Path(OUTPUT.value), claims, panels, workdirs(sweep, runs))


if __name__ == "__main__":
    app.run(main)

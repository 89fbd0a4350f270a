"""InstructGPT's stages and later alternatives, from one model that was fine-tuned on demonstrations.

    python -m gptjax.main --config=experiments/instructgpt/sweep.py:method=text --workdir=runs/instructgpt/text
    python -m gptjax.main --config=experiments/instructgpt/sweep.py:method=sft --workdir=runs/instructgpt/sft
    python -m gptjax.sweep --config=experiments/instructgpt/sweep.py:method=reward --sweep=seed \
        --workdir=runs/instructgpt/rewards
    python -m gptjax.sweep --config=experiments/instructgpt/sweep.py --workdir=runs/instructgpt/policies

Arguments: method (a name of METHODS), scale (a name of SCALES), root (directory of the data and of all runs), reward
(directory of the reward model in it). Texts are bytes, and the context is CONTEXT of them.
"""

from typing import Any

import ml_collections

from gptjax import config as c
from gptjax.launch import grid

FILE, ROOT = "experiments/instructgpt/sweep.py", "runs/instructgpt"
SEEDS = range(3)
CONTEXT, PROMPT, COMPLETION = 64, 16, 32
COMPLETIONS, ITERATIONS = 64, 16  # of PPO and GRPO: completions of an iteration, which are trained on twice; iterations
END = "{content}<|endoftext|>"
FORMAT = {"template": "custom", "system_format": END, "user_format": "{content}<|is|>", "assistant_format": END}
# Of a scale: model, tokens of text, factors of the batch of text and of the learning rates.
SMALL = {"num_layers": 3, "embed_dim": 128, "num_heads": 4, "dtype": "float32"}, 1_500_000, 1, 1.0
LARGE = {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "dtype": "bfloat16"}, 10**9, 64, 0.1
SCALES = {"cpu": SMALL, "tpu_v5e_4": LARGE, "gpu_h100_8": LARGE}
# stage, optimizer, peak learning rate, rows of a batch, other changes of the config
METHODS: dict[str, tuple[str, str, float, int, dict[str, Any]]] = {
    "text": ("pretrain", "muon", 1e-2, 32, {}),
    "sft": ("sft", "muon", 5e-3, 16, {"batch": {"epochs": 3.0}, "chat": {"pretraining_share": 0.1}}),
    "reward": ("reward", "muon", 5e-3, 8, {"batch": {"epochs": 2.0}, "data": {"validation_fraction": 0.05}}),
    "dpo": ("dpo", "adamw", 2e-4, 16, {"batch": {"epochs": 1.0}, "data": {"validation_fraction": 0.05}}),
    "ppo": ("ppo", "adamw", 5e-4, 32, {"rl": {"kl_weight": 0.1}}),
    "ppo_ptx": ("ppo", "adamw", 5e-4, 32, {"rl": {"kl_weight": 0.1}, "ppo": {"pretraining_weight": 1.0}}),
    "grpo": ("grpo", "adamw", 5e-4, 8, {"rl": {"kl_weight": 0.1, "responses_per_prompt": 4}}),
    "ppo_without_kl": ("ppo", "adamw", 5e-4, 32, {"rl": {"kl_weight": 0.0}}),
}
POLICIES = ("ppo", "ppo_ptx", "dpo", "grpo", "ppo_without_kl")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, method="ppo", scale="cpu", root=ROOT, reward="rewards/seed=0")
    stage, optimizer, rate, rows, changes = c.choose(METHODS, args["method"], "method")
    model, tokens, larger, slower = c.choose(SCALES, args["scale"], "scale")
    root, text = args["root"], f"jsonl:{args['root']}/data/text.jsonl"
    file = f"jsonl:{root}/data/{'rankings' if stage in ('reward', 'dpo') else 'train'}.jsonl"
    config = c.Config(
        stage=stage,
        init_from={"pretrain": None, "sft": f"{root}/text"}.get(stage, f"{root}/sft"),
        model=c.GPTConfig(context_length=CONTEXT, positions="rotary", qk_norm=True, norm_embedding=True, **model),
        data=c.DataConfig(source=text if stage == "pretrain" else file, tokenizer="bytes"),
        batch=c.BatchConfig(tokens_per_batch=rows * CONTEXT),
        optimizer=c.OptimizerConfig(name=optimizer, peak_lr=rate * slower, weight_decay=0.0),
        evaluation=c.EvaluationConfig(max_tokens=16_384, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
    )
    texts = {"batch": {"total_tokens": tokens, "tokens_per_batch": larger * rows * CONTEXT}}
    config = c.replace(config, texts if stage == "pretrain" else {"chat": FORMAT})
    if args["method"] in ("sft", "ppo_ptx"):
        config = c.replace(config, {"chat": {"pretraining_source": text}})
    if stage in ("ppo", "grpo"):
        group = changes["rl"].get("responses_per_prompt", 1)
        config = c.replace(config, policy(stage, f"model:{root}/{args['reward']}", group, slower))
    return c.config_dict(c.replace(config, changes))


def policy(stage: str, reward: str, group: int, slower: float) -> dict[str, Any]:
    """What PPO and GRPO share; `group`: completions of a prompt."""
    tokens = 2 * ITERATIONS * COMPLETIONS * (PROMPT + COMPLETION)
    return {
        "rl": {"reward": reward, "prompts_per_iteration": COMPLETIONS // group, "response_tokens": COMPLETION}
        | {"prompt_tokens": PROMPT, "inner_epochs": 2},
        "batch": {"total_tokens": tokens},
        "ppo": {"value_lr": 1e-3 * slower, "pretraining_rows": 1} if stage == "ppo" else {},
        "optimizer": {"schedule": "constant", "warmup_fraction": 0.05},
        "evaluation": {"metric": "reward"},
        "checkpoint": {"every_tokens": tokens // 8, "keep_last": 8},
    }


def sweep() -> list[grid.Overrides]:
    """The policies, each with the reward model of its seed."""
    return [{"config": f"{FILE}:method={m},reward=rewards/seed={s}", "seed": s} for s in SEEDS for m in POLICIES]


def sweep_seed() -> list[grid.Overrides]:
    """Seeds of the reward models."""
    return grid.values("seed", SEEDS)

"""InstructGPT's stages and later alternatives, from one model that was fine-tuned on demonstrations.

    python -m gptjax.main --config=experiments/instructgpt/sweep.py:method=text --workdir=runs/instructgpt/text
    python -m gptjax.main --config=experiments/instructgpt/sweep.py:method=sft --workdir=runs/instructgpt/sft
    python -m gptjax.sweep --config=experiments/instructgpt/sweep.py:method=reward --sweep=seed --workdir=runs/instructgpt/rewards
    python -m gptjax.sweep --config=experiments/instructgpt/sweep.py --workdir=runs/instructgpt/policies

Arguments: method (a name of METHODS), scale (a name of SCALES), root (directory of the data and of all runs), reward
(name of the reward model in it).
"""

import ml_collections

from gptjax import config as c
from gptjax.launch import grid

FILE, ROOT = "experiments/instructgpt/sweep.py", "runs/instructgpt"
SEEDS = range(3)
CONTEXT, PROMPT, COMPLETION = 64, 16, 32  # bytes, most of a prompt, most of a completion
ROW = PROMPT + COMPLETION
LARGE = {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "dtype": "bfloat16"}
# model, factor of the tokens of text and of the iterations of PPO and GRPO, factor of the learning rates
SCALES = {
    "cpu": ({"num_layers": 3, "embed_dim": 128, "num_heads": 4, "dtype": "float32"}, 1, 1.0),
    "tpu_v5e_4": (LARGE, 100, 0.1),
    "gpu_h100_8": (LARGE, 100, 0.1),
}
METHODS = {
    "text": {"batch": {"total_tokens": 1_500_000, "tokens_per_batch": 32 * CONTEXT}, "optimizer": {"peak_lr": 1e-2}},
    "sft": {"batch": {"epochs": 3.0, "tokens_per_batch": 16 * CONTEXT}, "optimizer": {"name": "muon", "peak_lr": 5e-3}},
    "reward": {"batch": {"epochs": 2.0, "tokens_per_batch": 8 * CONTEXT}, "optimizer": {"name": "muon", "peak_lr": 5e-3}},
    "dpo": {"batch": {"epochs": 1.0, "tokens_per_batch": 16 * CONTEXT}, "optimizer": {"peak_lr": 2e-4}},
    "ppo": {"rl": {"kl_weight": 0.1}},
    "ppo_ptx": {"rl": {"kl_weight": 0.1}, "ppo": {"pretraining_weight": 1.0, "pretraining_rows": 1}},
    "grpo": {
        "rl": {"kl_weight": 0.1, "prompts_per_iteration": 16, "responses_per_prompt": 4},
        "batch": {"tokens_per_batch": 8 * CONTEXT},
    },
    "ppo_without_kl": {"rl": {"kl_weight": 0.0}},
}
POLICIES = ("ppo", "ppo_ptx", "dpo", "grpo", "ppo_without_kl")
ITERATIONS = 16


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, method="ppo", scale="cpu", root=ROOT, reward="rewards/seed=0")
    changes = c.choose(METHODS, args["method"], "method")
    model, longer, slower = c.choose(SCALES, args["scale"], "scale")
    method, root = args["method"], args["root"]
    stage = {"text": "pretrain", "ppo_ptx": "ppo", "ppo_without_kl": "ppo"}.get(method, method)
    file = "rankings" if method in ("reward", "dpo") else "train"
    start = {"text": None, "sft": f"{root}/text"}.get(method, f"{root}/sft")
    config = c.Config(
        stage=stage,
        init_from=start,
        model=c.GPTConfig(context_length=CONTEXT, positions="rotary", qk_norm=True, norm_embedding=True, **model),
        data=c.DataConfig(source=f"jsonl:{root}/data/{file}.jsonl", tokenizer="bytes"),
        optimizer=c.OptimizerConfig(weight_decay=0.0),
        evaluation=c.EvaluationConfig(max_tokens=16_384, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
    )
    if stage == "pretrain":
        config = c.replace(config, {"data": {"source": TEXT.format(root)}, "optimizer": {"name": "muon"}})
    else:
        config = c.replace(config, {"chat": FORMAT})
    if file == "rankings":
        config = c.replace(config, {"data": {"validation_fraction": 0.05}})
    if stage == "sft" or method == "ppo_ptx":
        config = c.replace(config, {"chat": {"pretraining_source": TEXT.format(root)}})
    if stage == "sft":
        config = c.replace(config, {"chat": {"pretraining_share": 0.1}})
    if stage in ("ppo", "grpo"):
        config = c.replace(config, policy(f"model:{root}/{args['reward']}"))
    return c.config_dict(c.replace(config, changes))


TEXT = "jsonl:{}/data/text.jsonl"
FORMAT = {
    "template": "custom",
    "system_format": "{content}<|endoftext|>",
    "user_format": "{content}<|is|>",
    "assistant_format": "{content}<|endoftext|>",
}


def policy(reward):
    tokens = ITERATIONS * 64 * ROW * 2
    return {
        "rl": {"reward": reward, "prompts_per_iteration": 64, "response_tokens": COMPLETION, "prompt_tokens": PROMPT, "inner_epochs": 2},
        "batch": {"total_tokens": tokens, "tokens_per_batch": 32 * CONTEXT},
        "ppo": {"value_lr": 1e-3},
        "optimizer": {"peak_lr": 5e-4, "schedule": "constant", "warmup_fraction": 0.05},
        "evaluation": {"metric": "reward"},
        "checkpoint": {"every_tokens": tokens // 8, "keep_last": 100},
    }


def sweep() -> list[grid.Overrides]:
    """The policies, each with the reward model of its seed."""
    return [{"config": f"{FILE}:method={m},reward=rewards/seed={s}", "seed": s} for s in SEEDS for m in POLICIES]


def sweep_seed() -> list[grid.Overrides]:
    """For the reward models."""
    return grid.values("seed", SEEDS)

"""Compares the speed of PPO with TRL's, and that of static and continuous batching of its completions.

    python -m benchmarks.rl_speed --compare=trl [--inner_epochs=1] [--rounds=3] [--output=rl_speed.json]
    python -m benchmarks.rl_speed --compare=batching [--noends] [--rounds=5]

trl: whole iterations of PPO alternately here and by TRL's PPOTrainer, which releases after 1.10 no longer have: `pip
install torch transformers trl==1.10.0`. Policy, reference, reward model and value function are random GPT-2s of one
size in float32. Both sides complete prompts of equal length in one batch, up to the same length, and train on them in
minibatches of equal size; TRL without gradient checkpointing, which is its default. Seconds are those of an iteration,
the first of a round left out, per token of the completions: of the clock, and of the processor over all cores, which
depend less on other work. Where there is other work, PyTorch's threads wait for each other: set OMP_NUM_THREADS=1, and
compare processor times.

batching: completions of geometrically distributed lengths, cut off at --response_tokens, or with --noends all of that
length, without training, in iterations of four times --prompts. Programs are compiled before the first round.
"""

import json
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import flags

from benchmarks.loss_parity import gpt2_config, import_torch
from benchmarks.measuring import measured_on, ratio, write_json
from gptjax import cli
from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.models.gpt import GPT, init_params
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.rl.generation import CompletionGenerator

PROMPT_TOKENS, VOCABULARY = 32, 4096
LAYERS, WIDTH, HEADS = 4, 192, 6  # those of configs/chatgpt.py:runlocal
MINIBATCHES = 4  # steps of an inner epoch
ITERATIONS = 2  # in a round, after one that is not measured
# --compare=batching: tokens 0 to 14 and end-of-text end a completion, after 64 tokens on average if it is not cut off
NUM_ENDS = 15
END_VOCABULARY = 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        sides = policy_sides(Path(directory)) if COMPARE.value == "trl" else batching_sides()
        times: dict[str, list[Seconds]] = {name: [] for name in sides}
        for _ in range(ROUNDS.value):
            for name, measure in sides.items():
                times[name].append(measure())
    base = list(times)[-1]
    for kind in Seconds._fields:
        for name in times:
            values, others = ([getattr(each, kind) for each in times[side]] for side in (name, base))
            speed = f"{1 / statistics.median(values):.1f} tokens per second of the {kind}"
            print(f"{name}: {speed}, {ratio(values, others):.2f} times {base}")
    settings = {name: flags.FLAGS[name].value for name in ("compare", "prompts", "response_tokens", "inner_epochs")}
    write_json(OUTPUT.value, {"settings": settings, "seconds_per_token": times, **measured_on()})


class Seconds(NamedTuple):
    """Seconds per token; of the processor: summed over all cores."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())

    def until(self, end: "Seconds", tokens: float) -> "Seconds":
        return Seconds((end.clock - self.clock) / tokens, (end.processor - self.processor) / tokens)


def policy_config(context: int, vocabulary: int) -> c.GPTConfig:
    return c.GPTConfig(
        vocab_size=vocabulary,
        context_length=context,
        num_layers=LAYERS,
        embed_dim=WIDTH,
        num_heads=HEADS,
        embedding_dropout=0.0,
        attention_dropout=0.0,
        residual_dropout=0.0,
        dtype="float32",
    )


# --- PPO --------------------------------------------------------------------------------------------------------------


def policy_sides(root: Path) -> dict[str, Callable[[], Seconds]]:
    """Returns functions that train for a round and return its seconds per token of a completion."""
    random.seed(0)
    text = ["".join(random.choices(string.ascii_letters, k=PROMPT_TOKENS - 2)) for _ in range(PROMPTS.value)]
    write_lines(root / "prompts.jsonl", [{"prompt": prompt} for prompt in text])
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}] for prompt in text[:20]]
    write_lines(root / "sft.jsonl", [{"messages": messages} for messages in turns])
    write_lines(root / "reward.jsonl", [{"prompt": prompt, "ranking": ["a", "b"]} for prompt in text[:20]])
    for stage, start in (("sft", None), ("reward", "sft")):
        config = stage_config(root, stage, f"{stage}.jsonl", start)
        run(c.replace(config, {"batch": {"total_tokens": 1}}), root / stage)
    our_round(root)  # compiles
    return {"gptjax": lambda: our_round(root), "TRL": trl_round(text)}


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def stage_config(root: Path, stage: Any, source: str, start: str | None) -> c.Config:
    context = -(-(PROMPT_TOKENS + RESPONSE_TOKENS.value) // 16) * 16
    config = c.Config(
        stage=stage,
        init_from=None if start is None else str(root / start),
        model=policy_config(context, VOCABULARY),
        data=c.DataConfig(
            source=f"jsonl:{root / source}",
            validation_source=f"jsonl:{root / 'sft.jsonl'}",
            tokenizer="bytes",
            cache_dir=str(root / "cache"),
        ),
        chat=c.ChatConfig(
            template="custom",
            system_format="{content}",
            user_format="{content}<|a|>",
            assistant_format="{content}<|end|>",
        ),
        batch=c.BatchConfig(tokens_per_batch=PROMPTS.value // MINIBATCHES * context),
        optimizer=c.OptimizerConfig(peak_lr=1e-5, schedule="constant", weight_decay=0.0),
        evaluation=c.EvaluationConfig(max_tokens=1, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
    )
    if stage == "reward":
        return c.replace(config, {"data": {"validation_source": config.data.source}})
    return config


def our_round(root: Path) -> Seconds:
    config = stage_config(root, "ppo", "prompts.jsonl", "sft")
    rl = {
        "reward": f"model:{root / 'reward'}",
        "prompts_per_iteration": PROMPTS.value,
        "response_tokens": RESPONSE_TOKENS.value,
        "generate_batch": PROMPTS.value,
        "inner_epochs": INNER_EPOCHS.value,
    }
    changes: dict[str, dict[str, Any]] = {
        "rl": rl,
        "batch": {"epochs": 1.0 + ITERATIONS},
        "evaluation": {"metric": "reward"},
    }
    config = c.replace(config, changes)
    ends: list[Seconds] = []
    tokens: list[float] = []

    def note(record: Mapping[str, Any]) -> None:
        if record["split"] == "rollout":
            ends.append(Seconds.now())
            tokens.append(record["response_tokens"] * PROMPTS.value)

    with tempfile.TemporaryDirectory() as workdir:
        run(config, Path(workdir), callbacks=(note,))
    return ends[0].until(ends[-1], sum(tokens[1:]))


def trl_round(text: list[str]) -> Callable[[], Seconds]:
    torch, transformers = import_torch()
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError:
        raise UserError("PPO of TRL is not installed: pip install trl==1.10.0") from None
    model = policy_config(PROMPT_TOKENS + RESPONSE_TOKENS.value, VOCABULARY)
    gpt2 = gpt2_config(model, pad_token_id=VOCABULARY - 1, eos_token_id=VOCABULARY - 2, num_labels=1)
    prompts_PT = [[256, *prompt.encode(), 257] for prompt in text]

    class Clock(transformers.TrainerCallback):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.ends: list[Seconds] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(Seconds.now())

    def train() -> Seconds:
        clock = Clock()
        with tempfile.TemporaryDirectory() as directory:
            settings = PPOConfig(
                output_dir=directory,
                per_device_train_batch_size=PROMPTS.value // MINIBATCHES,
                gradient_accumulation_steps=MINIBATCHES,
                num_mini_batches=MINIBATCHES,
                num_ppo_epochs=INNER_EPOCHS.value,
                total_episodes=PROMPTS.value * (1 + ITERATIONS),
                local_rollout_forward_batch_size=PROMPTS.value,
                response_length=RESPONSE_TOKENS.value,
                num_sample_generations=0,
                temperature=1.0,
                learning_rate=1e-5,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_steps=1000,
            )
            causal, scored = transformers.GPT2LMHeadModel, transformers.GPT2ForSequenceClassification
            trainer = PPOTrainer(
                settings,
                SimpleNamespace(pad_token_id=VOCABULARY - 1, eos_token_id=VOCABULARY - 2),
                causal(gpt2),
                causal(gpt2),
                scored(gpt2),
                [{"input_ids": prompt} for prompt in prompts_PT],
                scored(gpt2),
                data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
                eval_dataset=[{"input_ids": prompts_PT[0]}],
                callbacks=[clock],
            )
            trainer.train()
        return clock.ends[0].until(clock.ends[-1], ITERATIONS * PROMPTS.value * RESPONSE_TOKENS.value)

    return train


# --- batching ---------------------------------------------------------------------------------------------------------


def batching_sides() -> dict[str, Callable[[], Seconds]]:
    """Returns functions that sample the completions of an iteration and return the seconds per token."""
    rng = np.random.default_rng(0)
    model = policy_config(PROMPT_TOKENS + RESPONSE_TOKENS.value, END_VOCABULARY)
    params = nn.unbox(jax.jit(lambda key: init_params(GPT(model), key))(jax.random.key(0)))
    count = 4 * PROMPTS.value
    lengths = rng.integers(PROMPT_TOKENS // 2, PROMPT_TOKENS + 1, count)
    prompts = [rng.integers(NUM_ENDS, END_VOCABULARY, length).astype(np.int32) for length in lengths]

    def sample(batching: str) -> Seconds:
        rl = c.RLConfig(
            response_tokens=RESPONSE_TOKENS.value,
            generate_batch=PROMPTS.value,
            batching=batching,  # type: ignore[arg-type]
        )
        config, mesh = c.Config(stage="ppo", model=model, rl=rl), make_mesh(c.MeshConfig())
        ends = range(NUM_ENDS if ENDS.value else 0)
        generator = CompletionGenerator(config, mesh, BytesTokenizer(), ends, PROMPT_TOKENS)
        start = Seconds.now()
        batches = list(generator.generate(params, prompts, list(range(count)), None))
        tokens = sum(len(one.tokens) + (one.end is not None) for batch in batches for one in batch)
        return start.until(Seconds.now(), tokens)

    for batching in ("continuous", "static"):  # compiles
        sample(batching)
    return {name: partial(sample, name) for name in ("continuous", "static")}


if __name__ == "__main__":
    COMPARE = flags.DEFINE_enum("compare", None, ["trl", "batching"], "What.", required=True)
    PROMPTS = flags.DEFINE_integer("prompts", 64, "Prompts of an iteration, a multiple of 4.", lower_bound=4)
    RESPONSE_TOKENS = flags.DEFINE_integer("response_tokens", 64, "Largest length of a completion.", lower_bound=1)
    ENDS = flags.DEFINE_boolean("ends", True, "Some tokens end a completion, so that the lengths differ.")
    INNER_EPOCHS = flags.DEFINE_integer("inner_epochs", 1, "Epochs over the completions.", lower_bound=1)
    ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds, in each of which both sides are measured.", lower_bound=1)
    OUTPUT = flags.DEFINE_string("output", None, "JSON file for the measurements.")
    cli.run(main)

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/gptjax/blob/main/colab/align_by_ppo.ipynb)
#
# # Align a model by PPO
#
# The three steps of InstructGPT (Ouyang et al. 2022) at the size of a laptop: pretrain a small model, fine-tune it on
# conversations, and train it by PPO against a reward, with a KL penalty that keeps it close to where it started. The reward
# here is a Python function, so that whether it was reached can be seen by reading the completions. On two CPU cores it
# takes about a quarter of an hour.

# %% tags=["set-up"]
import glob
import importlib.util
import os
import shutil
import subprocess
import sys

if importlib.util.find_spec("gptjax") is None:  # on Colab: choose a TPU or GPU by Runtime > Change runtime type
    subprocess.run(["git", "clone", "--depth=1", "https://github.com/OWNER/gptjax"], check=True)
    os.chdir("gptjax")
    extras = ["demo", "serve"]
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        extras.append("tpu")  # jax[tpu]
    elif shutil.which("nvidia-smi"):
        extras.append("cuda")  # jax[cuda13]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f".[{','.join(extras)}]"], check=True)
    sys.path.insert(0, os.getcwd())
elif not os.path.isdir("configs"):  # opened in colab/ of a copy of the repository
    os.chdir("..")

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
TEXT, CHATS = "sotu", "chatterbot"
REWARD = "examples.rewards.ends_in_question"  # MODULE.FUNCTION of the messages, the completion and its reference
KL_WEIGHT = 0.02
PRETRAIN_TOKENS, SFT_EPOCHS, PPO_EPOCHS = 700_000, 8.0, 1.6
LAYERS, WIDTH, HEADS, CONTEXT = 4, 192, 6, 128
PROMPTS_PER_ITERATION, BATCH_ROWS = 64, 16
RUNS = "runs"

# %% [markdown]
# ## Pretrain, then fine-tune on conversations

# %%
import gptjax

shape = {
    "model.num_layers": LAYERS,
    "model.embed_dim": WIDTH,
    "model.num_heads": HEADS,
    "model.context_length": CONTEXT,
}
lengths = {"batch.total_tokens": PRETRAIN_TOKENS, "optimizer.warmup_tokens": PRETRAIN_TOKENS // 14}
every = {"evaluation.every_tokens": PRETRAIN_TOKENS, "checkpoint.every_tokens": PRETRAIN_TOKENS}
tokens = {"batch.tokens_per_batch": BATCH_ROWS * CONTEXT}
config = gptjax.load_config(f"configs/gpt2.py:data={TEXT},runlocal", shape | tokens | lengths | every)
gptjax.train(config, f"{RUNS}/base")
argument = f"stage=sft,data={CHATS},init_from={RUNS}/base,runlocal"
config = gptjax.load_config(f"configs/chatgpt.py:{argument}", tokens | {"batch.epochs": SFT_EPOCHS})
gptjax.train(config, f"{RUNS}/sft")

# %% [markdown]
# ## The reward
#
# A function of your own is in a file of the current directory: `REWARD = "my_rewards.polite"`. A reward model, trained by
# stage `reward` on rankings of completions, is `reward=model:WORKDIR`.

# %%
import importlib
import inspect

module, _, function = REWARD.rpartition(".")
print(inspect.getsource(getattr(importlib.import_module(module), function)))

# %% [markdown]
# ## PPO

# %%
argument = f"stage=ppo,data={CHATS},init_from={RUNS}/sft,reward=python:{REWARD},runlocal"
overrides = {
    "rl.kl_weight": KL_WEIGHT,
    "rl.prompts_per_iteration": PROMPTS_PER_ITERATION,
    "batch.epochs": PPO_EPOCHS,
    "logging.every_steps": 1,
}
gptjax.train(gptjax.load_config(f"configs/chatgpt.py:{argument}", tokens | overrides), f"{RUNS}/ppo")

# %% [markdown]
# ## Reward against KL
#
# What a policy gains, it pays for in distance from the model that it started from. Where the KL grows and the reward does
# not, the penalty is too small; where neither moves, it is too large or the learning rate too small.

# %%
import matplotlib.pyplot as plt

rollouts = gptjax.curves(f"{RUNS}/ppo", "rollout")
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(rollouts["iteration"], rollouts["reward"], "o-", color="#c8452d")
left.set(xlabel="iteration", ylabel="mean reward of completions", ylim=(-0.05, 1.05))
right.plot(rollouts["kl"], rollouts["reward"], "o-", color="#1f4e8c")
right.set(xlabel="KL to the fine-tuned model, nats per completion", ylabel="mean reward", ylim=(-0.05, 1.05))
for axes in (left, right):
    axes.grid(color="#dddddd", linewidth=0.6)
plt.show()

# %% [markdown]
# ## Before and after

# %%
messages = ("Who are you?", "Tell me about music.", "Good morning.")
for name in ("sft", "ppo"):
    model = gptjax.load(f"{RUNS}/{name}")
    for message in messages:
        print(f"{name}  {message} -> {model.chat(temperature=0.7, max_new_tokens=CONTEXT // 5).reply(message)}")

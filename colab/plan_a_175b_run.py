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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/gptjax/blob/main/colab/plan_a_175b_run.ipynb)
#
# # Plan a run of GPT-3 175B
#
# Where does GPT-3 fit, how long would it train, and would the same compute train a better model? Everything here is
# computed by formula from the data sheets of TPUs: it needs no accelerator, and all times are lower bounds. The command
# `python -m gptjax.plan --topology=v5p:8x8x16` compiles the step itself, ahead of time:
# [docs/scaling.md](https://github.com/OWNER/gptjax/blob/main/docs/scaling.md).

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
SIZE = "175b"  # of configs/gpt3.py
LAW = "epoch"  # published parameters of Chinchilla's law, or the fit.json of `python -m gptjax.scaling fit`

# %% [markdown]
# ## What the model is
#
# The memory of training: parameters, gradients and Adam's moments, before any activation.

# %%
import gptjax
from gptjax.scaling.flops import flops_per_token
from gptjax.scaling.memory import memory_summary
from gptjax.scaling.parameters import parameter_count

config = gptjax.load_config(f"configs/gpt3.py:size={SIZE}", {"model.vocab_size": 50_304})
memory = memory_summary(config.model, config.optimizer, 1)
total_flops = flops_per_token(config.model) * config.batch.total_tokens
print(f"{parameter_count(config.model):,} parameters")
print(f"{memory.total / 2**40:.2f} TiB of parameters, gradients and optimizer state")
print(f"{config.batch.total_tokens:,} tokens, {total_flops:.3g} FLOPs")

# %% [markdown]
# ## Where it fits
#
# For each slice the fastest layout whose memory fits: how the model is split over chips (`fsdp` shards parameters,
# `tensor` splits each product, `context` the sequence), the microbatch, and what the backward pass computes again.

# %%
from gptjax.planning.formula_plan import formula_table, plan_topologies

plans = list(plan_topologies(config, "bfloat16"))
print(formula_table(config, plans))

# %%
import matplotlib.pyplot as plt
from gptjax.planning.estimate import estimate_training

fitting = [(plan.topology, plan.training) for plan in plans if plan.training is not None]
names = [f"{topology.name}, {topology.num_devices} chips" for topology, _ in fitting]
runs = [estimate_training(found.config, found.estimate, found.estimate.serial) for _, found in fitting]
used = [found.memory / topology.chip.program_memory for topology, found in fitting]
hours = [topology.num_devices * run.days * 24 for (topology, _), run in zip(fitting, runs, strict=True)]
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(13, 0.5 * len(names) + 1.6), layout="constrained", sharey=True
)
left.barh(names, [run.days for run in runs], color="#1f4e8c")
left.set_xlabel("days, at least")
middle.barh(names, hours, color="#1f4e8c")
middle.set_xlabel("chip-hours, at least")
right.barh(names, used, color="#9db8d9")
right.set(xlabel="share of a chip's memory", xlim=(0, 1))
left.invert_yaxis()
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## The same compute, spent otherwise
#
# Hoffmann et al. (2022) found that GPT-3 had too many parameters for its 300 billion tokens. `plan_budget` chooses the
# model of GPT-3's proportions that the law expects the lowest loss of, at the same number of FLOPs.

# %%
from gptjax.planning.budget_plan import plan_budget
from gptjax.scaling.fit_files import load_law

law = load_law(LAW)
plan = plan_budget(config, law, total_flops, "deepseek")
here, _ = law.predict(
    {"parameters": parameter_count(config.model), "tokens": config.batch.total_tokens, "flops": total_flops}
)
print(f"as published: {parameter_count(config.model) / 1e9:8.1f}B parameters, expected loss {here:.3f}")
print(f"by the law:   {plan.parameters / 1e9:8.1f}B parameters, expected loss {plan.loss:.3f}")
print(f"              {plan.tokens / 1e9:8.0f}B tokens in place of {config.batch.total_tokens / 1e9:.0f}B")

# %%
import numpy as np

sizes = np.geomspace(plan.parameters / 30, plan.parameters * 30, 60)
losses = [law.predict({"parameters": size, "tokens": total_flops / (6 * size)})[0] for size in sizes]
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
axes.plot(sizes, losses, color="#9db8d9", linewidth=2, label=f"{total_flops:.2g} FLOPs, tokens = C / 6N")
axes.plot([plan.parameters], [plan.loss], "o", color="#1f4e8c", label="lowest")
axes.plot([parameter_count(config.model)], [here], "o", color="#c8452d", label=f"GPT-3 {SIZE}")
axes.set(xscale="log", xlabel="parameters", ylabel="expected loss, nats per token")
axes.grid(color="#dddddd", linewidth=0.6)
axes.legend(frameon=False)
plt.show()

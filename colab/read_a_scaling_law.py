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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/gptjax/blob/main/colab/read_a_scaling_law.ipynb)
#
# # Read a scaling law
#
# Fits Chinchilla's law to 104 published training runs, asks it for the best size of a model, and then does the same at the
# size of a laptop: trains a ladder of small models, predicts the loss of a larger one before it is trained, trains it, and
# compares. GPT-4's report predicts its loss this way. On two CPU cores the ladder takes about ten minutes.

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
RUNS_CSV = "tests/fixtures/overtraining/models.csv"  # Gadre et al. 2024, MIT license
SAMPLES = 200  # of the bootstrap
LADDER = [(rung, 0) for rung in ("1x32", "2x32", "2x48", "3x48")]  # LAYERSxWIDTH, tokens; 0: 36 per parameter
TARGET = ("4x64", 0)
SEEDS = (0, 1)
RUNS = "runs/ladder"

# %% [markdown]
# ## Published runs
#
# N is the number of parameters, D the number of training tokens. The law is L(N, D) = E + A / N^alpha + B / D^beta
# (Hoffmann et al. 2022, approach 3), fitted by the Huber loss of log residuals; the intervals are from resampled runs.

# %%
from pathlib import Path

import gptjax
from gptjax.scaling.law_fits import fit_law
from gptjax.scaling.laws import LAWS
from gptjax.scaling.run_table import read_csv

columns = {"parameters": "params", "tokens": "tokens", "loss": "loss_c4_val"}
runs = read_csv(Path(RUNS_CSV), columns, ["parameters", "tokens", "loss"], {"train_dataset": "rpj"})
enough = runs.columns["tokens"] / runs.columns["parameters"] >= 19.9  # fewer tokens: badly under-trained
runs = runs.take(enough)
fit = fit_law(LAWS["chinchilla"], runs, samples=SAMPLES)
for name, value in fit.parameters.items():
    print(f"{name:>6} {value:10.4g}  [{fit.intervals[name][0]:.4g}, {fit.intervals[name][1]:.4g}]")

# %% [markdown]
# Left: every run, and the law's loss for the best size at each amount of compute. Right: that size, and the tokens it
# should see. The law says little beyond the runs it was fitted to.

# %%
import matplotlib.pyplot as plt
import numpy as np

flops = np.geomspace(runs.columns["flops"].min(), 10 * runs.columns["flops"].max(), 40)
sizes, tokens = np.array([fit.optimum(float(budget)) for budget in flops]).T
best = fit.law.value(fit.theta, {"parameters": sizes, "tokens": tokens})
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
shown = left.scatter(runs.columns["flops"], runs.columns["loss"], c=np.log10(runs.columns["parameters"]), s=18)
figure.colorbar(shown, ax=left, label="log10 of parameters")
left.plot(flops, best, color="#c8452d", label="law, at the best size")
left.set(xscale="log", xlabel="FLOPs", ylabel="loss, nats per token")
right.plot(flops, sizes, color="#1f4e8c", label="parameters")
right.plot(flops, tokens, color="#c8452d", label="tokens")
right.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="of the best run")
for axes in (left, right):
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A ladder of your own
#
# Each rung is trained with the same number of tokens per parameter, by the same rules for batch size and learning rate.


# %%
def train(rung, total, seed):
    workdir = f"{RUNS}/{rung}_{total}_{seed}"
    config = gptjax.load_config(f"configs/ladder.py:rung={rung},tokens={total}", {"seed": seed})
    gptjax.train(config, workdir)
    return Path(workdir)


workdirs = [train(rung, total, seed) for rung, total in LADDER for seed in SEEDS]

# %% [markdown]
# ## Predict, then train
#
# GPT-4's form of the law, L(C) = a C^b + c, is fitted to the rungs, and gives the loss of the target with the interval in
# which a single run is expected, before the target is trained.

# %%
from gptjax.training.measured_runs import table_of_runs

rungs = table_of_runs(workdirs)
ladder = fit_law(LAWS["compute"], rungs, samples=SAMPLES)
budget = gptjax.load_config(f"configs/ladder.py:rung={TARGET[0]},tokens={TARGET[1]}")
from gptjax.scaling.flops import flops_per_token

target_flops = flops_per_token(budget.model) * budget.batch.total_tokens
predicted, (low, high) = ladder.predict({"flops": target_flops})
print(f"expected at {target_flops:.3g} FLOPs: {predicted:.4f} nats per token [{low:.4f}, {high:.4f}]")

# %%
measured = table_of_runs([train(*TARGET, 0)]).columns["loss"][0]
print(f"measured: {measured:.4f}, {measured / predicted - 1:+.2%}; within the interval: {low <= measured <= high}")
line = np.geomspace(rungs.columns["flops"].min(), target_flops, 50)
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(line, ladder.law.value(ladder.theta, {"flops": line}), color="#9db8d9", label="law, fitted to the rungs")
axes.plot(rungs.columns["flops"], rungs.columns["loss"], "o", color="#1f4e8c", label="rungs")
axes.errorbar(
    [target_flops], [predicted], [[predicted - low], [high - predicted]], fmt="none", color="#c8452d", capsize=4
)
axes.plot([target_flops], [measured], "x", color="#c8452d", markersize=9, label="target: interval, and measured")
axes.set(xscale="log", xlabel="FLOPs", ylabel="loss, nats per byte")
axes.tick_params(axis="x", which="minor", labelbottom=False)
axes.grid(color="#dddddd", linewidth=0.6)
axes.legend(frameon=False)
plt.show()

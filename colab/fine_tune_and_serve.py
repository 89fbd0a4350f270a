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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/gptjax/blob/main/colab/fine_tune_and_serve.ipynb)
#
# # Fine-tune a classifier, and serve it
#
# Fine-tunes a pretrained model to classify the sentiment of tweets with LoRA, draws its confusion matrix, serves it over
# HTTP from this notebook, and measures the server at several numbers of clients. The same server has OpenAI's API for
# models that generate text. Choose a GPU or TPU runtime.

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
MODEL = "openai-community/gpt2"  # OWNER/NAME on the Hub, or a directory in Hugging Face's format
ROWS = "tweets"  # or csv:/content/rows.csv with columns text and label
BATCH_ROWS, EPOCHS, PEAK_LR = 32, 1.0, 1e-3
CLIENTS, REQUESTS = (1, 2, 4, 8), 64  # of the measurement
RUNS = "runs"

# %% [markdown]
# ## Fine-tune

# %%
import gptjax

if not os.path.exists(f"{RUNS}/gpt2"):
    gptjax.import_huggingface(MODEL, f"{RUNS}/gpt2")
context = gptjax.load_config(f"{RUNS}/gpt2").model.context_length
config = gptjax.load_config(
    f"configs/finetune.py:task=classification,data={ROWS},init_from={RUNS}/gpt2,method=lora",
    {
        "batch.tokens_per_batch": BATCH_ROWS * context,
        "batch.epochs": EPOCHS,
        "optimizer.peak_lr": PEAK_LR,
        "evaluation.every_epochs": EPOCHS / 4,
        "checkpoint.every_epochs": EPOCHS / 4,
    },
)
gptjax.train(config, f"{RUNS}/classifier")

# %% [markdown]
# ## Report
#
# `report.json` has the scores of the held-out rows, with those of each label. A row of the matrix is a true label.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

with open(f"{RUNS}/classifier/report.json") as file:
    report = json.load(file)
validation = gptjax.curves(f"{RUNS}/classifier", "validation")
labels, counts = report["confusion"]["labels"], np.array(report["confusion"]["counts"])
shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot(validation["step"], validation["accuracy"], "o-", color="#c8452d")
left.set(xlabel="step", ylabel="accuracy on held-out rows", ylim=(0, 1))
left.grid(color="#dddddd", linewidth=0.6)
right.imshow(shares, cmap="Blues", vmin=0, vmax=1)
right.set_xticks(range(len(labels)), labels)
right.set_yticks(range(len(labels)), labels)
right.set(xlabel="predicted", ylabel="true")
for (row, column), share in np.ndenumerate(shares):
    right.text(column, row, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.5 else "black")
plt.show()
print(f"accuracy {report['accuracy']:.3f} of {counts.sum():,} rows")

# %% [markdown]
# ## Serve
#
# The server runs in a thread of this notebook, since a second process could not use the same accelerator. Elsewhere,
# `python -m gptjax.serve --workdir=runs/classifier` is the same server with API keys, limits and a log.

# %%
import urllib.request


def post(url, **body):
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
        return json.load(response)


server = gptjax.open_server(f"{RUNS}/classifier")
texts = ["What a wonderful day!", "My train is late again.", "The meeting is at noon."]
answer = post(f"{server.url}/v1/classify", model=server.model, input=texts)
for text, found in zip(texts, answer["data"], strict=True):
    print(f"{found['label']:>10}  {text}")

# %% [markdown]
# ## Measure
#
# The first requests compile, so a round of them is not counted.

# %%
import time
from concurrent.futures import ThreadPoolExecutor


def ask(number):
    started = time.perf_counter()
    post(f"{server.url}/v1/classify", model=server.model, input=texts[number % len(texts)])
    return time.perf_counter() - started


throughput, latency = [], []
for clients in CLIENTS:
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
        started = time.perf_counter()
        seconds = list(pool.map(ask, range(REQUESTS)))
        throughput.append(REQUESTS / (time.perf_counter() - started))
        latency.append(1000 * np.median(seconds))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axes, values, name in ((left, throughput, "requests per second"), (right, latency, "median latency, ms")):
    axes.plot(CLIENTS, values, "o-", color="#1f4e8c")
    axes.set(xlabel="clients", ylabel=name, ylim=(0, None))
    axes.grid(color="#dddddd", linewidth=0.6)
plt.show()
server.close()

# %% [markdown]
# ## OpenAI's API
#
# A workdir that generates text has `/v1/completions` and `/v1/chat/completions`; the client of OpenAI takes
# `base_url=server.url + "/v1"`.

# %%
with gptjax.open_server(f"{RUNS}/gpt2", name="gpt2", rows=1) as server:
    body = {"model": "gpt2", "prompt": "The weather today is", "max_tokens": 12, "temperature": 0.8, "seed": 1}
    print(post(f"{server.url}/v1/completions", **body)["choices"][0]["text"])

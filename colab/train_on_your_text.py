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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/gptjax/blob/main/colab/train_on_your_text.ipynb)
#
# # Train a GPT on your own text
#
# Trains GPT-2's architecture from scratch on text files, draws its loss, samples from it, and looks at which words
# surprise it. The default text is two centuries of State of the Union speeches. The default model takes a minute or two
# on a GPU or TPU and four on two CPU cores; [docs/training.md](https://github.com/OWNER/gptjax/blob/main/docs/training.md)
# describes all settings.

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
#
# `TEXT` is a source of [docs/data.md](https://github.com/OWNER/gptjax/blob/main/docs/data.md): for files that you
# uploaded it is `text:/content/*.txt`, each file a document.

# %% tags=["parameters"]
TEXT = "sotu"
TOKENIZER = "bpe:4096"  # trained on the text; gpt2 is GPT-2's own
LAYERS, WIDTH, HEADS, CONTEXT = 4, 192, 6, 128
TOKENS = 700_000  # to train on
BATCH_ROWS = 8
PEAK_LR = 3e-3
PROMPT = "The Congress"
WORKDIR = "runs/my_gpt"

# %% [markdown]
# ## Train
#
# Running the cell again resumes the run where it was stopped, and does nothing once it is complete: change `WORKDIR` for
# another run.

# %%
import gptjax

config = gptjax.load_config(
    "configs/gpt2.py:runlocal",
    {
        "data.source": TEXT,
        "data.tokenizer": TOKENIZER,
        "model.num_layers": LAYERS,
        "model.embed_dim": WIDTH,
        "model.num_heads": HEADS,
        "model.context_length": CONTEXT,
        "batch.tokens_per_batch": BATCH_ROWS * CONTEXT,
        "batch.total_tokens": TOKENS,
        "optimizer.peak_lr": PEAK_LR,
        "optimizer.warmup_tokens": TOKENS // 14,
        "evaluation.every_tokens": TOKENS // 5,
        "checkpoint.every_tokens": TOKENS // 5,
        "logging.every_steps": max(1, TOKENS // (BATCH_ROWS * CONTEXT * 200)),
    },
)
report = gptjax.train(config, WORKDIR)

# %% [markdown]
# ## Loss

# %%
import matplotlib.pyplot as plt

training, validation = gptjax.curves(WORKDIR), gptjax.curves(WORKDIR, "validation")
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
axes.plot(training["tokens"], training["loss"], color="#9db8d9", label="training")
axes.plot(validation["tokens"], validation["loss"], "o-", color="#c8452d", label="validation")
axes.set(xlabel="tokens", ylabel="loss, nats per token")
axes.grid(color="#dddddd", linewidth=0.6)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Sample
#
# Temperature 0 is greedy decoding; at 1 tokens are sampled with the model's probabilities.

# %%
model = gptjax.load(WORKDIR)
for temperature in (0.0, 0.7, 1.0):
    completion = model.generate(PROMPT, max_new_tokens=CONTEXT // 2, temperature=temperature)
    print(f"--- temperature {temperature}\n{PROMPT}{completion}\n")

# %% [markdown]
# ## What surprises it
#
# The surprisal of a word is -log p of it after all words before: 0 for a word that the model is certain of. The first
# word has none, as its probability depends on how documents of the corpus begin.

# %%
words = model.generate(PROMPT, max_new_tokens=CONTEXT // 4, temperature=0.7).split() or ["nothing"]
words = [*PROMPT.split(), *words][:24]
contexts = [" ".join(words[:i]) for i in range(1, len(words))]
surprisal = -model.score(contexts, [f" {word}" for word in words[1:]])
figure, axes = plt.subplots(figsize=(8, 0.28 * len(words) + 0.8), layout="constrained")
axes.barh(range(len(surprisal)), surprisal, color="#1f4e8c")
axes.set_yticks(range(len(surprisal)), [word.replace("$", r"\$") for word in words[1:]])
axes.invert_yaxis()
axes.set_xlabel("surprisal, nats")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

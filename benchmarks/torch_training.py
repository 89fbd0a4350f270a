"""The PyTorch side of `benchmarks/train_step.py`: transformers' GPT-2 with torch.compile."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.loss_parity import import_torch, make_torch_model
from gptjax.config import Config


def register_causal_attention(transformers: Any) -> str:
    """Registers PyTorch's scaled dot product attention under a name for which transformers creates no mask.

    Under torch.compile it creates one for "sdpa", and with a mask PyTorch cannot use flash attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    return "causal_sdpa"


class TorchTrainer:
    """GPT2LMHeadModel with torch.compile, fused AdamW and clipping, on random tokens.

    On a GPU: bfloat16 autocast, and only flash attention. On a CPU: float32.

    Attributes:
      first_loss: loss of the first step, in nats per token.
      compile_seconds: seconds until the first step was done.
    """

    def __init__(self, config: Config, sequences: int):
        torch, transformers = import_torch()
        self._torch = torch
        self._cuda = torch.cuda.is_available()
        device = "cuda" if self._cuda else "cpu"
        torch.set_float32_matmul_precision("high" if self._cuda else "highest")
        model = make_torch_model(config.model, 0.02).to(device)
        model.set_attn_implementation(register_causal_attention(transformers))
        optimizer = config.optimizer
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        self._adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=True,
        )
        self._model, self._clip_norm = model, optimizer.clip_norm
        self._loss = torch.compile(self._plain_loss)
        shape = (sequences, config.model.context_length)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, shape)
        self._tokens = torch.tensor(tokens, dtype=torch.int64, device=device)
        self._targets = self._tokens.roll(-1, dims=1)
        start = time.perf_counter()
        self.first_loss = float(self._within(self._step).detach())
        self.compile_seconds = time.perf_counter() - start

    def _plain_loss(self, tokens: Any, targets: Any) -> Any:
        logits = self._model(tokens, use_cache=False).logits
        return self._torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _step(self) -> Any:
        torch = self._torch
        with torch.autocast("cuda", torch.bfloat16, enabled=self._cuda):
            loss = self._loss(self._tokens, self._targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return loss

    def _within(self, function: Callable[[], Any]) -> Any:
        if not self._cuda:
            return function()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return function()

    def _wait(self) -> None:
        if self._cuda:
            self._torch.cuda.synchronize()

    def train(self, steps: int) -> float:
        """Runs steps; returns the seconds of each."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self._within(self._step)
        self._wait()
        return (time.perf_counter() - start) / steps

    @property
    def peak_bytes(self) -> int | None:
        return self._torch.cuda.max_memory_allocated() if self._cuda else None

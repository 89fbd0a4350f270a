"""A run small enough to train in a test."""

from pathlib import Path

from gptjax import config as c


def tiny_config(directory: Path) -> c.Config:
    """Two layers on a text made in `directory`; 6 steps of 2 microbatches, with dropout and averaged weights."""
    text = directory / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i:02}.txt").write_text(f"document {i} says: " + f"{i} and {i + 1} are neighbours. " * 8)
    tokens_per_batch = 2 * 4 * 16
    return c.Config(
        model=c.GPTConfig(
            context_length=16, num_layers=2, num_heads=2, embed_dim=16, residual_dropout=0.1, dtype="float32"
        ),
        data=c.DataConfig(
            source=f"text:{text}/*.txt", tokenizer="bytes", validation_fraction=0.1, cache_dir=str(directory / "cache")
        ),
        batch=c.BatchConfig(total_tokens=6 * tokens_per_batch, tokens_per_batch=tokens_per_batch, microbatch_size=4),
        optimizer=c.OptimizerConfig(peak_lr=1e-2, warmup_tokens=tokens_per_batch, ema_decay=0.9),
        evaluation=c.EvaluationConfig(every_tokens=2 * tokens_per_batch, max_tokens=256, sample_tokens=4),
        checkpoint=c.CheckpointConfig(every_tokens=2 * tokens_per_batch, keep_last=1),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )

"""A few images with questions about them, and the config of a short run that reads them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gptjax import config as c
from tests.tiny_chats import config_of, rl_config
from tests.tiny_tasks import save_pretrained

VISION = c.VisionConfig(
    encoder="vit", image_size=4, patch_size=2, num_layers=1, num_heads=2, embed_dim=8, read_layer=-1
)


def write_images(folder: Path, count: int) -> str:
    """Writes dark and bright images, and a file of questions about one or two of them; returns the source."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        bright = np.random.default_rng(i).integers(100, size=(6, 5, 3)) + 150 * (i % 2)
        Image.fromarray(bright.astype(np.uint8)).save(folder / f"{i}.png")
        names = [f"{i}.png"] if i % 3 else [f"{i}.png", f"{max(i - 1, 0)}.png"]
        parts = [{"type": "image_url", "image_url": {"url": name}} for name in names]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": f"q{i}"}]}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": "ab"[i % 2]}]}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder}/chats.jsonl"


def image_config(directory: Path, init_from: Path | None = None, **vision) -> c.Config:
    """Supervised fine-tuning on images; the other settings are those of `tests.tiny_chats`."""
    config = config_of("sft", directory, init_from)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vision=dataclasses.replace(VISION, **vision)),
        data=dataclasses.replace(
            config.data,
            source=write_images(directory / "train", 24),
            validation_source=write_images(directory / "held_out", 6),
            image_shift=0.25,
        ),
        evaluation=dataclasses.replace(config.evaluation, sample_tokens=0),
    )


def write_image_rankings(folder: Path, count: int) -> str:
    """Writes images with rankings of two or three completions: of a dark one the a's are better, else the b's."""
    write_images(folder, count)
    lines = []
    for i in range(count):
        names = [f"{i}.png"] if i % 3 else [f"{i}.png", f"{max(i - 1, 0)}.png"]
        parts = [{"type": "image_url", "image_url": {"url": name}} for name in names]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": f"q{i}"}]}
        better, worse = ("a", "b") if i % 2 == 0 else ("b", "a")
        lines.append(json.dumps({"prompt": [question], "ranking": [better * 2, better, worse][: 2 + i % 2]}))
    (folder / "rankings.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder}/rankings.jsonl"


def image_ranking_config(stage: Any, directory: Path, init_from: Path) -> c.Config:
    """Stage reward or dpo on images; the other settings are those of `image_config`."""
    config = image_config(directory, init_from)
    return dataclasses.replace(
        config,
        stage=stage,
        data=dataclasses.replace(
            config.data,
            source=write_image_rankings(directory / "ranked", 12),
            validation_source=write_image_rankings(directory / "ranked_held_out", 3),
        ),
    )


def image_rl_config(stage: str, directory: Path, init_from: Path, reward: Path | None = None) -> c.Config:
    """Stage ppo or grpo on prompts with images; the other settings are those of `tests.tiny_chats.rl_config`."""
    config, images = rl_config(stage, directory, init_from, reward), image_config(directory)
    source, validation = images.data.source, images.data.validation_source
    return dataclasses.replace(
        config,
        model=images.model,
        data=dataclasses.replace(config.data, source=source, validation_source=validation),
    )


def save_image_sft(workdir: Path, directory: Path) -> Path:
    """Saves random weights as those of a run of stage sft on images, with its data in `directory`."""
    config = image_config(directory)
    vision = dataclasses.replace(config.model.vision, image_token=259)
    save_pretrained(workdir, settings=dataclasses.replace(config.model, vocab_size=260, vision=vision))
    (workdir / "config.json").write_text(c.to_json(config))
    return workdir

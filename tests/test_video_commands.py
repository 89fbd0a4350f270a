"""Videos in training and in the commands, as a user runs them, on random weights; skipped without PyAV."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.conversations import read_conversations
from gptjax.data.images.image_references import WHOLE_VIDEO
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.builders import build
from gptjax.training.metrics_file import read_metrics
from tests.commands import run_command
from tests.data.images.test_videos import write_video
from tests.tiny_images import image_config, save_image_sft

pytest.importorskip("av")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Random weights as those of a run of stage sft on images."""
    directory = tmp_path_factory.mktemp("images")
    workdir = save_image_sft(directory / "sft", directory)
    config = c.replace(c.read_config(workdir), {"data": {"video_frames": 2}})
    (workdir / "config.json").write_text(c.to_json(config))
    return workdir


def video_config(directory: Path, **data) -> c.Config:
    """Supervised fine-tuning on questions about videos that become darker, and others that become brighter."""
    lines = []
    for number in range(12):
        values = [20, 120, 220] if number % 2 else [220, 120, 20]
        write_video(directory / f"{number}.mkv", values)
        part = {"type": "video_url", "video_url": {"url": f"{number}.mkv"}}
        question = {"role": "user", "content": [part, {"type": "text", "text": f"q{number}"}]}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": "ab"[number % 2]}]}))
    (directory / "chats.jsonl").write_text("\n".join(lines) + "\n")
    config = image_config(directory)
    source = f"jsonl:{directory}/chats.jsonl"
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source, validation_source=source, image_shift=0.0, **data),
    )


@pytest.mark.parametrize("timestamps", [False, True])
def test_a_row_has_the_frames_of_its_videos(timestamps, tmp_path):
    config = video_config(tmp_path, video_frames=2, video_timestamps=timestamps)
    stage = build(config, make_mesh(c.MeshConfig()), None)
    arrays = {name: np.asarray(array) for name, array in next(stage.batches(0, None)).arrays.items()}
    images = arrays["images"][arrays["images"].sum(axis=-1) > 0]
    assert {tuple(pair) for pair in images[:, 0].reshape(-1, 2).tolist()} == {(20, 220), (220, 20)}
    first = arrays["tokens"][0][arrays["segments"][0] == 1]
    text = stage.tokenizer.decode(first[first < stage.tokenizer.vocab_size])
    assert text.removeprefix("<|endoftext|>").startswith("0.0 s: 0.5 s: q" if timestamps else "q")


def test_a_model_of_text_is_given_no_video(tmp_path):
    config = video_config(tmp_path)
    text = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=c.VisionConfig()))
    with pytest.raises(UserError, match=r"chats.jsonl:1: there is an image, but this model reads text alone"):
        build(text, make_mesh(c.MeshConfig()), None)


@pytest.mark.slow
def test_a_run_reads_the_order_of_frames(tmp_path):
    config = video_config(tmp_path, video_frames=2)
    run(dataclasses.replace(config, batch=dataclasses.replace(config.batch, epochs=10.0)), tmp_path / "run")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run")[1] if r["split"] == "validation"]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_generate_and_evaluate_read_videos(workdir, tmp_path):
    dark_to_bright = write_video(tmp_path / "a.mkv", [10, 130, 250])
    bright_to_dark = write_video(tmp_path / "b.mkv", [250, 130, 10])
    flags = (f"--workdir={workdir}", "--max_new_tokens=4", "--temperature=0", "--logprobs", "--prompt=q1")
    found = []
    for more in (
        (f"--video={dark_to_bright}",),
        (f"--video={bright_to_dark}", "--frames=2"),
        (f"--video={dark_to_bright}", "--frames=3"),
        (f"--image={write_frame(tmp_path, 10)}", f"--image={write_frame(tmp_path, 250)}"),
    ):
        result = run_command("gptjax.generate", *flags, *more)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout)["logprobs"])
    assert found[0] == found[3]  # a video is its frames
    assert found[0] != found[1]
    assert found[0] != found[2]
    gone = run_command("gptjax.generate", *flags, "--video=gone.mkv")
    assert (gone.returncode, gone.stdout) == (2, "")
    assert "there is no image gone.mkv" in gone.stderr
    question = {"video": "a.mkv", "question": "q", "answer": "a"}
    (tmp_path / "vqa.jsonl").write_text(json.dumps(question) + "\n")
    source = f"--source=jsonl:{tmp_path}/vqa.jsonl"
    asked = run_command("gptjax.evaluate", f"--workdir={workdir}", "--tasks=vqa", source)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.slow
def test_chat_reads_videos_as_their_frames(workdir, tmp_path):
    film = write_video(tmp_path / "a.mkv", (10, 200))
    said = ["/video gone.mkv", f"/video {film}", "q1", f"/save {tmp_path / 'said.jsonl'}"]
    failed = run_command("gptjax.chat", f"--workdir={workdir}", stdin=said[0])
    assert failed.returncode == 2
    assert "gone.mkv" in failed.stderr
    result = run_command("gptjax.chat", f"--workdir={workdir}", "--temperature=0", stdin="\n".join(said[1:]) + "\n")
    if result.returncode == 0:  # random weights may write an empty completion, which is not saved
        (conversation,) = read_conversations(f"jsonl:{tmp_path / 'said.jsonl'}")
        assert conversation.messages[0].content == "<image>\nq1"
        assert [(named.source, named.frame) for named in conversation.messages[0].images] == [(str(film), WHOLE_VIDEO)]
    else:
        assert "a completion is empty" in result.stderr


def write_frame(directory: Path, value: int) -> Path:
    from PIL import Image

    path = directory / f"{value}.png"
    Image.new("RGB", (8, 6), (value,) * 3).save(path)
    return path

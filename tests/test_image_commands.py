"""The commands with images, as a user runs them, on random weights."""

import json
from pathlib import Path

import pytest
from PIL import Image

from gptjax.data.conversations import read_conversations
from tests.commands import run_command
from tests.tiny_chats import save_sft
from tests.tiny_images import save_image_sft


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Random weights as those of a run of stage sft on images."""
    directory = tmp_path_factory.mktemp("images")
    return save_image_sft(directory / "sft", directory)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.effect_noise((7, 5), 90).save(path)
    return path


@pytest.mark.slow
def test_generate_completes_a_prompt_with_images(workdir, image):
    flags = (f"--workdir={workdir}", "--max_new_tokens=4", "--temperature=0", "--logprobs", f"--image={image}")
    first = run_command("gptjax.generate", *flags, "--prompt=q1")
    assert first.returncode == 0, first.stderr
    same = run_command("gptjax.generate", *flags, "--prompt=<image>\nq1")
    other = run_command("gptjax.generate", *flags[:-1], "--image=digits:3", "--prompt=q1")
    lines = [json.loads(result.stdout) for result in (first, same, other)]
    assert lines[0]["logprobs"] == lines[1]["logprobs"] != lines[2]["logprobs"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image=gone.png", "--prompt=q"), "there is no image gone.png"),
        (("--image=digits:0", "--prompt=<image><image>"), "has 2 <image> for 1 images: they must be equally many"),
        (("--image=http://a.com/a.png", "--prompt=q"), "the image http://a.com/a.png is remote"),
        (("--image=digits:0", "--prompt=q", "--num_beams=2"), "--image and --video exclude --num_beams"),
        (("--image=digits:9999", "--prompt=q"), "there is no image digits:9999"),
        (("--image=digits:0", "--prompt=q", "--frames=2"), "--frames is the number of frames of a --video: name one"),
    ],
)
def test_user_errors_of_generate(workdir, flags, message):
    result = run_command("gptjax.generate", f"--workdir={workdir}", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_text_model_is_given_no_image(tmp_path, image):
    text = save_sft(tmp_path / "sft", tmp_path)
    for command, stdin, flags in (
        ("generate", "", (f"--image={image}", "--prompt=q")),
        ("chat", f"/image {image}\n", ()),
        ("evaluate", "", ("--tasks=vqa", "--source=digits:test")),
    ):
        result = run_command(f"gptjax.{command}", f"--workdir={text}", *flags, stdin=stdin)
        assert result.returncode == 2
        assert "this model reads text alone" in result.stderr


@pytest.mark.slow
def test_chat_reads_images_and_saves_them(workdir, image, tmp_path):
    lines = [f"/image {image}", "q1", "/regen", "q2", "/image gone.png", f"/save {tmp_path / 'said.jsonl'}"]
    result = run_command("gptjax.chat", f"--workdir={workdir}", "--temperature=0", stdin="\n".join(lines[:4]) + "\n")
    assert result.returncode == 0, result.stderr
    failed = run_command("gptjax.chat", f"--workdir={workdir}", stdin="/image gone.png\n")
    assert failed.returncode == 2
    assert "there is no image" in failed.stderr
    said = run_command("gptjax.chat", f"--workdir={workdir}", stdin="\n".join([*lines[:2], lines[5]]) + "\n")
    if said.returncode == 0:  # random weights may write an empty completion, which is not saved
        (conversation,) = read_conversations(f"jsonl:{tmp_path / 'said.jsonl'}")
        assert conversation.messages[0].content == "<image>\nq1"
        assert [named.source for named in conversation.messages[0].images] == [str(image)]


def test_evaluate_answers_questions_about_images(workdir, image, tmp_path):
    questions = [
        {"image": str(image), "question": "q1", "answers": ["a", "b"]},
        {"image": str(image), "question": "which?", "choices": ["a", "b"], "answer": "B"},
        {"images": ["digits:1", "digits:2"], "question": "<image>or<image>", "answer": 3},
    ]
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    flags = ("--tasks=vqa", f"--source=jsonl:{tmp_path}/vqa.jsonl", f"--output={tmp_path}/report.json")
    result = run_command("gptjax.evaluate", f"--workdir={workdir}", *flags)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "report.json").read_text())["results"]["vqa"]["metrics"]
    assert metrics.keys() == {
        *("exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "bleu", "choice_accuracy", "ended"),
        *("exact_match_1", "exact_match_2"),
    }
    answers = [json.loads(line) for line in (tmp_path / "report.answers.jsonl").read_text().splitlines()]
    assert [line["images"] for line in answers] == [[str(image)], [str(image)], ["digits:1", "digits:2"]]
    assert answers[1]["question"] == "<image>\nwhich?\nA. a\nB. b" or answers[1]["question"] == "which?\nA. a\nB. b"
    (tmp_path / "bad.jsonl").write_text(json.dumps({"image": str(image), "question": "q"}) + "\n")
    failed = run_command(
        "gptjax.evaluate", f"--workdir={workdir}", "--tasks=vqa", f"--source=jsonl:{tmp_path}/bad.jsonl"
    )
    assert failed.returncode == 2
    assert "bad.jsonl:1 has no answer" in failed.stderr


@pytest.mark.slow
def test_answers_about_an_image_are_not_those_about_its_file_before(workdir, tmp_path):
    (tmp_path / "vqa.jsonl").write_text(json.dumps({"image": "own.png", "question": "q", "answer": "a"}) + "\n")
    kept = []
    for colour in ("red", "red", "blue"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "own.png")
        flags = ("--tasks=vqa", f"--source=jsonl:{tmp_path}/vqa.jsonl", f"--output={tmp_path}/report.json")
        assert run_command("gptjax.evaluate", f"--workdir={workdir}", *flags).returncode == 0
        kept.append({path.name for path in (workdir / "evaluation" / "scores").glob("*-answers-*.jsonl")})
    assert kept[0] == kept[1]
    assert len(kept[2] - kept[1]) == 1

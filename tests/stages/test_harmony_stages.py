"""Models of the harmony format from stage sft to a chat: what is trained on, rewarded, and said."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.conversations import read_conversations
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.dialogue import read_prompts
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.builders import build
from gptjax.training.metrics_file import read_metrics
from tests.commands import run_command
from tests.tiny_chats import config_of, rl_config
from tests.tiny_tasks import MODEL, save_pretrained

pytestmark = pytest.mark.slow  # whole runs of the chat stages

CHAT = c.ChatConfig(template="harmony", model_identity="M", knowledge_cutoff="K")
CONTEXT = 512


def write_chats(path: Path, *, thinks: bool = True) -> str:
    lines = []
    for i in range(6):
        call = {"function": {"name": "add", "arguments": f"[{i}, 1]"}}
        turns: list[dict] = [
            {"role": "user", "content": f"{i} + 1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": str(i + 1)},
            {"role": "assistant", "content": f"It is {i + 1}."},
            *[{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}],
        ]
        if thinks:
            turns[1]["thinking"], turns[5]["thinking"] = "I add.", "It is."
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return f"jsonl:{path}"


def harmony_config(directory: Path, **chat: str) -> c.Config:
    config = config_of("sft", directory, None)
    source = write_chats(directory / "chats.jsonl")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(MODEL, context_length=CONTEXT),
        data=dataclasses.replace(config.data, source=source, validation_source=source),
        chat=dataclasses.replace(CHAT, **chat),  # type: ignore[arg-type]
        batch=c.BatchConfig(epochs=2.0, tokens_per_batch=2 * CONTEXT),
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("harmony")
    run(harmony_config(directory), directory / "sft")
    return directory / "sft"


def test_each_token_of_the_assistant_is_in_the_loss_once(tmp_path):
    config = harmony_config(tmp_path)
    stage, form = build(config, make_mesh(c.MeshConfig()), None), chat_format(config.chat, BytesTokenizer())
    batches, rows = stage.batches(0, None), stage.total_tokens // CONTEXT
    counted = [next(batches).arrays for _ in range(rows // 2)]
    learned = sum(int(arrays["weights"].sum()) for arrays in counted)
    encoded = [
        form.encode(messages)
        for conversation in read_conversations(config.data.source, harmony=True)
        for messages in form.training_conversations(conversation.messages)
    ]
    assert len(encoded) == 12
    assert learned == 2 * sum(int(one.loss_mask.sum()) for one in encoded)
    targets = np.concatenate([arrays["targets"][arrays["weights"] > 0] for arrays in counted])
    assert np.bincount(targets, minlength=form.vocab_size)[form.end_tokens[0]] == 2 * 12
    assert np.bincount(targets, minlength=form.vocab_size)[form.end_tokens[1]] == 2 * 6


def test_a_mask_that_leaves_nothing_is_named(tmp_path):
    config = harmony_config(tmp_path, loss_mask="final")
    record = json.loads((tmp_path / "chats.jsonl").read_text().splitlines()[0])
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": record["messages"][:2]}) + "\n")
    data = dataclasses.replace(config.data, source=f"jsonl:{tmp_path / 'calls.jsonl'}")
    with pytest.raises(UserError, match=r"no conversation has a completion in the loss: set chat\.loss_mask=assistant"):
        build(dataclasses.replace(config, data=data), make_mesh(c.MeshConfig()), None)


def test_sft_learns_and_chats(sft, tmp_path):
    losses = [record["loss"] for record in read_metrics(sft)[1] if record["split"] == "validation"]
    assert losses[-1] < losses[0]
    saved, tools = tmp_path / "said.jsonl", tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "add"}}]))
    flags = [f"--tools={tools}", "--analysis=show", "--reasoning_effort=low", "--max_new_tokens=16"]
    result = run_command("gptjax.chat", f"--workdir={sft}", *flags, stdin="/system Be kind.\nq1\n/regen\nq2\n")
    stderr = [line for line in result.stderr.splitlines() if not line.startswith("compiling ")]
    assert (result.returncode, stderr) == (0, [])
    result = run_command("gptjax.chat", f"--workdir={sft}", stdin=f"q1\n/tool 3\n/save {saved}\n")
    assert result.returncode == 2
    assert "does not call a tool" in result.stderr
    tools.write_text('[{"type": "browser"}]')
    result = run_command("gptjax.chat", f"--workdir={sft}", f"--tools={tools}", stdin="q1\n")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "tools[0] is not an object of type function" in result.stderr


def test_a_model_that_no_chat_stage_trained(sft, pretrained, tmp_path, o200k_harmony):
    for workdir, message in (
        (pretrained, f"the tokenizer of {pretrained} lacks <|return|> of --template=harmony: train the model with"),
        (sft, f"{sft} is trained with chat.template=harmony: leave out --template"),
    ):
        result = run_command("gptjax.chat", f"--workdir={workdir}", "--template=harmony", stdin="q1\n")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr
    model = dataclasses.replace(MODEL, context_length=256, vocab_size=201_088, embed_dim=4, num_layers=1)
    save_pretrained(tmp_path / "gpt_oss", settings=model)
    o200k_harmony.save(tmp_path / "gpt_oss" / "tokenizer")  # replaces its own
    result = run_command("gptjax.chat", f"--workdir={tmp_path / 'gpt_oss'}", "--template=harmony", stdin="q1\n")
    assert result.returncode == 0, result.stderr


def test_held_out_prompts_have_final_messages_as_references(sft):
    found = read_prompts(None, c.read_config(sft))
    assert [prompt.reference for prompt in found[:2]] == ["It is 1.", "Yes."]
    assert found[0].messages[-1].role == "tool"


def test_rewards_are_those_of_final_messages(sft, tmp_path):
    config = rl_config("grpo", tmp_path, sft)
    source = write_chats(tmp_path / "prompts.jsonl")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(MODEL, context_length=CONTEXT),
        data=dataclasses.replace(config.data, source=source, validation_source=source),
        chat=CHAT,
        batch=c.BatchConfig(epochs=1.0, tokens_per_batch=4 * CONTEXT),
        rl=dataclasses.replace(config.rl, prompts_per_iteration=4, response_tokens=8),
    )
    run(config, tmp_path / "grpo")
    records = [record for record in read_metrics(tmp_path / "grpo")[1] if record["split"] == "rollout"]
    assert records
    assert all(math.isfinite(record["reward"]) for record in records)

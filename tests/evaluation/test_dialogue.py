"""Metrics of dialogue completions against references, each compared with a value computed by hand."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.config import UserError, replace
from gptjax.data.conversations import Conversation, Message, Prompt, prompts, read_conversations, read_rankings
from gptjax.data.templates import TEMPLATES, ChatFormat, chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation import dialogue
from gptjax.evaluation.dialogue import DialogueCompletion, Rewards, dialogue_task, read_prompts, reward
from gptjax.evaluation.run_tasks import Options, evaluate
from gptjax.evaluation.scoring import Scorer, ScoringResult
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.metrics.text import rouge
from gptjax.run import run
from gptjax.stages.preference.reward_scorer import load_reward_model
from gptjax.stages.trained_model import load_model
from tests.tiny_chats import config_of
from tests.tiny_tasks import CONTEXT

PLAIN = ChatFormat(TEMPLATES["plain"], BytesTokenizer())


def prompt(text: str, reference: str) -> Prompt:
    return Prompt((Message("user", text),), reference, "here")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dialogue")


@pytest.fixture(scope="module")
def sft(directory, pretrained) -> Path:
    config = config_of("sft", directory, pretrained)
    run(replace(config, {"batch": {"epochs": 60.0}}), directory / "sft")
    return directory / "sft"


@pytest.fixture(scope="module")
def reward_model(directory, pretrained) -> Path:
    config = config_of("reward", directory, pretrained)
    run(replace(config, {"batch": {"epochs": 4.0}}), directory / "reward")
    return directory / "reward"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_each_turn_of_the_assistant_is_a_prompt():
    messages = [
        Message(role, text)
        for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    assert prompts([Conversation(tuple(messages), "x:1")]) == [
        Prompt(tuple(messages[:2]), "b", "x:1"),
        Prompt(tuple(messages[:4]), "d", "x:1"),
    ]


def test_what_is_too_long_loses_turns_or_is_left_out():
    old = (Message("user", "old"), Message("assistant", "old"))
    asked = "User:\nq\n\nAssistant:\n"
    several = [
        Prompt((*old, Message("user", "q")), "fits with all", "a"),
        Prompt((*old, Message("user", "q")), "r" * 30, "b"),  # scored without the old turns
        prompt("q" * 40, "r"),  # leaves no room for an answer
        prompt("q", "r" * 60),  # is too long to be scored
        prompt("q", ""),
    ]
    context = len(asked) + 50
    task = dialogue_task(several, PLAIN, context, max_new_tokens=12)
    assert [p.reference for p in task.prompts] == ["fits with all", "r" * 30, ""]
    assert task.settings == {"prompts": 3, "prompts_available": 5, "left_out": 2, "max_new_tokens": 12}
    tokens, scored = task.requests[1]
    assert BytesTokenizer().decode(tokens) == "<|endoftext|>" + asked + "r" * 30 + "<|endoftext|>"
    assert scored == 31
    assert b"old" in bytes(task.requests[0].tokens[1:-1].astype(np.uint8))
    for text in map(BytesTokenizer().decode, task.inputs):
        assert text.endswith(asked)
    assert [len(request.tokens) <= context + 1 for request in task.requests] == [True] * 3
    assert dialogue_task(several, PLAIN, context, limit=1).settings["prompts"] == 1
    with pytest.raises(UserError, match=r"no prompt fits into the context together with its completion: here: its"):
        dialogue_task(several[2:4], PLAIN, context)
    with pytest.raises(UserError, match=r"max_new_tokens=70 leaves no room"):
        dialogue_task(several, PLAIN, context, max_new_tokens=context)


def test_a_runs_own_held_out_conversations(directory, tmp_path):
    config = config_of("sft", tmp_path, None)
    own = [f"q{i}" for i in range(5)]
    assert [p.messages[-1].content for p in read_prompts(None, config)] == own
    held_out = replace(config, {"data": {"validation_source": None, "validation_fraction": 0.25}})
    train_and_held_out = prompts(read_conversations(config.data.source))
    assert read_prompts(None, held_out) == train_and_held_out[3::4]
    named = config_of("reward", tmp_path, None)
    found = read_prompts(None, named)
    assert [(p.messages[-1].content, p.reference) for p in found] == [(text, "aa") for text in own]
    assert len(read_rankings(named.data.validation_source)) == len(found)
    assert read_prompts(config.data.source, named) == train_and_held_out


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    several = [prompt("q", "the cat sat on the mat"), prompt("q", "no")]
    task = dialogue_task(several, PLAIN, 200)
    scores = [ScoringResult(-23.0, 23, False), ScoringResult(-6.0, 3, False)]
    completions = [
        DialogueCompletion("the cat sat on the rug", 22, True),
        DialogueCompletion("the cat", 50, False),
    ]
    found, signature = task.metrics(scores, completions, Rewards(np.array([1.0, 2.0]), np.array([1.0, 5.0])))
    assert {name: measured.n for name, measured in found.items()} == dict.fromkeys(found, 2)
    values = {name: measured.value for name, measured in found.items()}
    # Words: 5 + 0 of 6 + 2 are the reference's, pairs 4 of 6, triples 3 of 4, quadruples 2 of 3; longer than 7 words.
    assert values.pop("bleu") == pytest.approx((5 / 8 * 4 / 6 * 3 / 4 * 2 / 3) ** (1 / 4))
    assert "tok:13a" in signature
    of_first = rouge("the cat sat on the rug", "the cat sat on the mat")
    for name in ("rouge1", "rouge2", "rougeL"):
        assert values.pop(name) == pytest.approx(of_first[name] / 2)
    assert values.pop("distinct1") == 5 / 8
    assert values.pop("distinct2") == 5 / 6
    assert values == pytest.approx(
        {
            "perplexity": math.exp(29 / 26),
            "nats_per_token": 29 / 26,
            "answer_tokens": 36,
            "reference_tokens": 12,
            "ended": 0.5,
            "win_rate": 0.25,
        }
    )
    assert "win_rate" not in task.metrics(scores, completions)[0]


def test_a_truncated_completion_loses_whatever_its_reward():
    task = dialogue_task([prompt(text, "yes") for text in "abcd"], PLAIN, 200)
    scores = [ScoringResult(-1.0, 4, False)] * 4
    completions = [DialogueCompletion("no", 2, ended) for ended in (True, False, False, True)]
    rewards = Rewards(np.array([2.0, 9.0, 1.0, 1.0]), np.ones(4))  # wins, cut off, cut off, ties
    assert rewards.wins([completion.ended for completion in completions]).tolist() == [1.0, 0.0, 0.0, 0.5]
    metrics, _ = task.metrics(scores, completions, rewards)
    assert (metrics["win_rate"].value, metrics["win_rate"].n, metrics["ended"].value) == (0.375, 4, 0.5)


def test_rewards_of_completions_and_references_are_kept_apart():
    several, asked = [prompt("a", "xx"), prompt("b", "y"), prompt("c", "zzz")], []

    def score(pairs, ended):
        asked.extend(zip(pairs, ended, strict=True))
        return [len(text) for _, text in pairs]

    found = reward(score, several, [DialogueCompletion(text, 0, text != "") for text in ("xxx", "y", "")])
    assert found.wins([True] * 3).tolist() == [1.0, 0.5, 0.0]
    assert {(messages[0].content, text, ended) for (messages, text), ended in asked} == {
        *(("a", "xxx", True), ("b", "y", True), ("c", "", False)),  # the scorer learns which was truncated
        *(("a", "xx", True), ("b", "y", True), ("c", "zzz", True)),
    }


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_evaluation_end_to_end(sft, reward_model, tmp_path, capsys):
    output = tmp_path / "report.json"
    report = evaluate(
        sft,
        Options(
            tasks=("dialogue",), held_out=True, max_new_tokens=6, reward_model=reward_model, output=output, batch_size=2
        ),
    )
    entry = report["results"]["dialogue"]
    trained = load_model(sft)
    form = chat_format(trained.config.chat, trained.tokenizer)
    engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)
    records = [json.loads(line) for line in (tmp_path / "report.answers.jsonl").read_text().splitlines()]
    expected = read_conversations(trained.config.data.validation_source)
    apply, nats, tokens = jax.jit(trained.model.apply), 0.0, 0
    for record, conversation in zip(records, expected, strict=True):
        question = conversation.messages[0]
        assert record["messages"] == [{"role": question.role, "content": question.content}]
        assert record["reference"] == conversation.messages[1].content
        assert record["place"] == conversation.place
        asked = form.encode_prompt(conversation.messages[:1])
        (said,) = engine.generate([asked], 6, Sampling(temperature=0), end_tokens=[form.end_of_turn])
        assert (record["answer"], record["ended"]) == (said.text, said.finish_reason == "end_of_turn")
        whole = form.encode(conversation.messages)
        tokens_1T = np.pad(whole.tokens, (0, CONTEXT - len(whole)))[None]  # what is behind changes nothing
        logits_TV = np.asarray(apply({"params": trained.params}, tokens_1T)[0])
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        targets = np.flatnonzero(whole.loss_mask)
        nats -= float(logprobs_TV[targets - 1, whole.tokens[targets]].sum())
        tokens += len(targets)
    assert any(record["ended"] for record in records)
    assert entry["metrics"]["nats_per_token"]["value"] == pytest.approx(nats / tokens, rel=1e-5)
    wins = [r["ended"] * (np.sign(r["reward"] - r["reference_reward"]) + 1) / 2 for r in records]
    assert entry["metrics"]["win_rate"]["value"] == pytest.approx(np.mean(wins))
    assert (entry["prompts"], entry["left_out"], entry["max_new_tokens"]) == (5, 0, 6)
    assert entry["reward_model"] == str(reward_model)
    out = capsys.readouterr().out
    assert f"the completions are in {tmp_path / 'report.answers.jsonl'}" in out
    assert "bleu_signature nrefs:1" in out
    assert json.loads(output.read_text())["results"] == json.loads(json.dumps(report["results"]))


def test_a_stopped_evaluation_resumes(sft, tmp_path, monkeypatch):
    options = Options(tasks=("dialogue",), source=f"jsonl:{sft.parent / 'sft.jsonl'}", limit=7, batch_size=2)
    whole = evaluate(sft, dataclasses.replace(options, output=tmp_path / "whole.json"))
    for path in (sft / "evaluation" / "scores").glob("*answers*"):
        path.unlink()
    complete, left = dialogue.DialogueTask.complete, [3]

    def limited(*args):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return complete(*args)

    monkeypatch.setattr(dialogue.DialogueTask, "complete", limited)
    with pytest.raises(KeyboardInterrupt):
        evaluate(sft, dataclasses.replace(options, output=tmp_path / "cut.json"))
    left[0] = 1  # of the four batches
    again = evaluate(sft, dataclasses.replace(options, output=tmp_path / "again.json"))
    assert again["results"] == whole["results"]
    assert (tmp_path / "again.answers.jsonl").read_text() == (tmp_path / "whole.answers.jsonl").read_text()
    monkeypatch.setattr(Scorer, "score_batch", None)  # nothing is scored again
    assert evaluate(sft, options)["results"] == whole["results"]


def test_stages_that_do_not_answer(reward_model, sft):
    with pytest.raises(UserError, match="is of stage reward: --tasks=dialogue is for stages sft, dpo, ppo, grpo"):
        evaluate(reward_model, Options(tasks=("dialogue",)))
    with pytest.raises(UserError, match="is of stage sft: a reward model is a run of stage reward"):
        evaluate(sft, Options(tasks=("dialogue",), held_out=True, reward_model=sft))


# --- the reward model -------------------------------------------------------------------------------------------------


def test_rewards_are_what_the_run_has_learned(reward_model):
    mesh = load_model(reward_model).mesh
    score = load_reward_model(reward_model, mesh, batch_size=4)
    rankings = read_rankings(f"jsonl:{reward_model.parent / 'reward.jsonl'}")
    best = score([(r.prompt, r.completions[0]) for r in rankings])
    worst = score([(r.prompt, r.completions[-1]) for r in rankings])
    assert best.dtype == np.float64
    assert abs(best.mean()) < 0.3 * abs(best - worst).mean()  # the scale's zero, but for what was held out
    assert np.mean(best > worst) > 0.9
    # One by one, in another order, and with turns that have no room: the same.
    pairs = [(r.prompt, answer) for r in rankings[:5] for answer in r.completions]
    pairs.insert(1, (pairs[0][0], "a" * (CONTEXT - 8)))  # longer than the others' shapes
    together = score(pairs)
    np.testing.assert_allclose([score([pair])[0] for pair in pairs], together, atol=1e-5)
    old = (Message("user", "x" * CONTEXT), Message("assistant", "y"))
    np.testing.assert_allclose(score([((*old, *pairs[0][0]), pairs[0][1])]), together[:1], atol=1e-5)
    # What is too long for the context is truncated.
    np.testing.assert_array_equal(*(score([(pairs[0][0], "a" * length)]) for length in (CONTEXT, 2 * CONTEXT)))

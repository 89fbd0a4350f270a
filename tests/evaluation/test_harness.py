"""The adapter to lm-evaluation-harness gives the same scores, and the harness runs its tasks with it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.evaluation.scoring import ScoringRequest, encode_pair

pytest.importorskip("lm_eval")
# Warnings of the harness and its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def adapter(workdir):
    from gptjax.evaluation.harness import harness_model

    return harness_model(workdir, batch_size=3)


def asked(*args):
    return SimpleNamespace(args=args)


PAIRS = [("The sky is", " blue"), ("A text that is longer than the context", " of it"), ("", "no context"), ("a ", "b")]


def test_loglikelihood_equals_ours_and_that_by_hand(adapter, tiny):
    for (context, continuation), (logprob, greedy) in zip(
        PAIRS, adapter.loglikelihood([asked(*pair) for pair in PAIRS]), strict=True
    ):
        expected = tiny.by_hand(encode_pair(tiny.tokenizer, context, continuation))
        assert (logprob, greedy) == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_encoding_is_the_harness_own(tiny):
    from lm_eval.api.model import TemplateLM

    theirs = SimpleNamespace(backend="causal", tok_encode=lambda text: tiny.tokenizer.encode(text).tolist())
    for context, continuation in PAIRS:
        if context:
            tokens, scored = encode_pair(tiny.tokenizer, context, continuation)
            expected = TemplateLM._encode_pair(theirs, context, continuation)
            assert (tokens[:-scored].tolist(), tokens[-scored:].tolist()) == expected


def test_rolling_windows_are_the_harness_own(adapter, tiny):
    from lm_eval.utils import get_rolling_token_windows

    text = "A text of more than two contexts, that is of more than forty-eight bytes, and some."
    tokens = tiny.tokenizer.encode(text).tolist()
    expected = 0.0
    for inputs, targets in get_rolling_token_windows(tokens, tiny.tokenizer.end_of_text, 24, 1):
        request = ScoringRequest(np.array([*inputs, targets[-1]], np.int32), len(targets))
        expected += tiny.by_hand(request)[0]
    assert adapter.loglikelihood_rolling([asked(text), asked("short")])[0] == pytest.approx(expected, rel=1e-5)


def test_generation_stops_and_keeps_the_end_of_long_contexts(adapter, tiny):
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False}
    context = "A context that is much longer than the model's"
    short = {**settings, "max_gen_toks": 3}
    # Two kinds of settings in turn, in one batch.
    texts = adapter.generate_until([asked(context, settings), asked("a", short), asked("b", settings)])
    tokens = tiny.tokenizer.encode(context)[-18:].tolist()
    for _ in range(6):
        tokens.append(int(tiny.logits(np.array(tokens)).argmax(-1)[-1]))
    new = tokens[18:]
    expected = tiny.tokenizer.decode(new[: new.index(256)] if 256 in new else new)
    assert texts[0] == expected
    assert texts[1:] == [adapter.generate_until([asked(*pair)])[0] for pair in (("a", short), ("b", settings))]
    # No temperature means greedy decoding, as in the harness' own models.
    assert adapter.generate_until([asked(context, {"until": [], "max_gen_toks": 6})]) == [expected]
    first = expected[0]
    assert adapter.generate_until([asked(context, {**settings, "until": [first]})]) == [""]
    with pytest.raises(UserError, match="generates 24 tokens, but the model's context has 24"):
        adapter.generate_until([asked(context, {**settings, "max_gen_toks": 24})])


def test_the_harness_runs_its_tasks(adapter, tiny, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    records = [{"q": f"{i} + 1 is", "options": [f"{i + 1}", f"{i}{i}"], "gold": i % 2} for i in range(6)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    which = {
        **shared,
        "task": "which",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        **shared,
        "task": "text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    say = {
        **shared,
        "task": "say",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=[which, text, say], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )["results"]

    right, nats, size = 0, 0.0, 0
    for record in records:
        scores = [
            tiny.by_hand(encode_pair(tiny.tokenizer, record["q"], " " + option))[0] for option in record["options"]
        ]
        right += scores.index(max(scores)) == record["gold"]
        nats -= tiny.by_hand(encode_pair(tiny.tokenizer, "", record["q"]))[0]
        size += len(record["q"])
    assert found["which"]["acc,none"] == pytest.approx(right / 6)
    assert found["text"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert 0 <= found["say"]["exact_match,none"] <= 1

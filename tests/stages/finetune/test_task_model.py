"""The task model: its invariances, and its loss against one computed by hand from the hidden states."""

import dataclasses
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.config import Config, replace
from gptjax.data.buckets import Buckets
from gptjax.data.labelled import Row
from gptjax.data.task_inputs import encode
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.stages.finetune.task_model import TaskModel, completed
from gptjax.training.step import make_train_step
from tests.tiny_tasks import KINDS, LABELS, MODEL, records

CONTEXT, ROWS = 64, 5  # two buckets
GRADIENTS = ("classification", "multiple_choice", "tagging", "question_answering")  # compiling them takes longest
RNG = jax.random.key(0)  # given, the language model's loss counts; no kind of dropout is on
NAMES = {
    "classification": LABELS,
    "entailment": LABELS,
    "similarity": ("other", "same"),
    "tagging": ("O", "B-LOC"),
}


def config_of(kind: str, **task: object) -> Config:
    weights = (0.5, 2.0, 1.5)[: len(NAMES.get(kind, ()))]
    settings = {
        "kind": kind,
        "labels": NAMES.get(kind, ()),
        "label_weights": weights,
        "target_mean": 2.0,
        "target_std": 1.5,
        "head_dropout": 0.0,
    }
    base = Config(stage="finetune", model=dataclasses.replace(MODEL, context_length=CONTEXT))
    return completed(replace(base, {"task": settings | task}), BytesTokenizer.vocab_size, {})


@cache
def params_of(kind: str):
    """Weights that are far from uniform."""
    shapes = nn.unbox(jax.eval_shape(TaskModel(config_of(kind)).init, RNG))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), shapes)


def rows_of(kind: str, count: int = ROWS) -> list[Row]:
    return [Row(fields, f"row {i}") for i, fields in enumerate(records(kind, count))]


def encoded(kind: str, rows: list[Row]):
    return encode(rows, config_of(kind).task, NAMES.get(kind, ()), BytesTokenizer(), CONTEXT)


def batch_of(kind: str, rows: list[Row], size: int = ROWS) -> dict[str, np.ndarray]:
    """The rows in their order, and batch padding."""
    buckets = Buckets(encoded(kind, rows), context_length=CONTEXT, batch_size=size, microbatch_size=size, seed=None)
    batch = next(buckets.microbatches(0, range(size), 1)).arrays
    order = np.argsort(np.where(batch["examples"] < 0, size, batch["examples"]), kind="stable")
    return {name: array[order] for name, array in batch.items()}


def widened(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch in the next larger bucket."""
    length = batch["tokens"].shape[-1]

    def wide(name: str, array: np.ndarray) -> np.ndarray:
        if array.shape[-1] != length:
            return array
        behind = [(0, 0)] * (array.ndim - 1) + [(0, CONTEXT - length)]
        return np.pad(array, behind, constant_values=0 if name == "tokens" else -1)

    return {name: wide(name, array) for name, array in batch.items()}


@partial(jax.jit, static_argnums=0)
def compute(config: Config, params, batch):
    """Loss, weight, gradient (of some kinds) and predictions, in one program."""
    model = TaskModel(config)

    def loss_of(params):
        loss, weight, _ = model.loss(params, batch, RNG)
        return loss, weight

    if config.task.kind in GRADIENTS:
        (loss, weight), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    else:
        (loss, weight), gradient = loss_of(params), None
    return loss, weight, gradient, model.predict(params, batch)


def close(actual, expected, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_rows_that_fill_up_change_nothing(kind):
    config, params, rows = config_of(kind), params_of(kind), rows_of(kind)
    narrow = compute(config, params, batch_of(kind, rows))
    wide = compute(config, params, widened(batch_of(kind, rows, size=8)))
    assert wide[3]["examples"].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    close(wide[:3], narrow[:3])
    for name, values in narrow[3].items():
        others = wide[3][name][:ROWS]
        if values.ndim > 1 and values.shape[1] == 32:  # of positions: those that are no padding
            ends = batch_of(kind, rows)["ends"]
            for row, end in enumerate(ends):
                close(others[row, : end + 1], values[row, : end + 1])
        else:
            close(others, values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_does_not_depend_on_the_batch(kind):
    config, params, rows = config_of(kind), params_of(kind), rows_of(kind, 9)
    first = compute(config, params, batch_of(kind, rows[:ROWS]))[3]
    second = compute(config, params, batch_of(kind, [*rows[5:9], rows[2]]))[3]
    end = int(np.max(batch_of(kind, rows[:ROWS])["ends"][2]))
    for name in first.keys() - {"examples"}:
        one, other = first[name][2], second[name][4]
        close(other[: end + 1] if one.shape == (32,) else other, one[: end + 1] if one.shape == (32,) else one)


@pytest.mark.parametrize("kind", ["tagging", "question_answering", "multiple_choice"])
def test_bidirectional_attention_sees_the_whole_text_and_no_padding(kind):
    params, batch = params_of(kind), batch_of(kind, rows_of(kind))
    causal, bidirectional = (
        jax.jit(TaskModel(config_of(kind, bidirectional=both, lm_weight=0.0))._outputs) for both in (False, True)
    )
    tokens = batch["tokens"].reshape(-1, 32)
    ends = batch["ends"].reshape(-1)
    changed = tokens.copy()
    changed[np.arange(len(ends)), ends - 1] = 65  # the last token of the text
    for outputs, moved in ((causal, False), (bidirectional, True)):
        x_NTD = outputs(params, batch, None)[0]
        x_other_NTD = outputs(params, batch | {"tokens": changed.reshape(batch["tokens"].shape)}, None)[0]
        assert np.any(np.abs(x_NTD[:, 0] - x_other_NTD[:, 0]) > 1e-3) == moved
        x_wide_NTD = outputs(params, widened(batch), None)[0]
        for n, end in enumerate(ends):
            close(x_wide_NTD[n, : end + 1], x_NTD[n, : end + 1])


@jax.jit
def hidden_and_logits(params, tokens_NT):
    model = GPT(config_of("classification").model)
    given = {"params": {name: part for name, part in params.items() if name != "head"}}
    return model.apply(given, tokens_NT, method="hidden"), model.apply(given, tokens_NT)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def task_loss_by_hand(kind: str, example, states: list[np.ndarray], head) -> tuple[float, float]:
    """The loss of one example times its weight, and its weight; `states` are those of its sequences, (T, D)."""
    kernel, bias = (np.asarray(head["linear"][name], np.float64) for name in ("kernel", "bias"))
    weights, targets = config_of(kind).task.label_weights, example.targets
    if kind == "tagging":
        nats_TX = -log_softmax(states[0] @ kernel + bias)
        told = [(position, label) for position, label in enumerate(targets["labels"]) if label >= 0]
        return sum(weights[k] * nats_TX[t, k] for t, k in told), sum(weights[k] for _, k in told)
    if kind == "question_answering":
        nats_2T = -log_softmax((states[0] @ kernel + bias).T)
        return (nats_2T[0, targets["starts"]] + nats_2T[1, targets["stops"]]) / 2, 1.0
    pooled = [state[-1] for state in states]  # at extract
    if kind == "multiple_choice":
        logits_O = np.array([(state @ kernel + bias)[0] for state in pooled])
        return -log_softmax(logits_O)[targets["labels"]], 1.0
    output = sum(pooled) @ kernel + bias  # of the two orders of similarity and regression, or of the one text
    if kind == "regression":
        return float((output[0] - (targets["labels"] - 2.0) / 1.5) ** 2), 1.0
    label = targets["labels"]
    return weights[label] * -log_softmax(output)[label], weights[label]


def language_loss_by_hand(example, logits: list[np.ndarray]) -> float:
    """Nats per token, averaged over the sequences."""
    each = []
    for tokens_T, logits_TV in zip(example.sequences, logits, strict=True):
        nats_TV = -log_softmax(logits_TV)
        each.append(np.mean([nats_TV[t, tokens_T[t + 1]] for t in range(len(tokens_T) - 1)]))
    return float(np.mean(each))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_tasks_and_half_the_language_models(kind):
    config, params, rows = config_of(kind), params_of(kind), rows_of(kind)
    total, weights = 0.0, 0.0
    for example in encoded(kind, rows):
        tokens_NT = np.zeros((3, 32), np.int32)
        for i, tokens_T in enumerate(example.sequences):
            tokens_NT[i, : len(tokens_T)] = tokens_T
        states, logits = (
            [np.asarray(array, np.float64)[i, : len(t)] for i, t in enumerate(example.sequences)]
            for array in hidden_and_logits({k: v for k, v in params.items() if k != "head"}, tokens_NT)
        )
        loss, weight = task_loss_by_hand(kind, example, states, params["head"])
        total += loss + 0.5 * weight * language_loss_by_hand(example, logits)
        weights += weight
    found = compute(config, params, batch_of(kind, rows))
    assert config.task.lm_weight == 0.5
    assert float(found[1]) == pytest.approx(weights, rel=1e-6)
    assert float(found[0]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["similarity", "regression"])
def test_two_texts_have_no_order(kind):
    config, params, rows = config_of(kind), params_of(kind), rows_of(kind)
    swapped = [
        dataclasses.replace(row, fields=row.fields | {"first": row.fields["second"], "second": row.fields["first"]})
        for row in rows
    ]
    here, there = (compute(config, params, batch_of(kind, each)) for each in (rows, swapped))
    close(there, here)


def test_choices_have_no_order():
    config, params, rows = config_of("multiple_choice"), params_of("multiple_choice"), rows_of("multiple_choice")
    order = [2, 0, 1]

    def reordered(fields: dict) -> dict:
        choices = [fields["choices"][i] for i in order]
        return fields | {"choices": choices, "label": order.index(fields["label"])}

    others = [dataclasses.replace(row, fields=reordered(row.fields)) for row in rows]
    here, there = (compute(config, params, batch_of("multiple_choice", each)) for each in (rows, others))
    close(there[:3], here[:3])
    assert np.ptp(here[3]["probabilities"]) > 0.01
    close(there[3]["probabilities"], here[3]["probabilities"][:, jnp.array(order)])


def test_predictions_are_probabilities_and_values_in_their_own_units():
    for kind in ("classification", "multiple_choice"):
        found = compute(config_of(kind), params_of(kind), batch_of(kind, rows_of(kind)))[3]
        np.testing.assert_allclose(found["probabilities"].sum(axis=-1), 1, rtol=1e-6)
    batch = batch_of("regression", rows_of("regression"))
    found = compute(config_of("regression"), params_of("regression"), batch)[3]
    np.testing.assert_allclose(found["losses"], ((found["values"] - batch["labels"]) / 1.5) ** 2, rtol=1e-4)


def test_rows_without_labels_get_the_same_predictions():
    batch = batch_of("classification", rows_of("classification"))
    config, params = config_of("classification"), params_of("classification")
    unlabelled = {name: array for name, array in batch.items() if name != "labels"}
    found = jax.jit(TaskModel(config).predict)(params, unlabelled)
    assert found.keys() == {"examples", "probabilities"}
    close(found["probabilities"], compute(config, params, batch)[3]["probabilities"])


def test_evaluation_is_the_tasks_loss_alone():
    config, params = config_of("tagging"), params_of("tagging")
    batch = batch_of("tagging", rows_of("tagging"))
    loss, weight, _ = jax.jit(lambda params, batch: TaskModel(config).loss(params, batch, None))(params, batch)
    found = compute(config, params, batch)
    assert float(loss) == pytest.approx(float(found[3]["losses"].sum()), rel=1e-6)
    assert float(weight) == pytest.approx(float(found[3]["counts"].sum()), rel=1e-6)
    assert float(loss) < float(found[0])


def test_microbatches_are_one_batch():
    """Rows of different weights, one of them batch padding: the mean is weighted, not over rows."""
    config = replace(
        config_of("tagging"), {"optimizer": {"eps": 1e-3}, "batch": {"tokens_per_batch": 8 * CONTEXT, "epochs": 1.0}}
    )
    objective, mesh = registry.objective(config), make_mesh(config.mesh)
    rows = rows_of("tagging", 7)
    rows[1] = Row({"tokens": ["in", "Rome", "it", "is", "so"], "tags": ["O", "B-LOC", "O", "O", "O"]}, "long")
    batch = batch_of("tagging", rows, size=8)
    train_step, results = make_train_step(objective, state_shardings(objective.parameters, mesh)), []
    for microbatches in (1, 2):
        cut = {name: array.reshape(microbatches, -1, *array.shape[1:]) for name, array in batch.items()}
        with jax.set_mesh(mesh):
            state = create_state(objective.parameters, mesh)
            state, metrics = train_step(state, cut, np.int32(microbatches), {"lr": np.float32(1e-2)})
        results.append(jax.device_get((metrics, state.params)))
    close(results[1], results[0], atol=1e-6)

"""Fine-tuned runs as classes of transformers with a head, and in PEFT's format: labels, special tokens, predictions."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.interop import safetensors_files
from gptjax.interop.adapters import export_adapter
from gptjax.interop.huggingface import export_workdir
from gptjax.models.gpt import GPT, hidden_states
from gptjax.run import run
from gptjax.stages.trained_model import load_model
from tests import tiny_chats
from tests.tiny_tasks import LABELS, MODEL, run_config, save_classifier, save_pretrained, with_method

POST = dataclasses.replace(MODEL, norm_position="post")
NEO = dataclasses.replace(
    MODEL, attention_pattern=("dense", "banded"), band_width=5, scale_attention=False, qkv_bias=False
)
FAMILIES = {"gpt2": MODEL, "gpt_neo": NEO, "openai-gpt": POST}
BLANK, EXTRACT = 257 + 3, 257 + 2


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Workdirs of runs of two steps by kind, family and method; read-only. `given` is next to each."""

    @cache
    def workdir(kind: str, family: str = "gpt2", method: str = "none") -> Path:
        directory, settings = tmp_path_factory.mktemp(kind), FAMILIES[family]
        given = save_pretrained(directory / "given", settings=settings)
        config = dataclasses.replace(run_config(directory, kind, given), model=settings)
        if kind == "regression":
            rows = [{"first": f"{word} {i}", "label": 2.5 * i + 1} for i in range(8) for word in ("a", "bb")]
            (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            source = f"jsonl:{directory}/rows.jsonl"
            config = c.replace(config, {"data": {"source": source, "validation_source": source}})
        # The bias of the head moves far enough to be seen.
        run(with_method(c.replace(config, {"optimizer": {"peak_lr": 0.1}}), method), directory / "run")
        return directory / "run"

    return workdir


def texts_of(kind: str) -> list:
    """What a tokenizer of transformers is called with, by rows: a text, or a pair of texts."""
    if kind == "entailment":
        return [("so it is", "a good"), ("no", "a bad one")]
    if kind == "question_answering":
        return [("where?", "at 0101 it is"), ("who?", "it is a b")]
    return ["good 01", "it is a bad 0202 day"]


def our_outputs(workdir: Path, kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outputs of the head at all positions, float32 (N, T, K), of sequences padded by the blank; and the sequences."""
    model = load_model(workdir, best=True)
    special = model.tokenizer.vocab_size + np.arange(4)
    sequences = []
    for text in texts_of(kind):
        first, *rest = [text] if isinstance(text, str) else text
        parts = [special[:1], model.tokenizer.encode(first)]
        parts += [part for second in rest for part in (special[1:2], model.tokenizer.encode(second))]
        sequences.append(np.concatenate([*parts, special[2:3]]))
    tokens_NT = np.full((len(sequences), max(map(len, sequences))), special[3])
    for row, sequence in enumerate(sequences):
        tokens_NT[row, : len(sequence)] = sequence
    x_NTD = np.asarray(hidden_states(GPT(model.config.model), model.params, tokens_NT))
    linear = jax.tree.map(np.asarray, model.head["linear"])
    outputs_NTK = x_NTD @ linear["kernel"] + linear["bias"]
    task = model.config.task
    return outputs_NTK * task.target_std + task.target_mean if kind == "regression" else outputs_NTK, sequences


def read(directory: Path) -> tuple[dict, dict, dict[str, np.ndarray]]:
    config, settings = (json.loads((directory / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    headers = safetensors_files.read_headers(directory)
    return config, settings, {name: safetensors_files.read(tensor) for name, tensor in headers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_an_export_has_head_labels_and_special_tokens(kind, trained, tmp_path):
    workdir = trained(kind)
    export_workdir(workdir, tmp_path / "out")
    config, settings, tensors = read(tmp_path / "out")
    labels = list(LABELS) if kind == "classification" else ["B-LOC", "O"]
    assert [config["id2label"][str(i)] for i in range(len(labels))] == labels
    assert config["label2id"] == {label: i for i, label in enumerate(labels)}
    assert (config["pad_token_id"], config["eos_token_id"], config["vocab_size"]) == (BLANK, EXTRACT, 261)
    assert tensors["transformer.wte.weight"].shape == (261, 16)
    assert not any("lm_head" in name for name in tensors)
    linear = jax.tree.map(np.asarray, load_model(workdir, best=True).head["linear"])
    if kind == "classification":
        assert config["architectures"] == ["GPT2ForSequenceClassification"]
        assert config["problem_type"] == "single_label_classification"
        np.testing.assert_array_equal(tensors["score.weight"], linear["kernel"].T)
        assert "score.bias" not in tensors
    else:
        assert config["architectures"] == ["GPT2ForTokenClassification"]
        np.testing.assert_array_equal(tensors["classifier.weight"], linear["kernel"].T)
        np.testing.assert_array_equal(tensors["classifier.bias"], linear["bias"])
    assert (settings["pad_token"], settings["sep_token"]) == ("<|blank|>", "<|delimiter|>")
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode("ab").ids == [257, 97, 98, 259]
    assert written.encode("a", "b").ids == [257, 97, 258, 98, 259]


def test_the_bias_of_a_score_is_in_the_last_layer_norm(tmp_path):
    """Weight and layer norm give what weight, bias and layer norm gave."""
    for family, settings in FAMILIES.items():
        config = dataclasses.replace(run_config(tmp_path, "classification", None), model=settings)
        workdir = save_classifier(tmp_path / f"run-{family}", config)
        export_workdir(workdir, tmp_path / family)
        tensors = read(tmp_path / family)[2]
        model = load_model(workdir, best=True)
        linear = jax.tree.map(np.asarray, model.head["linear"])
        assert np.abs(linear["bias"]).max() > 0.05
        norm = model.params["layers"]["block_0"]["mlp_norm"] if family == "openai-gpt" else model.params["final_norm"]
        name = "h.1.ln_2.bias" if family == "openai-gpt" else "ln_f.bias"
        before_D, after_D = np.asarray(norm["bias"]).reshape(-1, 16)[-1], tensors[f"transformer.{name}"]
        np.testing.assert_allclose(
            tensors["score.weight"] @ after_D, linear["kernel"].T @ before_D + linear["bias"], atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "family", "words"),
    [
        ("similarity", "gpt2", "reads the sum of the hidden states of both orders"),
        ("multiple_choice", "gpt2", "scores each choice by itself"),
        ("regression", "gpt2", "this regression reads the sum"),
        ("tagging", "openai-gpt", "transformers has no OpenAIGPTForTokenClassification"),
    ],
)
def test_heads_that_transformers_has_no_class_for(kind, family, words, pretrained, tmp_path):
    """Found from the config, before a checkpoint is opened."""
    config = dataclasses.replace(run_config(tmp_path, kind, pretrained), model=FAMILIES[family])
    (workdir := tmp_path / "run").mkdir()
    (workdir / "config.json").write_text(c.to_json(config))
    decided = {"labels": [], "label_weights": [], "target_mean": None, "target_std": None}
    (workdir / "task.json").write_text(json.dumps(decided))
    BytesTokenizer().save(workdir / "tokenizer")
    if kind == "regression":
        with pytest.raises(
            UserError, match=r"cannot determine from .*predictions\.jsonl whether .* finish the training run first"
        ):
            export_workdir(workdir, tmp_path / "out")
        (workdir / "predictions.jsonl").write_text(json.dumps({"first": "a", "second": "b"}) + "\n")
    for export in (export_workdir, export_adapter):
        lora = export is export_adapter
        (workdir / "config.json").write_text(c.to_json(with_method(config, "lora" if lora else "none")))
        with pytest.raises(UserError, match=words) as error:
            export(workdir, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_reward_model_and_adapters_are_refused(trained, tmp_path):
    config = tiny_chats.config_of("reward", tmp_path, None)
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text(c.to_json(config))
    BytesTokenizer().save(tmp_path / "reward" / "tokenizer")
    with pytest.raises(UserError, match="is of stage reward: its score is read at the token that ends a turn"):
        export_workdir(tmp_path / "reward", tmp_path / "out")
    workdir = trained("classification", method="adapters")
    with pytest.raises(UserError, match=r"no Hugging Face family has model\.adapter_dim=3"):
        export_workdir(workdir, tmp_path / "out")
    with pytest.raises(UserError, match="PEFT's files are for lora: transformers has no such layers"):
        export_adapter(workdir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_linearly_dependent_are_refused():
    """No bias of the layer norm moves two outputs of the same weights apart."""
    from gptjax.interop.task_heads import _folded

    weight_KD = np.ones((2, 4))
    with pytest.raises(UserError, match="weights of the outputs are linearly dependent"):
        _folded(weight_KD.astype(np.float32), weight_KD, np.array([0.0, 1.0]), np.zeros(4, np.float32))
    np.testing.assert_allclose(
        weight_KD @ _folded(weight_KD.astype(np.float32), weight_KD, np.array([1.0, 1.0]), np.zeros(4, np.float32)), 1.0
    )


@pytest.mark.slow
def test_the_files_of_a_peft_export(trained, tmp_path):
    workdir = trained("classification", method="lora")
    export_adapter(workdir, tmp_path / "out")
    theirs = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert theirs["task_type"] == "SEQ_CLS"
    assert theirs["modules_to_save"] == ["transformer.wte", "score", "transformer.ln_f"]
    tensors = safetensors_files.read_header(tmp_path / "out" / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model.model."): tensor.shape for name, tensor in tensors.items()}
    assert shapes["score.weight"] == (3, 16)
    assert shapes["transformer.wte.weight"] == (261, 16)
    assert shapes["transformer.ln_f.bias"] == shapes["transformer.ln_f.weight"] == (16,)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert list(config["label2id"]) == list(LABELS)
    assert (tmp_path / "out" / "tokenizer.json").exists()


# --- against transformers and PEFT ------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def their_outputs(torch, model, tokenizer, kind: str) -> tuple[np.ndarray, list[list[int]]]:
    texts = texts_of(kind)
    pairs = [texts] if isinstance(texts[0], str) else [[first for first, _ in texts], [second for _, second in texts]]
    encoded = tokenizer(*pairs, padding=True, return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        found = model.eval()(**encoded)
    logits = torch.stack([found.start_logits, found.end_logits], -1) if kind == "question_answering" else found.logits
    ids = [row[mask.bool()].tolist() for row, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)]
    return logits.numpy(), ids


def assert_equal_outputs(torch, model, tokenizer, workdir: Path, kind: str) -> None:
    theirs, ids = their_outputs(torch, model, tokenizer, kind)
    ours_NTK, sequences = our_outputs(workdir, kind)
    assert ids == [sequence.tolist() for sequence in sequences]
    if theirs.ndim == 2:
        ours_NTK = np.stack([row_TK[len(ids) - 1] for row_TK, ids in zip(ours_NTK, sequences, strict=True)])
        np.testing.assert_allclose(theirs, ours_NTK, atol=1e-4)
        return
    for got_TK, expected_TK, sequence in zip(theirs, ours_NTK, sequences, strict=True):
        np.testing.assert_allclose(got_TK[: len(sequence)], expected_TK[: len(sequence)], atol=1e-4)


KINDS = [
    *((kind, "gpt2") for kind in ("classification", "entailment", "regression", "tagging", "question_answering")),
    *((kind, "gpt_neo") for kind in ("classification", "tagging")),
    ("classification", "openai-gpt"),
]
THEIR_WARNINGS = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]


class TestAgainstTransformers:
    pytestmark = THEIR_WARNINGS

    @pytest.mark.parametrize(("kind", "family"), KINDS)
    def test_equal_outputs(self, kind, family, torch, trained, tmp_path):
        import transformers

        workdir = trained(kind, family)
        export_workdir(workdir, tmp_path / "out")
        name = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
        model, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert_equal_outputs(torch, model, tokenizer, workdir, kind)

    @pytest.mark.parametrize(("kind", "family"), [KINDS[i] for i in (0, 3, 5, 7)])
    def test_equal_outputs_by_peft(self, kind, family, torch, trained, tmp_path):
        import transformers

        library = pytest.importorskip("peft")
        workdir = trained(kind, family, "lora")
        export_workdir(workdir.parent / "given", tmp_path / "base")
        export_adapter(workdir, tmp_path / "out")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        base = getattr(transformers, config.architectures[0]).from_pretrained(
            tmp_path / "base", id2label=config.id2label, label2id=config.label2id, pad_token_id=config.pad_token_id
        )
        base.resize_token_embeddings(config.vocab_size)
        model = library.PeftModel.from_pretrained(base, tmp_path / "out")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert_equal_outputs(torch, model, tokenizer, workdir, kind)

    def test_a_chat_of_peft_has_its_special_tokens(self, torch, tmp_path):
        import transformers

        library = pytest.importorskip("peft")
        given = save_pretrained(tmp_path / "given")
        config = tiny_chats.config_of("sft", tmp_path, given)
        run(with_method(dataclasses.replace(config, peft=c.PeftConfig(rank=2)), "lora"), tmp_path / "run")
        export_workdir(given, tmp_path / "base")
        export_adapter(tmp_path / "run", tmp_path / "out")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(259)
        model = library.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "q1"}], tokenize=True, return_dict=False)
        assert ids == [256, *b"q1", 257]
        ours = load_model(tmp_path / "run")
        expected_BTV = np.asarray(ours.model.apply({"params": ours.params}, np.array([[*ids, 97, 258]])))
        with torch.no_grad():
            theirs_BTV = model(torch.tensor([[*ids, 97, 258]])).logits.numpy()
        assert np.abs(np.asarray(ours.params["token_embedding"]["embedding"])[257:]).max() > 0.01
        np.testing.assert_allclose(theirs_BTV, expected_BTV, atol=1e-4)

    def test_a_pipeline_says_what_predict_says(self, torch, trained, tmp_path):
        import transformers

        workdir = trained("classification")
        export_workdir(workdir, tmp_path / "out")
        classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
        trained_model = load_model(workdir, best=True)
        ours_NTK, sequences = our_outputs(workdir, "classification")
        for text, row_TK, sequence in zip(texts_of("classification"), ours_NTK, sequences, strict=True):
            logits_K = row_TK[len(sequence) - 1]
            probs_K = np.exp(logits_K - logits_K.max()) / np.exp(logits_K - logits_K.max()).sum()
            found = {one["label"]: one["score"] for one in classify([text])[0]}
            expected = dict(zip(trained_model.config.task.labels, probs_K.tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-4)

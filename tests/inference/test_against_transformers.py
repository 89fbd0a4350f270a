"""The same tokens as transformers, by greedy decoding and by beam search; the same filters. Skipped without torch."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.beam import beam_search
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling, candidates, penalise
from gptjax.interop.huggingface import load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # quicker for models this small

VOCABULARY, NEW = 97, 200
ODD = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_positions=256, n_embd=36, n_layer=3, n_head=3, n_inner=50, initializer_range=0.4, **ODD
        )
    ),
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            max_position_embeddings=256,
            hidden_size=20,
            num_layers=4,
            num_heads=5,
            attention_types=[[["global", "local"], 2]],
            window_size=7,
            initializer_range=0.4,
            **ODD,
        )
    ),
    "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(n_positions=256, n_embd=28, n_layer=2, n_head=4, initializer_range=0.4, **ODD)
    ),
}


@dataclasses.dataclass
class Pair:
    """One model, theirs and ours."""

    theirs: Any
    engine: Engine

    def generate(self, prompts: list[np.ndarray], max_new_tokens: int, **settings: Any) -> Any:
        """Their generation: prompts padded in front, the padding masked, positions counted without it."""
        longest = max(map(len, prompts))
        tokens_BT, mask_BT = np.zeros((2, len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, longest - len(prompt) :] = prompt
            mask_BT[row, longest - len(prompt) :] = 1
        output = self.theirs.generate(
            input_ids=torch.tensor(tokens_BT),
            attention_mask=torch.tensor(mask_BT),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            **settings,
        )
        return output, output.sequences[:, longest:].tolist()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> Pair:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("model")
    theirs = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # else 0
            if "wpe" in name or "positions_embed" in name:
                parameter.normal_()  # so that texts do not run into a circle
    theirs.save_pretrained(directory)
    return Pair(theirs, Engine(*load_pretrained(directory), BytesTokenizer()))


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length) for length in (1, 40, 13)]


def test_greedy_decoding_gives_the_same_tokens(pair, prompts):
    _, expected = pair.generate(prompts, NEW)
    ours = pair.engine.generate(prompts, NEW, Sampling(temperature=0), ignore_end_of_text=True)
    assert [completion.tokens.tolist() for completion in ours] == expected
    assert min(len(set(tokens)) for tokens in expected) > 5, "texts that repeat themselves show little"


def test_beam_search_gives_the_same_beams(pair, prompts, monkeypatch):
    beams, new = 4, 24
    _, free = pair.generate(prompts, new, num_beams=beams)
    endings = set()
    rules = [(1.0, False), (1.0, True), (2.0, "never"), (-0.5, False), (0.0, "never")]
    ends = [(), (free[0][3],), (free[1][9],), (free[0][5], free[1][2], free[2][7])]
    for ending, (penalty, early) in itertools.product(ends, rules):
        settings = {"length_penalty": penalty, "early_stopping": early}
        output, sequences = pair.generate(
            prompts,
            new,
            num_beams=beams,
            num_return_sequences=3,
            eos_token_id=list(ending) or None,
            output_scores=True,
            **settings,
        )
        monkeypatch.setattr(pair.engine.tokenizer, "end_of_text", ending[0] if ending else None)
        monkeypatch.setattr(pair.engine.tokenizer, "_ends", ending)
        ours = beam_search(pair.engine, prompts, new, num_beams=beams, num_return=3, **settings)
        found = [beam for of_prompt in ours for beam in of_prompt]
        for sequence, score, beam in zip(sequences, output.sequences_scores.tolist(), found, strict=True):
            length = next((i for i, token in enumerate(sequence) if token in ending), len(sequence))
            expected = sequence[:length]
            assert beam.completion.tokens.tolist() == expected
            assert beam.score == pytest.approx(score, rel=1e-4)
            endings.add(beam.completion.finish_reason)
    assert endings == {"end_of_text", "length"}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=7),
        Sampling(top_p=0.7),
        Sampling(min_p=0.1),
        Sampling(temperature=0.6, top_k=30, top_p=0.8, min_p=0.02, repetition_penalty=1.4),
    ],
    ids=str,
)
def test_the_filters_are_the_same(sampling):
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(scale=2, size=(16, VOCABULARY)).astype(np.float32)
    seen_BT = rng.integers(0, VOCABULARY, (16, 20))
    named = {
        field: value
        for field in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        if (value := getattr(sampling, field)) is not None
    }
    model = MODELS["gpt2"]()
    # Their own list, in their own order.
    processors = model._get_logits_processor(
        transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **named}), input_ids_seq_length=20
    )
    theirs_BV = processors(torch.tensor(seen_BT), torch.tensor(logits_BV)).numpy()

    if sampling.repetition_penalty is not None:
        seen_BV = np.zeros(logits_BV.shape, bool)
        np.put_along_axis(seen_BV, seen_BT, True, axis=1)
        logits_BV = penalise(logits_BV, seen_BV, np.float32(sampling.repetition_penalty))
    logits_BC, token_BC = candidates(jnp.asarray(logits_BV), sampling.static, sampling.values)
    ours_BV = np.full(theirs_BV.shape, -np.inf, np.float32)
    tokens_BC = np.broadcast_to(np.arange(VOCABULARY), ours_BV.shape) if token_BC is None else np.asarray(token_BC)
    np.put_along_axis(ours_BV, tokens_BC, np.asarray(logits_BC), axis=1)
    assert 0 < np.isfinite(ours_BV).sum() < ours_BV.size
    # Ours are shifted so that the largest is 0, which changes no probability.
    np.testing.assert_allclose(ours_BV, theirs_BV - theirs_BV.max(axis=-1, keepdims=True), rtol=1e-5, atol=1e-5)

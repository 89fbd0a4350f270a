"""Other clients, unmodified: langchain-openai, schemathesis and lm-evaluation-harness. Run by `make clients`."""

import jax
import pytest

from gptjax.config import MeshConfig
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.scoring import Scorer, encode_pair
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from tests.tiny_servers import CONFIG, LIMIT, tiny_params


def test_langchain(server):
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", max_completion_tokens=8, seed=1, stream_usage=True
    )
    whole = model.invoke("Hi")
    streamed = list(model.stream("Hi"))
    assert "".join(chunk.content for chunk in streamed) == whole.content
    assert whole.usage_metadata["output_tokens"] == 8
    schema = {
        "title": "answer",
        "type": "object",
        "properties": {"good": {"type": "boolean"}},
        "required": ["good"],
        "additionalProperties": False,
    }
    for method in ("json_schema", "function_calling"):
        model = openai.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="none", seed=2)
        found = model.with_structured_output(schema, method=method, strict=True).invoke("Hi")
        assert isinstance(found["good"], bool)


@pytest.mark.filterwarnings("ignore")
def test_schemathesis(server):
    """Requests made from the OpenAPI file, valid and invalid: no 5xx, and only documented answers."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, settings
    from schemathesis import checks as names

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # Valid by its schema alone, a request may still name a model that does not exist.
    excluded = [names.positive_data_acceptance] if hasattr(names, "positive_data_acceptance") else []

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case):
        if isinstance(case.body, dict) and case.body.get("model") is not None:
            case.body["model"] = "tiny"
        case.call_and_validate(excluded_checks=excluded, timeout=LIMIT)

    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path not in ("/metrics", "/docs"):
            operation.as_strategy().map(lambda case: case)
            from hypothesis import given

            given(operation.as_strategy())(check)()
    assert server.chat()["choices"]


def test_lm_eval_scores_are_those_of_the_model(server):
    """The log-likelihoods that lm-eval computes through /v1/completions, which finds the server's tokenizer itself."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(model="tiny", base_url=f"{server.url}/v1/completions", max_length=256)
    pairs = [("The cat", " sat"), ("One two", " three four")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(requests)
    tokenizer = BytesTokenizer()
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        scorer = Scorer(GPT(CONFIG), tiny_params(), mesh, 2)
        scores = scorer.scores([encode_pair(tokenizer, *pair) for pair in pairs])
    assert [logprob for logprob, _ in found] == pytest.approx([score.logprob for score in scores], abs=1e-3)
    assert [bool(is_greedy) for _, is_greedy in found] == [score.is_greedy for score in scores]

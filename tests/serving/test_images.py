"""Images in requests: read as the engine reads them, and refused where they cannot be."""

import base64
import dataclasses
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from gptjax.config import DataConfig, VisionConfig
from gptjax.data.conversation_forms import Message
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import ImageReference
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.requests import GenerationRequest
from gptjax.inference.sampling import Sampling
from tests.tiny_servers import CONFIG, RunningServer, running, tiny_params

VISION = VisionConfig(encoder="patches", image_size=8, patch_size=4, projector="linear", image_token=263)
READS_IMAGES = dataclasses.replace(CONFIG, vision=VISION)
TEXT = {"type": "text", "text": "What?"}


def url(seed: int) -> str:
    """A random image as a data: URL."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def part(source: str) -> dict:
    return {"type": "image_url", "image_url": {"url": source}}


def user(*content: dict) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


@pytest.fixture(scope="module")
def reader() -> Iterator[RunningServer]:
    """A server of a model that reads images."""
    with running(config=READS_IMAGES) as found:
        yield found


def test_an_answer_is_about_its_images(reader):
    def answer(*content: dict) -> tuple[float, ...]:
        found = reader.chat(messages=user(*content), temperature=0, max_tokens=8, logprobs=True)
        return tuple(token["logprob"] for token in found["choices"][0]["logprobs"]["content"])

    one, other = part(url(1)), part(url(2))
    assert answer(one, TEXT) == answer(one, TEXT)
    assert len({answer(one, TEXT), answer(other, TEXT), answer(one, other, TEXT), answer(other, one, TEXT)}) == 4


def test_the_tokens_are_those_of_the_engine(reader):
    source = url(3)
    model = reader.serving.models.generative("tiny")
    message = Message("user", "<image>What?", images=(ImageReference(source),))
    prompt = tuple(model.chat_form.encode_prompt_with_images([message]).tokens.tolist())
    image_X = ImageFiles(VISION, DataConfig()).read(ImageReference(source))
    assert image_X is not None
    engine = BatchedEngine(reader.engine.model, tiny_params(READS_IMAGES), BytesTokenizer(), deterministic=True, rows=4)
    engine.insert(GenerationRequest(prompt, 12, Sampling(temperature=0), images=(image_X,)))
    logprobs = []
    while not engine.is_idle:
        logprobs += [event.logprob for event in engine.step()]
    answer = reader.chat(messages=user(part(source), TEXT), temperature=0, max_tokens=12, logprobs=True)
    found = [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
    assert found == pytest.approx(logprobs[: len(found)], abs=1e-6)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_responses_and_tokenize_read_the_same_images(reader):
    content = [{"type": "input_image", "image_url": url(1)}, {"type": "input_text", "text": "What?"}]
    response = reader.post(
        "/v1/responses", input=[{"role": "user", "content": content}], temperature=0, max_output_tokens=24, seed=1
    )
    assert response.status_code == 200, response.text
    messages = user(part(url(1)), TEXT)
    chat = reader.chat(messages=messages, temperature=0, max_tokens=24)
    assert response.json()["output"][-1]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    tokens = reader.post("/tokenize", messages=messages).json()["tokens"]
    assert tokens.count(263) == VISION.tokens_per_image
    assert len(tokens) == chat["usage"]["prompt_tokens"]


def test_the_list_of_models_says_which_read_images(reader, server):
    for found, reads in ((reader, True), (server, False)):
        with found.client() as client:
            assert client.get("/v1/models").json()["data"][0]["images"] is reads


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (user(part("https://example.com/cat.png"), TEXT), "fetches no images"),
        (user(part("/etc/passwd"), TEXT), "fetches no images"),
        (user(part("digits:3"), TEXT), "fetches no images"),
        (user(part("data:image/png;base64,!!!"), TEXT), "not a data: URL in base64"),
        (user(part("data:image/png;base64,aGVsbG8="), TEXT), "is not an image"),
        (user(part(url(1)[:-60]), TEXT), "damaged"),
        (user(part(url(1)), {"type": "text", "text": "<image>"}), "contains <image>"),
        ([{"role": "user", "content": "a <image>"}], "1 <image> for 0 images"),
        ([{"role": "system", "content": [part(url(1))]}, *user(TEXT)], "messages[0]"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused(reader, messages, message):
    response = reader.post("/v1/chat/completions", messages=messages)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


def test_a_model_of_text_refuses_images(server):
    response = server.post("/v1/chat/completions", messages=user(TEXT, part(url(1))))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages[0].content[1]"
    assert "this model reads text alone" in error["message"]

"""OpenAI's own client for Python, unmodified."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

MESSAGES = [{"role": "user", "content": "Hi"}]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    good: bool
    grade: Literal["a", "b"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_chat(client):
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=6, logprobs=True, top_logprobs=2, seed=1, n=2
    )
    assert len(found.choices) == 2
    assert found.choices[0].finish_reason == "length"
    assert len(found.choices[0].logprobs.content) == 6
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12


def test_the_helper_for_streams_joins_the_chunks(client):
    settings = {"model": "tiny", "messages": MESSAGES, "seed": 1}
    body = {"structured_outputs": {"regex": "[a-z]{4,12}"}}
    whole = client.chat.completions.create(**settings, extra_body=body)
    with client.chat.completions.stream(**settings, extra_body=body) as stream:
        for _ in stream:
            pass
        found = stream.get_final_completion()
    assert found.choices[0].message.content == whole.choices[0].message.content


def test_parse(client):
    found = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Answer, seed=3)
    assert isinstance(found.choices[0].message.parsed, Answer)


def test_tools(client):
    tool = openai.pydantic_function_tool(Answer, name="judge")
    found = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=3
    )
    (call,) = found.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Answer)
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=3
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_completions_embeddings_and_models(client):
    assert client.models.list().data[0].id == "tiny"
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2, echo=True).choices[0].text.startswith("a")
    embedded = client.embeddings.create(model="tiny", input=["a", "b"])  # asks for base64
    assert len(embedded.data[0].embedding) == 16


def test_tools_of_responses(client):
    tool = {"type": "function", **openai.pydantic_function_tool(Answer, name="judge")["function"]}
    settings = {"model": "tiny", "input": "Hi", "tools": [tool], "parallel_tool_calls": False}
    settings["extra_body"] = {"seed": 3}
    found = client.responses.create(**settings, tool_choice={"type": "function", "name": "judge"})
    (call,) = found.output
    assert (call.type, call.name, call.status) == ("function_call", "judge", "completed")
    Answer.model_validate_json(call.arguments)
    with client.responses.stream(**settings, tool_choice="required") as stream:
        kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in stream))
        streamed = stream.get_final_response().output[0]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert json.loads(streamed.arguments) == json.loads(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    later = client.responses.create(
        model="tiny", input=[{"role": "user", "content": "Hi"}, call, result], tools=[tool], tool_choice="none"
    )
    assert later.output[-1].type == "message"


def test_responses(client):
    whole = client.responses.create(model="tiny", input="Hi", max_output_tokens=6, extra_body={"seed": 1})
    assert whole.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(model="tiny", input="Hi", max_output_tokens=6, extra_body={"seed": 1}) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    deltas = client.responses.create(model="tiny", input="Hi", max_output_tokens=6, stream=True, extra_body={"seed": 1})
    text = "".join(event.delta for event in deltas if event.type == "response.output_text.delta")
    assert text == whole.output_text
    parsed = client.responses.parse(model="tiny", input="Hi", text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"colour": 1})
    assert found.value.param == "colour"
    assert found.value.code == "unknown_parameter"

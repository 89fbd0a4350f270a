"""JSON schemas of requests: what the server accepts, and what its OpenAPI file says, are the same objects.

A parameter that is not here is refused by name. Where OpenAI's API has a parameter that only has an effect there, such
as `store`, the values that ask for no effect are accepted.
"""

from typing import Any

Schema = dict[str, Any]

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_COMPLETIONS = 128  # n and best_of
MAX_TEXTS = 2048  # prompts or inputs of a request
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_INTEGER = 2**31 - 1


def text(description: str = "", **more: Any) -> Schema:
    return _described({"type": "string", **more}, description)


def whole(low: int, high: int, description: str = "", **more: Any) -> Schema:
    return _described({"type": "integer", "minimum": low, "maximum": high, **more}, description)


def number(low: float, high: float, description: str = "", **more: Any) -> Schema:
    return _described({"type": "number", "minimum": low, "maximum": high, **more}, description)


def flag(description: str = "", **more: Any) -> Schema:
    return _described({"type": "boolean", **more}, description)


def constant(value: Any, description: str = "") -> Schema:
    return _described({"const": value}, description)


def choice(*values: str, description: str = "") -> Schema:
    return _described({"type": "string", "enum": list(values)}, description)


def array(items: Schema, low: int, high: int, description: str = "") -> Schema:
    return _described({"type": "array", "items": items, "minItems": low, "maxItems": high}, description)


def one_of(*choices: Schema, description: str = "") -> Schema:
    return _described({"anyOf": list(choices)}, description)


def record(required: tuple[str, ...] = (), about: str = "", /, **properties: Schema) -> Schema:
    """Returns the schema of an object without other keys; properties that are not required may be null."""
    found = {name: schema if name in required else optional(schema) for name, schema in properties.items()}
    schema = {"type": "object", "properties": found, "required": list(required), "additionalProperties": False}
    return _described(schema, about)


def optional(schema: Schema) -> Schema:
    """Returns the schema with null allowed, which means the same as leaving the parameter out."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        rest = {name: value for name, value in schema.items() if name not in ("const", "type", "enum")}
        return {**rest, "enum": [*values, None]}
    return {**schema, "type": [schema["type"], "null"]}


def _described(schema: Schema, description: str) -> Schema:
    return {**schema, "description": description} if description else schema


# --- parts ------------------------------------------------------------------------------------------------------------

ANY_OBJECT: Schema = {"type": "object"}
JSON_SCHEMA: Schema = {"type": "object", "description": "JSON schema."}
NAME = text(minLength=1, maxLength=64)
MODEL = text("Name of the model.", maxLength=256)
TOKENS = array(whole(0, MAX_INTEGER), 1, 1 << 20)
TEXT_PART = record(("type", "text"), type=constant("text"), text=text())
CONTENT = one_of(text(), array(TEXT_PART, 1, MAX_MESSAGES), description="Text, or parts of type text.")
IMAGE_URL = text("The image as a data: URL in base64.", minLength=1)
IMAGE_DETAIL = choice("auto", description="Accepted; every image has the size that the model reads.")
IMAGE_PART = record(
    ("type", "image_url"),
    type=constant("image_url"),
    image_url=record(("url",), url=IMAGE_URL, detail=IMAGE_DETAIL),
)
CONTENT_WITH_IMAGES = one_of(
    text(),
    array(one_of(TEXT_PART, IMAGE_PART), 1, MAX_MESSAGES),
    description="Text, or parts of type text and image_url; images need a model that reads them.",
)

STRUCTURED_OUTPUTS = record(
    (),
    "Constrains the completion; exactly one key. The names are those of vLLM.",
    json=one_of(JSON_SCHEMA, text(), description="JSON schema that the completion satisfies."),
    regex=text("Regular expression that the completion matches, without look-around.", minLength=1, maxLength=1 << 16),
    choice=array(text(minLength=1), 1, 1024, "Texts, one of which is the completion."),
    grammar=text("Context-free grammar in llguidance's variant of Lark.", minLength=1, maxLength=1 << 18),
)
RESPONSE_FORMAT = one_of(
    record(("type",), type=constant("text")),
    record(("type",), type=constant("json_object")),
    record(
        ("type", "json_schema"),
        type=constant("json_schema"),
        json_schema=record(
            ("name",), name=NAME, description=text(), schema=JSON_SCHEMA, strict=flag("Accepted; always strict.")
        ),
    ),
    description="Form of the completion: text, any JSON object, or JSON that satisfies a schema.",
)
STREAM_OPTIONS = record(
    (),
    include_usage=flag("A last chunk with the usage of the request."),
    include_obfuscation=constant(False),
)

# Sampling, common to completions and chat completions.
SAMPLING: dict[str, Schema] = {
    "temperature": number(0, 2, "Divides the logits; 0: greedy decoding.", default=1),
    "top_p": _described({"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1}, "Nucleus sampling."),
    "top_k": whole(1, MAX_INTEGER, "Samples from the k most probable tokens."),
    "min_p": number(0, 1, "Minimum probability relative to the most probable token."),
    "repetition_penalty": _described(
        {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
        "Above 1: makes tokens of the prompt and the completion less probable.",
    ),
    "frequency_penalty": number(-2, 2, "Subtracted from a logit for each occurrence in the completion.", default=0),
    "presence_penalty": number(-2, 2, "Subtracted from the logits of tokens in the completion.", default=0),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
        "description": "Added to the logits of tokens, by token id; -100 excludes a token.",
    },
    "seed": whole(-(2**63), 2**63 - 1, "Sampling seed, modulo 2**32; by default a random one."),
    "stop": one_of(
        text(minLength=1, maxLength=1024),
        array(text(minLength=1, maxLength=1024), 0, MAX_STOPS),
        description="Texts that end a completion and are not part of it.",
    ),
    "n": whole(1, MAX_COMPLETIONS, "Completions of each prompt; their seeds are consecutive.", default=1),
    "stream": flag("Sends the completion in pieces, as server-sent events."),
    "stream_options": STREAM_OPTIONS,
    "structured_outputs": STRUCTURED_OUTPUTS,
    "user": text("Written into the request log.", maxLength=512),
}

# --- completions ------------------------------------------------------------------------------------------------------

COMPLETION_REQUEST = record(
    ("model", "prompt"),
    model=MODEL,
    prompt=one_of(
        text(),
        array(text(), 1, MAX_TEXTS),
        TOKENS,
        array(TOKENS, 1, MAX_TEXTS),
        description="Text, token ids, or a list of either.",
    ),
    suffix=text("Text after the gap, for models trained to fill in the middle."),
    max_tokens=whole(0, MAX_INTEGER, "Maximum tokens of a completion; 0 needs echo.", default=16),
    best_of=whole(1, MAX_COMPLETIONS, "Completions that the n of the highest mean log-probability are chosen from."),
    echo=flag("The text and log-probabilities begin with those of the prompt."),
    logprobs=whole(0, MAX_TOP_LOGPROBS, "Log-probabilities, with those of this many most probable tokens."),
    **SAMPLING,
)

# --- chat -------------------------------------------------------------------------------------------------------------

_TOOL_CALL = record(
    ("id", "type", "function"),
    id=text(minLength=1, maxLength=256),
    type=constant("function"),
    function=record(("name", "arguments"), name=NAME, arguments=text()),
)
MESSAGE = one_of(
    record(("role", "content"), role=choice("system", "developer"), content=CONTENT, name=NAME),
    record(("role", "content"), role=constant("user"), content=CONTENT_WITH_IMAGES, name=NAME),
    record(
        ("role",),
        role=constant("assistant"),
        content=CONTENT,
        reasoning=text("Of the harmony format: the channel analysis."),
        refusal=constant(None),
        tool_calls=array(_TOOL_CALL, 1, MAX_TOOLS),
        name=NAME,
        annotations=array(ANY_OBJECT, 0, 0),
    ),
    record(("role", "content", "tool_call_id"), role=constant("tool"), content=CONTENT, tool_call_id=text(), name=NAME),
    description="A message of a conversation.",
)
FUNCTION_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$", "minLength": 1, "maxLength": 64}
TOOL = record(
    ("type", "function"),
    type=constant("function"),
    function=record(
        ("name",),
        name=FUNCTION_NAME,
        description=text(),
        parameters=JSON_SCHEMA,
        strict=flag("Accepted; arguments always satisfy the schema."),
    ),
)
TOOL_CHOICE = one_of(
    choice("none", "auto", "required"),
    record(("type", "function"), type=constant("function"), function=record(("name",), name=NAME)),
    description="Whether the completion calls tools: auto by default if there are any.",
)
RETRIEVAL = flag("With --documents: inserts passages before the last user message.", default=True)
CHAT_REQUEST = record(
    ("model", "messages"),
    model=MODEL,
    messages=array(MESSAGE, 1, MAX_MESSAGES),
    max_completion_tokens=whole(1, MAX_INTEGER, "Maximum tokens of a completion; default: the rest of the context."),
    max_tokens=whole(1, MAX_INTEGER, "Older name of max_completion_tokens, which has precedence."),
    logprobs=flag("Log-probabilities of the tokens."),
    top_logprobs=whole(0, MAX_TOP_LOGPROBS, "With logprobs: those of this many most probable tokens."),
    response_format=RESPONSE_FORMAT,
    tools=array(TOOL, 0, MAX_TOOLS),
    tool_choice=TOOL_CHOICE,
    parallel_tool_calls=flag("Whether a completion may call several tools.", default=True),
    reasoning_effort=choice("low", "medium", "high", description="For models of the harmony format."),
    retrieval=RETRIEVAL,
    modalities=array(constant("text"), 1, 1),
    service_tier=choice("auto", "default"),
    store=constant(False, "Completions are not stored."),
    **SAMPLING,
)

# --- responses --------------------------------------------------------------------------------------------------------

_INPUT_CONTENT = one_of(
    text(),
    array(
        one_of(
            record(("type", "text"), type=choice("input_text", "text"), text=text()),
            record(
                ("type", "text"),
                type=constant("output_text"),
                text=text(),
                annotations=array(ANY_OBJECT, 0, MAX_TEXTS),
                logprobs=array(ANY_OBJECT, 0, MAX_INTEGER),
            ),
            record(("type", "image_url"), type=constant("input_image"), image_url=IMAGE_URL, detail=IMAGE_DETAIL),
        ),
        1,
        MAX_MESSAGES,
    ),
)
_ITEM_STATUS = choice("in_progress", "completed", "incomplete")
INPUT_ITEM = one_of(
    record(
        ("role", "content"),
        type=constant("message"),
        role=choice("system", "developer", "user", "assistant"),
        content=_INPUT_CONTENT,
        id=text(),
        status=_ITEM_STATUS,
        phase=text(),
    ),
    record(
        ("type",),
        type=constant("reasoning"),
        id=text(),
        summary=array(ANY_OBJECT, 0, MAX_TEXTS),
        content=array(record(("type", "text"), type=constant("reasoning_text"), text=text()), 0, MAX_TEXTS),
        status=_ITEM_STATUS,
        encrypted_content=constant(None),
    ),
    record(
        ("type", "call_id", "name", "arguments"),
        type=constant("function_call"),
        call_id=text(minLength=1, maxLength=256),
        name=NAME,
        arguments=text(),
        id=text(),
        status=_ITEM_STATUS,
    ),
    record(
        ("type", "call_id", "output"),
        type=constant("function_call_output"),
        call_id=text(minLength=1, maxLength=256),
        output=one_of(text(), array(record(("type", "text"), type=constant("input_text"), text=text()), 1, MAX_TEXTS)),
        id=text(),
        status=_ITEM_STATUS,
    ),
)
RESPONSE_TOOL = record(
    ("type", "name"),
    type=constant("function"),
    name=FUNCTION_NAME,
    description=text(),
    parameters=JSON_SCHEMA,
    strict=flag("Accepted; arguments always satisfy the schema."),
)
TEXT_FORMAT = one_of(
    record(("type",), type=constant("text")),
    record(("type",), type=constant("json_object")),
    record(
        ("type", "name", "schema"),
        type=constant("json_schema"),
        name=NAME,
        description=text(),
        schema=JSON_SCHEMA,
        strict=flag(),
    ),
)
RESPONSES_REQUEST = record(
    ("model", "input"),
    model=MODEL,
    input=one_of(text(), array(INPUT_ITEM, 1, MAX_MESSAGES)),
    instructions=text("System message before the input."),
    max_output_tokens=whole(1, MAX_INTEGER, "Maximum tokens; default: the rest of the context."),
    temperature=SAMPLING["temperature"],
    top_p=SAMPLING["top_p"],
    seed=SAMPLING["seed"],
    top_logprobs=whole(0, MAX_TOP_LOGPROBS),
    text=record((), format=TEXT_FORMAT),
    reasoning=record((), effort=choice("low", "medium", "high")),
    truncation=choice("auto", "disabled", description="auto: the oldest turns are dropped from a long input."),
    retrieval=RETRIEVAL,
    metadata={"type": "object", "additionalProperties": text(maxLength=512), "maxProperties": 16},
    stream=flag(),
    stream_options=record((), include_obfuscation=constant(False)),
    store=constant(False, "Responses are not stored."),
    background=constant(False),
    tools=array(RESPONSE_TOOL, 0, MAX_TOOLS),
    tool_choice=one_of(
        choice("none", "auto", "required"),
        record(("type", "name"), type=constant("function"), name=NAME),
        description="Whether the response calls tools: auto by default if there are any.",
    ),
    parallel_tool_calls=flag("Whether a response may call several tools.", default=True),
    include=array(constant("message.output_text.logprobs"), 0, 1),
    user=SAMPLING["user"],
)

# --- embeddings, classification, tokens -------------------------------------------------------------------------------

EMBEDDING_REQUEST = record(
    ("model", "input"),
    model=MODEL,
    input=one_of(text(), array(text(), 1, MAX_TEXTS), TOKENS, array(TOKENS, 1, MAX_TEXTS)),
    encoding_format=choice("float", "base64", description="base64: little-endian float32."),
    dimensions=whole(1, MAX_INTEGER, "Only the model's own width is accepted."),
    pooling=choice("mean", "last", description="Mean over the tokens, the default, or the last token's."),
    normalize=flag("Scales the vectors to length 1.", default=True),
    user=SAMPLING["user"],
)
_EXAMPLE = one_of(text(), {"type": "object"})
CLASSIFICATION_REQUEST = record(
    ("model", "input"),
    model=MODEL,
    input=one_of(
        text(),
        {"type": "object"},
        array(_EXAMPLE, 1, MAX_TEXTS),
        description="A text, the task's inputs by name, or several.",
    ),
    user=SAMPLING["user"],
)
TOKENIZE_REQUEST = record(
    (),
    "Either prompt or messages.",
    model=MODEL,
    prompt=text(),
    messages=array(MESSAGE, 1, MAX_MESSAGES),
    tools=array(TOOL, 0, MAX_TOOLS),
    add_special_tokens=constant(False, "None are added to a prompt."),
    return_token_strs=flag("The text of each token too."),
)
DETOKENIZE_REQUEST = record(("tokens",), model=MODEL, tokens=array(whole(0, MAX_INTEGER), 0, 1 << 20))

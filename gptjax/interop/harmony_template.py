"""The harmony format as a chat template of transformers, in Jinja.

It covers OpenAI's messages with `thinking` and `tool_calls`. It does not declare functions, for which Jinja lacks the
means: `tools` are refused, and can be written into the system message by the caller.
"""

import json

from gptjax.config import ChatConfig

_TEMPLATE = """
{%- if tools -%}
{{- raise_exception('this template does not declare tools: write them into the system message') -}}
{%- endif -%}
{%- set at = namespace(user=-1, final=-1, tool='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set at.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and not message.get('tool_calls') and loop.index0 < at.user -%}
{%- set at.final = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{{- '<|start|>system<|message|>' + (model_identity or IDENTITY) + DATES + '\\n\\nReasoning: ' -}}
{{- (reasoning_effort or EFFORT) + '\\n\\n# Valid channels: analysis, commentary, final. ' -}}
{{- 'Channel must be included for every message.<|end|>' -}}
{%- for message in messages -%}
{%- if message['role'] in ('system', 'developer') -%}
{{- '<|start|>developer<|message|># Instructions\\n\\n' + message['content'] + '<|end|>' -}}
{%- elif message['role'] == 'user' -%}
{{- '<|start|>user<|message|>' + message['content'] + '<|end|>' -}}
{%- elif message['role'] == 'tool' -%}
{{- '<|start|>functions.' + at.tool + ' to=assistant<|channel|>commentary<|message|>' + message['content'] -}}
{{- '<|end|>' -}}
{%- else -%}
{%- if message.get('thinking') and loop.index0 > at.final -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message['thinking'] + '<|end|>' -}}
{%- endif -%}
{%- if message.get('tool_calls') -%}
{%- if message['tool_calls'] | length > 1 -%}{{- raise_exception('write one call a message') -}}{%- endif -%}
{%- if message.get('content') -%}
{{- '<|start|>assistant<|channel|>commentary<|message|>' + message['content'] + '<|end|>' -}}
{%- endif -%}
{%- set call = message['tool_calls'][0]['function'] -%}
{%- set at.tool = call['name'] -%}
{{- '<|start|>assistant to=functions.' + call['name'] + '<|channel|>commentary <|constrain|>json<|message|>' -}}
{{- (call['arguments'] if call['arguments'] is string else call['arguments'] | tojson) + '<|call|>' -}}
{%- else -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""


def harmony_template(chat: ChatConfig) -> str:
    """Returns the template; `reasoning_effort` and `model_identity` of a call take precedence over those of `chat`."""
    dates = f"\nKnowledge cutoff: {chat.knowledge_cutoff}"
    dates += f"\nCurrent date: {chat.current_date}" if chat.current_date is not None else ""
    values = {"IDENTITY": chat.model_identity, "DATES": dates, "EFFORT": chat.reasoning_effort}
    text = "".join(_TEMPLATE.splitlines())
    for name, value in values.items():
        text = text.replace(name, json.dumps(value, ensure_ascii=False))
    return text

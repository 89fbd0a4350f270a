"""The harmony format as a chat template of transformers, in Jinja.

It covers OpenAI's messages with `thinking` and `tool_calls`, and declares the functions of `tools`. The macros are the
functions of `data.harmony_schema`, with the same names.
"""

import json

from gptjax.config import ChatConfig

_MACROS = r"""
{%- macro is_list(value) -%}
{{- 'yes' if value is defined and value is iterable and value is not string and value is not mapping -}}
{%- endmacro -%}

{%- macro compact_json(value) -%}
{%- if value is mapping -%}
{{- '{' -}}
{%- for key, item in value.items() -%}
{{- ',' if not loop.first -}}{{- key | tojson + ':' + compact_json(item) -}}
{%- endfor -%}
{{- '}' -}}
{%- elif value is string or value is number or value is none or value is boolean -%}
{%- set text = value | tojson -%}
{%- if value is float and text.endswith('e-05') -%}
{{- '-' if value < 0 -}}{{- '0.0000' + text[:-4] | replace('.', '') | replace('-', '') -}}
{%- elif value is float -%}
{{- text | replace('e-0', 'e-') | replace('e+0', 'e') | replace('e+', 'e') -}}
{%- else -%}
{{- text -}}
{%- endif -%}
{%- else -%}
{{- '[' -}}
{%- for item in value -%}{{- ',' if not loop.first -}}{{- compact_json(item) -}}{%- endfor -%}
{{- ']' -}}
{%- endif -%}
{%- endmacro -%}

{%- macro trailing(comments) -%}{{- ' // ' + comments | join(' ') if comments -}}{%- endmacro -%}

{%- macro comment(text) -%}
{%- for line in (text[:-1] if text.endswith('\n') else text).split('\n') if text -%}
{{- '\n// ' + (line[:-1] if line.endswith('\r') else line) -}}
{%- endfor -%}
{%- endmacro -%}

{%- macro default(schema, json_enum) -%}
{%- set value = schema['default'] -%}
{%- set is_enum = is_list(schema['enum']) and schema['enum'] -%}
{%- if value is string and not (is_enum and json_enum) -%}
{{- 'default: ' + (value if is_enum else '"' + value + '"') -}}
{%- else -%}
{{- 'default: ' + compact_json(value) -}}
{%- endif -%}
{%- endmacro -%}

{%- macro nullable_type(given, indent) -%}
{%- set text = type_of(given, indent) -%}
{{- text -}}
{{- ' | null' if given is mapping and given['nullable'] is sameas true and 'null' not in text -}}
{%- endmacro -%}

{%- macro type_of(given, indent) -%}
{%- set schema = given if given is mapping else {} -%}
{%- set kind = schema['type'] -%}
{%- if is_list(schema['oneOf']) -%}
{%- for other in schema['oneOf'] -%}
{%- set variant = other if other is mapping else {} -%}
{%- set comments = [variant['description']] if variant['description'] is string else [] -%}
{%- set comments = comments + ([default(variant, true)] if 'default' in variant else []) -%}
{{- '\n' + indent + ' | ' + nullable_type(variant, indent + '   ') + trailing(comments) -}}
{%- endfor -%}
{%- elif is_list(kind) -%}
{%- set names = kind | select('string') | map('replace', 'integer', 'number') | list -%}
{{- names | join(' | ') or 'any' -}}
{%- elif kind == 'object' -%}
{{- object_type(schema, indent) -}}
{%- elif kind == 'array' -%}
{{- type_of(schema['items'], indent) + '[]' if 'items' in schema else 'Array<any>' -}}
{%- elif kind == 'string' and is_list(schema['enum']) -%}
{%- set names = schema['enum'] | select('string') | list -%}
{{- '"' + names | join('" | "') + '"' if names else 'string' -}}
{%- else -%}
{{- {'string': 'string', 'number': 'number', 'integer': 'number', 'boolean': 'boolean'}.get(kind, 'any') -}}
{%- endif -%}
{%- endmacro -%}

{%- macro object_type(schema, indent) -%}
{{- indent + '// ' + schema['description'] + '\n' if schema['description'] is string -}}
{{- '{' -}}
{%- set properties = schema['properties'] if schema['properties'] is mapping else {} -%}
{%- set required = schema['required'] if is_list(schema['required']) else [] -%}
{%- for key, value in properties.items() -%}
{{- property(key if key in required else key + '?', value if value is mapping else {}, indent) -}}
{%- endfor -%}
{{- '\n' + indent + '}' -}}
{%- endmacro -%}

{%- macro property(field, schema, indent) -%}
{%- set start = '\n' + indent -%}
{%- if schema['title'] is string -%}{{- start + '// ' + schema['title'] + start + '//' -}}{%- endif -%}
{%- if schema['description'] is string and 'oneOf' not in schema -%}
{{- start + '// ' + schema['description'] -}}
{%- endif -%}
{%- if is_list(schema['examples']) and schema['examples'] -%}
{{- start + '// Examples:' -}}
{%- for example in schema['examples'] if example is string -%}
{{- start + '// - "' + example + '"' -}}
{%- endfor -%}
{%- endif -%}
{%- if is_list(schema['oneOf']) -%}
{{- union(field, schema, indent) -}}
{%- else -%}
{%- set comments = [default(schema, false)] if 'default' in schema and 'oneOf' not in schema else [] -%}
{{- start + field + ': ' + nullable_type(schema, indent + '    ') + ',' + trailing(comments) -}}
{%- endif -%}
{%- endmacro -%}

{%- macro union(field, schema, indent) -%}
{%- set start = '\n' + indent -%}
{%- set description = [schema['description']] if schema['description'] is string else [] -%}
{%- set first = schema['oneOf'][0] if schema['oneOf'] and schema['oneOf'][0] is mapping else {} -%}
{%- set of_first = [first['description']] if first['description'] is string else [] -%}
{%- set above = description if not schema['oneOf'] or of_first != description else [] -%}
{%- for text in above -%}{{- start + '// ' + text -}}{%- endfor -%}
{{- start + '// ' + default(schema, false) if 'default' in schema -}}
{{- start + field + ':' -}}
{%- for other in schema['oneOf'] -%}
{%- set variant = other if other is mapping else {} -%}
{%- set own = [variant['description']] if variant['description'] is string else [] -%}
{%- set comments = [] if own == description or (loop.first and above) else own -%}
{%- set comments = comments + ([default(variant, false)] if 'default' in variant else []) -%}
{{- start + ' | ' + nullable_type(other, indent + '   ') + trailing(comments) -}}
{%- endfor -%}
{{- start + ',' -}}
{%- endmacro -%}

{%- macro declarations(functions) -%}
{{- 'namespace functions {\n' -}}
{%- for given in functions -%}
{%- set function = given['function'] if given['function'] is mapping else given -%}
{{- comment(function['description'] or '') -}}
{%- set schema = function['parameters'] -%}
{%- set argument = '' if schema is none or schema is not defined else '_: ' + type_of(schema, '') -%}
{{- '\ntype ' + function['name'] + ' = (' + argument + ') => any;\n' -}}
{%- endfor -%}
{{- '\n} // namespace functions' -}}
{%- endmacro -%}

{%- macro developer(instructions, functions) -%}
{%- set sections = ['# Instructions', instructions] if instructions else [] -%}
{%- set sections = sections + (['# Tools', '## functions', declarations(functions)] if functions else []) -%}
{{- '<|start|>developer<|message|>' + sections | join('\n\n') + '<|end|>' if sections -}}
{%- endmacro -%}
"""

_TEMPLATE = r"""
{%- set at = namespace(user=-1, final=-1, tool='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set at.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and not message.get('tool_calls') and loop.index0 < at.user -%}
{%- set at.final = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{{- '<|start|>system<|message|>' + (model_identity or IDENTITY) + DATES + '\n\nReasoning: ' -}}
{{- (reasoning_effort or EFFORT) + '\n\n# Valid channels: analysis, commentary, final. ' -}}
{{- 'Channel must be included for every message.' -}}
{{- '\nCalls to these tools must go to the commentary channel: ' + "'functions'." if tools -}}
{{- '<|end|>' -}}
{%- if messages[0]['role'] not in ('system', 'developer') -%}{{- developer('', tools) -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] in ('system', 'developer') -%}
{{- developer(message['content'], tools if loop.first) -}}
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
    text = "".join((_MACROS + _TEMPLATE).splitlines())
    for name, value in values.items():
        text = text.replace(name, json.dumps(value, ensure_ascii=False))
    return text

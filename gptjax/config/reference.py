"""The reference of all config keys: type, default and comment, read from the source of the sections."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from typing import Any

from gptjax.config.errors import UserError, nearest
from gptjax.config.sections import Config


def key_comments(section: type) -> dict[str, str]:
    """Field name -> its comment in the source: the lines above the field, then the one at its end.

    A comment at a field's end that stops with a comma or semicolon continues in the lines below it.
    """
    source = textwrap.dedent(inspect.getsource(section))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found, taken = {}, set[int]()
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above, line = list[str](), node.lineno - 1
        while line in comments and line not in taken:
            above.insert(0, comments[line])
            line -= 1
        end, line = list[str](), node.end_lineno or node.lineno
        while line in comments and (not end or end[-1][-1:] in ",;"):
            taken.add(line)
            end.append(comments[line])
            line += 1
        found[node.target.id] = "; ".join(part for part in (" ".join(above).rstrip("."), " ".join(end)) if part)
    return found


def config_help(section: str | None = None, config: Config | None = None) -> str:
    """The keys of one section, or of all, as text: value, default where it differs, comment.

    Args:
      section: such as "optimizer".
      config: whose values to show; None: the defaults.

    Raises:
      UserError: there is no such section.
    """
    config = Config() if config is None else config
    fields = dataclasses.fields(Config)
    sections = [field.name for field in fields if dataclasses.is_dataclass(getattr(config, field.name))]
    if section is not None and section not in sections:
        raise UserError(f"--help={section}: unknown section {section!r}{nearest(section, sections)}")
    parts = []
    if section is None:
        own = [field.name for field in fields if field.name not in sections]
        parts.append(_table("the run", Config, config, Config(), own, ""))
    for name in sections if section is None else [section]:
        values, defaults = getattr(config, name), getattr(Config(), name)
        keys = [field.name for field in dataclasses.fields(values)]
        parts.append(_table(name, type(values), values, defaults, keys, f"{name}."))
    return "\n".join(parts)


def _table(title: str, kind: type, values: Any, defaults: Any, keys: list[str], prefix: str) -> str:
    comments, hints = key_comments(kind), typing.get_type_hints(kind)
    lines = [f"{title}: {' '.join((kind.__doc__ or '').split(chr(10) + chr(10))[0].split())}"]
    for key in keys:
        value, default = getattr(values, key), getattr(defaults, key)
        changed = "" if value == default else f" (default {default!r})"
        lines.append(f"  --config.{prefix}{key}={value!r}{changed}  [{_type_name(hints[key])}]")
        lines += textwrap.wrap(comments.get(key, ""), 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)

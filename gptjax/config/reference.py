"""The reference of all config keys, generated from the dataclasses and the comments of their fields.

python -m gptjax.config.reference   # prints Markdown
"""

import ast
import dataclasses
import functools
import html
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from typing import Any, Literal, NamedTuple

from gptjax.config.errors import UserError, nearest
from gptjax.config.sections import Config


class Key(NamedTuple):
    """A config key: its full name, its type and default as text, and the comments of the field as one paragraph."""

    name: str
    type: str
    default: str
    comment: str


def sections(dataclass: type = Config, name: str = "") -> dict[str, type]:
    """Section name -> dataclass, in the order of the fields; keys outside all sections have the section ""."""
    found = {name: dataclass}
    for field, hint in typing.get_type_hints(dataclass).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= sections(hint, f"{name}.{field}" if name else field)
    return found


def keys(section: str) -> list[Key]:
    """The keys of a section."""
    dataclass = sections()[section]
    hints, comments = typing.get_type_hints(dataclass), dict[str, str]()
    for group in reversed(dataclass.__mro__):  # a section may inherit groups of fields
        comments |= field_comments(group) if dataclasses.is_dataclass(group) else {}
    prefix = section and f"{section}."
    return [
        Key(prefix + field.name, _type(hints[field.name]), repr(field.default), comments[field.name])
        for field in dataclasses.fields(dataclass)
        if not dataclasses.is_dataclass(hints[field.name])
    ]


def field_comments(dataclass: type) -> dict[str, str]:
    """Field name -> its comments in the source: the lines above it, then the one behind it.

    A line below a field whose own comment ends in a comma or semicolon continues that comment.
    """
    source = textwrap.dedent(inspect.getsource(dataclass))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    end, last = definition.lineno, ""
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        start, name = node.lineno, node.target.id
        above = [comments[line] for line in range(end + 1, start) if line in comments]
        if last and found[last].endswith((",", ";")):
            found[last], above = " ".join([found[last], *above]), []
        end, last = node.end_lineno or start, name
        behind = [comments[line] for line in range(start, end + 1) if line in comments]
        found[name] = " ".join([*above, *behind])
    return found


def _type(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def markdown() -> str:
    """A Markdown page: a heading and a table of keys for each section."""
    lines = ["# Config reference", ""]
    lines += ["Every key can be set on the command line, as `--config.optimizer.peak_lr=3e-4`.", ""]
    for section, dataclass in sections().items():
        lines += [f"## {section}" if section else "## Keys outside sections", "", inspect.getdoc(dataclass) or "", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys(section):
            cells = (f"`{key.name}`", _code(key.type), _code(key.default), _text(key.comment))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plain_text(section: str | None = None, config: Config | None = None) -> str:
    """The keys of one section, or of all, as plain text: value, default where it differs, type, comment.

    Args:
      section: such as "optimizer".
      config: whose values to show; None: the defaults.

    Raises:
      UserError: there is no such section.
    """
    known = sections()
    if section is not None and section not in known:
        raise UserError(f"--help={section}: unknown section {section!r}{nearest(section, filter(None, known))}")
    blocks = []
    for name in known if section is None else [section]:
        title = " ".join((inspect.getdoc(known[name]) or "").partition("\n\n")[0].split())
        lines = [f"{name or 'keys outside sections'}: {title}"]
        for key in keys(name):
            value = repr(functools.reduce(getattr, key.name.split("."), Config() if config is None else config))
            changed = "" if value == key.default else f" (default {key.default})"
            lines.append(f"  --config.{key.name}={value}{changed}  [{key.type}]")
            lines += textwrap.wrap(key.comment, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _text(text: str) -> str:
    """Escapes text for a cell of a Markdown table, except for code in backticks."""
    parts = re.split("(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    characters = html.escape(text, quote=False)
    return "".join(f"&#{ord(character)};" if character in "|*_[]\\~^" else character for character in characters)


if __name__ == "__main__":
    print(markdown())

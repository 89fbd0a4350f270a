"""Arguments of config files, and how the text of a value is read."""

from decimal import Decimal, InvalidOperation
from typing import Any

from gptjax.config.errors import UserError, nearest


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads a config file's argument, `configs/gpt2.py:size=355m,data=tfds:lm1b,runlocal`.

    Args:
      arg: "key=value,..."; a bool may be given without a value (`runlocal`). None: nothing given.
      **defaults: the known arguments and their defaults, whose types are the types of the arguments.

    Returns:
      The defaults, updated with the values of `arg`.

    Raises:
      UserError: an unknown argument, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, has_value, text = item.partition("=")
        if key not in defaults:
            raise UserError(f"unknown config argument {key!r}{nearest(key, defaults)}")
        kind = type(defaults[key])
        if kind is bool and not has_value:
            values[key] = True
        elif not has_value:
            raise UserError(f"config argument {key!r} needs a value: {key}={defaults[key]}")
        else:
            values[key] = parse_value(text, kind, f"config argument {key}")
    return values


BOOLS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
MAX_DIGITS = 30  # of an integer, so that 1e999999999 is refused instead of filling the memory


def parse_value(text: str, kind: type, name: str) -> Any:
    """Reads a bool (true, yes, on, 1, ...), int (1e9, 5_000), float or str; UserError names `name` and the fix."""
    if kind is bool:
        if text.lower() not in BOOLS:
            raise UserError(f"{name}={text!r} is not a bool: write true or false")
        return BOOLS[text.lower()]
    try:
        if kind is int:
            return _parse_int(text)
        return kind(text)
    except (ValueError, InvalidOperation):
        wanted = {int: "an integer, such as 1000 or 1e9", float: "a number, such as 0.1 or 1e-4"}
        raise UserError(f"{name}={text!r} is not {wanted.get(kind, 'of type ' + kind.__name__)}") from None


def _parse_int(text: str) -> int:
    """An integer in decimal notation, also with an exponent: 1e9 and 2.5e6; ValueError otherwise."""
    number = Decimal(text.strip())
    if not number.is_finite() or number.adjusted() >= MAX_DIGITS or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def choose(table: dict[str, Any], key: str, argument: str) -> Any:
    """Returns `table[key]`, `key` being the value of the config argument `argument`; UserError lists the choices."""
    if key not in table:
        raise UserError(f"unknown {argument} {key!r}: one of {', '.join(table)}")
    return table[key]

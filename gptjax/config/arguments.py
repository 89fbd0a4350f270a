"""What config files read: the argument behind a colon, and the tables that it chooses from."""

from typing import Any

from gptjax.config.errors import UserError, nearest


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads a config file's argument, `configs/gpt2.py:size=355m,data=tfds:lm1b,runlocal`.

    Args:
      arg: "key=value,..."; a bool may stand alone (`runlocal`). None: nothing given.
      **defaults: the arguments there are; the type of a default is the type of the argument.

    Returns:
      The defaults with `arg`'s values in their place.

    Raises:
      UserError: an unknown argument, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, has_value, text = item.partition("=")
        if key not in defaults:
            raise UserError(f"unknown config argument {key!r}{nearest(key, defaults)}")
        kind = type(defaults[key])
        if kind is bool:
            if text.lower() not in ("", "true", "false"):
                raise UserError(f"config argument {key}={text!r} is not a bool: write {key} or {key}=false")
            values[key] = text.lower() != "false"
        elif not has_value:
            raise UserError(f"config argument {key!r} needs a value: {key}={defaults[key]}")
        else:
            try:
                values[key] = kind(text)
            except ValueError:
                raise UserError(f"config argument {key}={text!r} is not of type {kind.__name__}") from None
    return values


def choose(table: dict[str, Any], key: str, argument: str) -> Any:
    """`table[key]`, for the value `key` of a config's `argument` (such as size); UserError names the choices."""
    if key not in table:
        raise UserError(f"unknown {argument} {key!r}: one of {', '.join(table)}")
    return table[key]

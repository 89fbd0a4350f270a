"""Finds installed Python packages without importing them."""

import importlib.util

from gptjax.config import UserError


def require_package(package: str, install: str, what: str) -> str:
    """Returns the folder of an installed package.

    Args:
      package: import name.
      install: command that installs it, for the error message.
      what: the feature that needs the package, for the error message.

    Raises:
      UserError: the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{what} needs the package {package}: {install}")
    return found.submodule_search_locations[0]

"""Finds installed Python packages without importing them."""

import importlib.util

from gptjax.config import UserError


def require_package(package: str, install: str, what: str) -> str:
    """The folder of a package; UserError, which names `what` needs it and the command to install it, without one."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{what} needs the package {package}: {install}")
    return found.submodule_search_locations[0]

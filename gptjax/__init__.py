"""One GPT in JAX, from GPT-1 to GPT-4: training, fine-tuning, chat and generation.

    config = gptjax.load_config("configs/gpt2.py:runlocal")
    gptjax.train(config, "runs/demo")
    print(gptjax.load("runs/demo").generate("The Congress"))

`gptjax.api` documents these functions. They are imported when they are first used: `import gptjax` itself does not
import JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.api import LoadedModel, curves, import_huggingface, load, open_server, train
    from gptjax.config import UserError, load_config

__all__ = [
    "LoadedModel",
    "UserError",
    "curves",
    "import_huggingface",
    "load",
    "load_config",
    "open_server",
    "train",
]

_MODULES = {
    **dict.fromkeys(("LoadedModel", "curves", "import_huggingface", "load", "open_server", "train"), "gptjax.api"),
    **dict.fromkeys(("UserError", "load_config"), "gptjax.config"),
}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used."""
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

"""Validates `init_layers`."""

from gptjax.config.errors import require
from gptjax.config.sections import Config


def check_init_layers(config: Config) -> None:
    """Raises UserError unless there are weights to transfer so many layers of, and all layers are trained."""
    if (count := config.init_layers) is None:
        return
    require(config.init_from is not None, f"init_layers={count} transfers layers of init_from: set that to a workdir")
    layers = config.model.num_layers
    require(0 <= count <= layers, f"init_layers={count} must be from 0 to model.num_layers={layers}")
    require(
        config.peft.method == "none",
        f"init_layers={count} leaves layers untrained that peft.method={config.peft.method} freezes: unset one of them",
    )

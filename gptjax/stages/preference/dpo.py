"""Stage "dpo": direct preference optimization, without a reward model (Rafailov et al. 2023)."""

from collections.abc import Callable

from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.tokenizers import Tokenizer
from gptjax.stages.preference.ranked import build_ranked
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None, define: Callable[[Config], Objective]) -> Stage:
    """Builds the stage on `mesh`; arguments and errors are those of `build_ranked`."""
    return build_ranked(config, mesh, tokenizer, define)

"""Fits for commands: the fit.json that `python -m gptjax.scaling fit` writes, and laws with published parameters."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from gptjax.config import UserError
from gptjax.files import expand, read_json
from gptjax.scaling.allocations import APPROACHES, Allocation, allocation_of_tree
from gptjax.scaling.law_fits import Fit, fit_of_tree, published
from gptjax.scaling.laws import LAWS, PUBLISHED
from gptjax.scaling.model_sizes import COUNTS

FIT_FORMAT = 1
OPTIMAL_WITHIN = 2.0  # factor of the optimal size, within which the loss hardly depends on it


@dataclasses.dataclass(frozen=True)
class FittedLaw:
    """A law and where it is from.

    Attributes:
      name: the file, or the name of published parameters.
      count: what N counts, see `COUNTS`.
      sha256: of the file; None for published parameters.
    """

    name: str
    fit: Fit | Allocation
    count: str
    sha256: str | None = None

    @property
    def law(self) -> str:
        return self.fit.law.name if isinstance(self.fit, Fit) else self.fit.approach

    @property
    def columns(self) -> tuple[str, ...]:
        """What a loss is predicted from."""
        return self.fit.law.columns if isinstance(self.fit, Fit) else ("flops",)

    @property
    def measured(self) -> str:
        """What it predicts: "loss", or "surprise" (mean of -log pass rate)."""
        return self.fit.law.measured if isinstance(self.fit, Fit) else "loss"

    def predict(self, inputs: Mapping[str, float | None]) -> tuple[float, list[float] | None]:
        """Returns the expected `measured`, and the interval of a new run; None: the law has no bootstrap samples.

        Raises:
          UserError: an input of the law is missing, or it has no law of the loss.
        """
        fit = self.fit if isinstance(self.fit, Fit) else self.fit.frontier
        if fit is None:
            raise UserError(f"{self.name}: this {self.law} fit has too few budgets to predict a loss")
        given = {name: inputs.get(name) for name in self.columns}
        if missing := [name for name, value in given.items() if value is None]:
            raise UserError(f"the law {self.law} of {self.name} needs {' and '.join(missing)}")
        if isinstance(self.fit, Allocation) and (size := inputs.get("parameters")) is not None:
            ratio = size / self.fit.optimum(given["flops"] or 0.0)[0]
            if not 1 / OPTIMAL_WITHIN < ratio < OPTIMAL_WITHIN:
                raise UserError(
                    f"the law {self.law} predicts the loss of models of optimal size, and this one has {ratio:.2g} "
                    "times the parameters: fit chinchilla"
                )
        return fit.predict({name: float(value) for name, value in given.items() if value is not None})

    def optimum(self, flops: float) -> tuple[float, float]:
        """Returns the optimal parameters and tokens of a budget; UserError if the law has none."""
        return self.fit.optimum(flops)


def load_law(name: str) -> FittedLaw:
    """Loads a fit by its path, or published parameters by their name.

    Raises:
      UserError: there is no such file or name, or the file is damaged.
    """
    if name in PUBLISHED and not expand(name).exists():
        count = "non_embedding" if name.startswith("kaplan") else "total"
        return FittedLaw(name, published(name), count)
    path = expand(name)
    try:
        tree = read_json(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(f"--law={name} is neither a file nor one of {', '.join(PUBLISHED)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --law={name}: {error}") from None
    try:
        if tree["format"] != FIT_FORMAT or tree["count"] not in COUNTS:
            raise ValueError("it has another format")
        fit: Fit | Allocation = allocation_of_tree(tree) if tree["law"] in APPROACHES else fit_of_tree(tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--law={name} is not a fit.json of python -m gptjax.scaling fit: {error}") from None
    return FittedLaw(str(path), fit, tree["count"], digest)


def law_names() -> list[str]:
    """The names of all laws that can be fitted."""
    return [*LAWS, *APPROACHES]


def tree_of_fit(fit: Fit | Allocation, count: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Returns a fit.json."""
    return {"format": FIT_FORMAT, **fit.tree(), "count": count, **extra}

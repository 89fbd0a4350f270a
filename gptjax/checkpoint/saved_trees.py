"""Comparison of the names, shapes and dtypes of a checkpoint's arrays with the expected ones.

It is done before reading, so that a changed config is never mistaken for a damaged checkpoint.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gptjax.config import UserError

# Sections and keys of the config that determine the arrays of a part of the state.
_PARAMS_FIELDS = ("model.", "peft.", "task.", "chat.", "ppo.", "stage", "init_from", "data.tokenizer")
_OPTIMIZER_FIELDS = ("optimizer.", "peft.", "ppo.", "stage")


@dataclasses.dataclass(frozen=True)
class ConfigChanges:
    """Differences of a run's config from the one in its workdir.

    Attributes:
      allowed: whether the user allows differences (`--allow_config_changes`).
      fields: the differences, each as "key: old -> new".
    """

    allowed: bool = False
    fields: Sequence[str] = ()

    def named(self, item: str) -> str:
        """Returns the changed fields that can affect `item` ("params", "ema" or "optimizer"), for a message."""
        keys = _OPTIMIZER_FIELDS if item == "optimizer" else _PARAMS_FIELDS
        related = [field for field in self.fields if field.startswith(keys)] or self.fields
        return "; ".join(related) or "it was saved by another config, or by another version of gptjax or Optax"


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf, such as "params/head/bias"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree, by name."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def described(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of each leaf, such as "float32[16,48]", by name."""
    return {
        name: f"{leaf.dtype}[{','.join(str(size) for size in leaf.shape)}]" for name, leaf in named_leaves(tree).items()
    }


def of_item(arrays: Mapping[str, str], item: str) -> dict[str, str]:
    """Returns the entries of one item of a checkpoint, by their names within it."""
    return {name.removeprefix(f"{item}/"): text for name, text in arrays.items() if name.startswith(f"{item}/")}


def first_difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Returns a message about the first array that differs; None if there is none."""
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            there, here = (text.get(name, "missing") for text in (saved, wanted))
            return f"{name} is {there} in the checkpoint and {here} in this run"
    return None


def check_item(item: str, saved: Mapping[str, str], wanted: Mapping[str, str], place: str, why: ConfigChanges) -> None:
    """Raises UserError if `saved` and `wanted` differ, with the first such array and the related config fields."""
    if (difference := first_difference(saved, wanted)) is not None:
        raise UserError(f"{place} does not fit this config: {item}/{difference} ({why.named(item)})")


def restorable(saved: Mapping[str, str], items: Mapping[str, Any], place: str, why: ConfigChanges) -> dict[str, str]:
    """Maps the full name in `items` of each array that can be restored to its full name in the checkpoint.

    Args:
      saved: the arrays of the checkpoint, as from `described`.
      items: the expected trees of abstract arrays, by item.
      place: name of the checkpoint, for messages.
      why: config changes. If they are allowed, an optimizer state or a moving average that does not fit is omitted.

    Raises:
      UserError: other arrays do not fit.
    """
    wanted, sources = described(items), dict[str, str]()
    for item in items:
        there, here = of_item(saved, item), of_item(wanted, item)
        names = {name: name for name in here}
        if item == "train":
            names = _train_names(there, here, place, why)
        elif item == "ema" and there != here and why.allowed:
            continue
        elif item == "ema" and not there:
            raise UserError(
                f"{place} has no moving average: leave optimizer.ema_decay unset, or start one at the parameters by "
                "--allow_config_changes"
            )
        else:
            check_item(item, there, here, place, why)
        sources |= {f"{item}/{name}": f"{item}/{source}" for name, source in names.items()}
    return sources


def _train_names(there: dict[str, str], here: dict[str, str], place: str, why: ConfigChanges) -> dict[str, str]:
    """Maps each array of item "train" to its saved name; omits an optimizer state that does not fit."""
    saved, wanted = ({n: text for n, text in arrays.items() if n.startswith("opt_state")} for arrays in (there, here))
    rest = {name: text for name, text in here.items() if name not in wanted}
    check_item("train", {name: text for name, text in there.items() if name not in saved}, rest, place, why)
    names = match_optimizer(saved, wanted)
    if names is None and not why.allowed:
        difference = first_difference(saved, wanted) or "its structure"
        raise UserError(
            f"{place} has another optimizer state: {difference} ({why.named('optimizer')}); "
            "--allow_config_changes resumes with a fresh one"
        )
    return {name: name for name in rest} | (names or {})


def match_optimizer(saved: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str] | None:
    """Maps each expected array of the optimizer state to its saved name; None if the states differ.

    Names are those of `opt_state`, the states of an `optax.chain`. A transformation without arrays, such as clipping or
    weight decay, shifts the indices of those after it, so indices are compared by their order only.
    """
    ranked_saved, ranked_wanted = _ranked(saved), _ranked(wanted)
    if first_difference(
        {rank: saved[name] for rank, name in ranked_saved.items()},
        {rank: wanted[name] for rank, name in ranked_wanted.items()},
    ):
        return None
    return {name: ranked_saved[rank] for rank, name in ranked_wanted.items()}


def _ranked(names: Mapping[str, str]) -> dict[str, str]:
    """Maps each name with its chain index replaced by its rank to the name itself."""
    position = re.compile(r"(opt_state/)(\d+)(?=/|$)")
    positions = sorted({int(match[2]) for name in names if (match := position.match(name))})
    rank = {str(number): str(i) for i, number in enumerate(positions)}
    return {position.sub(lambda match: match[1] + rank[match[2]], name, count=1): name for name in names}

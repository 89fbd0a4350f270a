"""The files of one checkpoint: its manifest and its arrays, read and verified."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from gptjax.checkpoint import read_errors
from gptjax.checkpoint.checksums import checksums
from gptjax.checkpoint.position import Best, Position
from gptjax.checkpoint.read_errors import DamageError, ReadError, VanishedError
from gptjax.checkpoint.saved_trees import described, name_of, named_leaves, of_item
from gptjax.config import UserError
from gptjax.files import is_whole, read_json

T = TypeVar("T")

ITEMS = ("params", "ema", "train", "base")  # of "base" only the checksums are stored


class Contents(NamedTuple):
    """The content read from a checkpoint.

    Attributes:
      manifest: the manifest.
      sources: full name in the checkpoint of each restored array, by its name in the state.
      arrays: restored arrays, by full name in the checkpoint.
    """

    manifest: dict[str, Any]
    sources: dict[str, str]
    arrays: dict[str, Any]

    def filled(self, name: str, abstract: Any) -> Any:
        """Returns the tree called `name`, such as "params", with its arrays; None if any of them is missing.

        Arrays have the dtypes of `abstract`.
        """
        names = jax.tree_util.tree_map_with_path(
            lambda path, _: "/".join(filter(None, (name, name_of(path)))), abstract
        )
        if not all(each in self.sources for each in jax.tree.leaves(names)):
            return None
        return jax.tree.map(lambda each, leaf: _as(self.arrays[self.sources[each]], leaf.dtype), names, abstract)


def _as(array: Any, dtype: Any) -> Any:
    return array if array.dtype == dtype else array.astype(dtype)


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint of `<workdir>/checkpoints/`.

    The full name of an array begins with its item, such as "params/head/bias".
    """

    directory: Path
    step: int

    def __str__(self) -> str:
        return f"checkpoint {self.step} in {self.directory}"

    @property
    def path(self) -> Path:
        return self.directory / str(self.step)

    def exists(self) -> bool:
        return self.path.is_dir()

    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = read_json(self.path / "manifest" / "metadata")
        if manifest.pop("crc32") != crc32(manifest):
            raise DamageError("its manifest is not what was saved")
        # The checkpoint may be untrusted, and the names are parts of paths.
        for table, kind in (("checksums", int), ("arrays", str)):
            entries = manifest[table] if table == "checksums" else manifest.get(table, {})
            if not all(name.partition("/")[0] in ITEMS and type(value) is kind for name, value in entries.items()):
                raise DamageError(f"its manifest has {table} that no run writes")
        return manifest

    def described(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the manifest, and the dtype and shape of each array by full name."""
        manifest = self.manifest()
        if "arrays" in manifest:
            return manifest, manifest["arrays"]
        # Manifests of earlier versions have names only; dtypes and shapes are in Orbax's metadata.
        names = {name for name in manifest["checksums"] if not name.startswith("base/")}
        saved: dict[str, str] = {}
        for item in sorted({name.partition("/")[0] for name in names}):
            saved |= described({item: ocp.PyTreeCheckpointHandler().metadata(self.path / item).tree})
        if saved.keys() != names:
            raise DamageError(f"the metadata of {min(saved.keys() ^ names)} is not what was saved")
        return manifest, saved

    def read(self, manifest: dict[str, Any], items: dict[str, Any], sources: dict[str, str]) -> Contents:
        """Reads the arrays `sources`, by their names in `items`, without verifying them."""
        wanted = {sources[name]: leaf for name, leaf in named_leaves(items).items() if name in sources}
        arrays: dict[str, Any] = {}
        for item in items:
            part = of_item(wanted, item)
            try:
                arrays |= self._arrays(item, part)
            except Exception as error:
                if read_errors.refusal(error) is not None or jax.process_count() > 1:
                    raise
                # The error may come from the sharding or its file, while the arrays are intact.
                arrays |= self._through_host(manifest, item, part)
        return Contents(manifest, sources, arrays)

    def read_one(self, manifest: dict[str, Any], name: str, leaf: Any) -> np.ndarray:
        """Reads the array with this full name into host memory, and verifies it; its dtype is that of `leaf`."""
        array = self._read_saved(manifest, name, leaf)
        return array.astype(leaf.dtype, copy=False)

    def _read_saved(self, manifest: dict[str, Any], name: str, leaf: Any) -> np.ndarray:
        """Reads an array as `read_one` does, with the dtype that was saved."""
        item, _, rest = name.partition("/")
        arrays = self._arrays(item, {rest: leaf}, in_host=True)
        verify(arrays, manifest["checksums"])
        array: np.ndarray = arrays[name]
        return array

    def _through_host(self, manifest: dict[str, Any], item: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Reads arrays as `_arrays` does, one at a time, each verified in host memory before it is sharded."""
        arrays = {}
        for name, leaf in wanted.items():
            array = self._read_saved(manifest, f"{item}/{name}", leaf)
            try:
                arrays[f"{item}/{name}"] = jax.device_put(array, leaf.sharding)
            except Exception as error:
                raise RuntimeError(f"{item}/{name} of {self} is not damaged, but cannot be sharded") from error
        return arrays

    def _arrays(self, item: str, wanted: Mapping[str, Any], in_host: bool = False) -> dict[str, Any]:
        """Reads arrays of an item, by full name, as they were saved; `wanted` has their shapes and shardings by name.

        The handler is called without Orbax's manager, whose barriers would wait for a process that failed to read.
        """
        if not wanted:
            return {}

        def arguments(name: str) -> ocp.RestoreArgs:
            if name not in wanted or in_host:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            leaf = wanted[name]
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=saved[name].dtype, global_shape=leaf.shape)

        def target(name: str) -> Any:
            if name not in wanted:
                return ocp.PLACEHOLDER
            return jax.ShapeDtypeStruct(wanted[name].shape, saved[name].dtype, sharding=wanted[name].sharding)

        handler = ocp.PyTreeCheckpointHandler()
        try:
            tree = handler.metadata(self.path / item).tree
            saved = named_leaves(tree)
            names = jax.tree_util.tree_map_with_path(lambda at, _: name_of(at), tree)
            restore = ocp.args.PyTreeRestore(jax.tree.map(target, names), restore_args=jax.tree.map(arguments, names))
            found = named_leaves(handler.restore(self.path / item, args=restore))
        finally:
            handler.close()
        if missing := wanted.keys() - found.keys():
            raise DamageError(f"{item}/{min(missing)} is missing")
        return {f"{item}/{name}": found[name] for name in wanted}

    def retried(self, read: Callable[[], T]) -> T:
        """Calls `read_errors.retried` for a `read` of this checkpoint."""
        return read_errors.retried(read, self.exists)

    def required(self, read: Callable[[], T]) -> T:
        """Returns the result of `read`; any failure is a UserError, as no other checkpoint can replace this one."""
        try:
            return self.retried(read)
        except VanishedError:
            raise UserError(f"{self} was deleted while it was read: run the same command again") from None
        except ReadError as error:
            raise self.unreadable(error) from None
        except DamageError as error:
            raise UserError(f"{self} is damaged ({error}): move it away to use the checkpoint before it") from None

    def unreadable(self, error: ReadError) -> UserError:
        return UserError(f"cannot read {self}: {error}; it was left in place: run the same command again")


def step_directories(directory: Path) -> list[Path]:
    """Returns the directories of the complete checkpoints in `<workdir>/checkpoints/`; none if it does not exist.

    Raises:
      OSError: it cannot be read.
    """
    if not directory.exists():
        return []
    return [path for path in directory.iterdir() if path.name.isdecimal() and is_whole(path)]


def make_manifest(position: Position, items: dict[str, Any], score: float | None = None) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, with its own checksum.

    Args:
      position: position of the run.
      items: arrays of the checkpoint; of those under "base" only the checksums are stored.
      score: validation score; None: unknown.
    """
    stored = {name: item for name, item in items.items() if name != "base"}
    manifest = {
        "position": dataclasses.asdict(position),
        "score": score,
        "checksums": checksums(items),
        "arrays": described(stored),
    }
    return manifest | {"crc32": crc32(manifest)}


def crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def verify(items: dict[str, Any], expected: dict[str, int]) -> None:
    """Raises DamageError unless the arrays of `items` have the expected checksums."""
    for name, checksum in checksums(items).items():
        if checksum != expected.get(name):
            raise DamageError(f"{name} is not what was saved")


def position_of(manifest: dict[str, Any]) -> Position:
    """Returns the position in a manifest; raises a format error if its types are wrong."""
    position = Position(**manifest["position"] | {"best": Best(**manifest["position"]["best"])})
    if [type(value) for value in vars(position).values()] != [type(value) for value in vars(Position()).values()]:
        raise DamageError("its manifest is not one of a run")
    return position


def weights_item(names: Iterable[str]) -> str:
    """Returns the item with the weights for inference, by the names of the arrays: the moving average if saved."""
    return "ema" if any(name.startswith("ema/") for name in names) else "params"

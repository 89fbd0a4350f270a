"""Datasets on the Hugging Face Hub: their Parquet files, at a fixed revision.

A dataset without Parquet files of its own is read from those that the Hub makes of it, on its branch
refs/convert/parquet. Files are downloaded by huggingface_hub into its cache, with its settings: HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE.
"""

import contextlib
import dataclasses
import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import tqdm
from absl import logging

from gptjax.config import Config, UserError

FORM = "hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT][#FIELD]"
_SPEC = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<config>[^@:#?]*):(?P<split>[^@:#?]*))?"
    r"(\?revision=(?P<revision>[0-9a-f]{40}))?(#(?P<field>[^#]+))?"
)
_CONVERTED = "refs/convert/parquet"
# Words in the names of files and folders by which `datasets` recognises splits.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A split of a dataset.

    Attributes:
      repo: OWNER/NAME.
      config: one of the dataset's configurations; None: its default.
      split: such as train.
      revision: commit hash; None: the newest.
      field: column; None: not named.
    """

    repo: str
    config: str | None
    split: str
    revision: str | None
    field: str | None


def parse(spec: str) -> HubDataset:
    """Parses `hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT][#FIELD]`.

    CONFIG and SPLIT may be empty, and are then the dataset's default and train. COMMIT has 40 hex digits; without it
    the newest one is read.

    Raises:
      UserError: the spec is malformed.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserError(f"malformed source {spec!r}: write {FORM}, where COMMIT has 40 hex digits")
    return HubDataset(
        match["repo"], match["config"] or None, match["split"] or "train", match["revision"], match["field"]
    )


def without_revision(config: Config) -> list[str]:
    """Returns the sources that a config names on the Hub without a commit."""
    matches = ((text, _SPEC.fullmatch(text)) for text in texts(dataclasses.asdict(config)))
    return list(dict.fromkeys(text for text, match in matches if match is not None and match["revision"] is None))


def revisions(specs: Sequence[str], saved: Config | None) -> dict[str, str]:
    """Returns for each source the same with a commit, so that a run always reads the same data.

    Args:
      specs: without commits.
      saved: the config that the run has been started with, whose commits are kept; None: there is none.

    Raises:
      UserError: a dataset is not available.
    """
    before = [] if saved is None else [text for text in texts(dataclasses.asdict(saved)) if _SPEC.fullmatch(text)]
    found = {re.sub(r"\?revision=\w+", "", text): text for text in before if parse(text).revision is not None}
    commits: dict[str, str] = {}  # one of each dataset, as its splits belong together
    for spec in specs:
        if spec not in found:
            repo = parse(spec).repo
            commits[repo] = commits.get(repo) or str(resolved(parse(spec)).revision)
            base, mark, field = spec.partition("#")
            found[spec] = f"{base}?revision={commits[repo]}{mark}{field}"
    return {spec: found[spec] for spec in specs}


def with_revisions(config: Config, found: Mapping[str, str]) -> Config:
    """Replaces the sources of a config by those of `revisions`."""
    replaced: Config = _with_texts(config, found)
    return replaced


def texts(tree: Any) -> Iterator[str]:
    """Yields all texts in a tree of dicts and tuples, such as the settings of a config."""
    if isinstance(tree, str):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ():
        yield from texts(part)


def _with_texts(value: Any, found: Mapping[str, str]) -> Any:
    """Replaces texts in a tree of dataclasses and tuples."""
    if isinstance(value, str):
        return found.get(value, value)
    if isinstance(value, tuple):
        return tuple(_with_texts(part, found) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _with_texts(getattr(value, name), found) for name in names})
    return value


def resolved(dataset: HubDataset) -> HubDataset:
    """Returns the dataset at its newest commit, unless it names one; raises UserError if it is not available."""
    if dataset.revision is not None:
        return dataset
    import huggingface_hub

    with _asking(dataset):
        api = huggingface_hub.HfApi(_endpoint())
        info = api.dataset_info(dataset.repo)
        if not any(sibling.rfilename.endswith(".parquet") for sibling in info.siblings or ()):
            try:
                info = api.dataset_info(dataset.repo, revision=_CONVERTED)
            except huggingface_hub.errors.RevisionNotFoundError:
                raise UserError(
                    f"{dataset.repo} has no Parquet files, and the Hub has made none ({_CONVERTED}): download it, and "
                    "name its files by text:, jsonl: or csv:"
                ) from None
    return dataclasses.replace(dataset, revision=info.sha)


def downloaded(dataset: HubDataset) -> Iterator[Path]:
    """Yields the files of a dataset in order, and downloads the next one meanwhile.

    An interrupted download resumes where it was; files in the cache of huggingface_hub are not downloaded again.

    Raises:
      UserError: there is no such configuration or split, or the Hub cannot be reached, refuses or no longer has the
        revision.
    """
    import huggingface_hub

    dataset = resolved(dataset)
    names = _files(dataset)

    def download(name: str) -> Path:
        with _asking(dataset):
            path = huggingface_hub.hf_hub_download(
                dataset.repo, name, repo_type="dataset", revision=dataset.revision, endpoint=_endpoint()
            )
        return Path(path)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(download, names[0])
        for name in [*names[1:], None]:
            path = following.result()
            if name is not None:
                following = pool.submit(download, name)
            yield path


def _files(dataset: HubDataset) -> list[str]:
    """Returns the names of the Parquet files of the configuration and split, sorted."""
    import huggingface_hub

    at: dict[str, Any] = {"repo_type": "dataset", "revision": dataset.revision}
    with _asking(dataset):
        # It also downloads the list of all files, which is in the cache from then on. Every repository has the first.
        wanted = [".gitattributes", "README.md"]
        folder = huggingface_hub.snapshot_download(
            dataset.repo, allow_patterns=wanted, endpoint=_endpoint(), tqdm_class=_NoBar, **at
        )
        tree = huggingface_hub.get_cached_repo_tree(dataset.repo, **at)
    names = sorted(file.path for file in tree if file.path.endswith(".parquet"))
    by_split = _declared(Path(folder), dataset, names) or _by_name(dataset, names)
    if dataset.split not in by_split:
        raise UserError(
            f"{dataset.repo} has no split {dataset.split!r}: choose one with @CONFIG:SPLIT: {', '.join(by_split)}"
        )
    found = by_split[dataset.split]
    if any(f"/partial-{dataset.split}/" in f"/{name}" for name in found):
        logging.warning("%s: the Hub has converted only a part of the dataset to Parquet.", dataset.repo)
    return found


def _declared(folder: Path, dataset: HubDataset, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the files of each split that the metadata of README.md declare for the configuration; {}: none.

    https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    from huggingface_hub import repocard

    declared: Any = None
    with contextlib.suppress(OSError, ValueError):  # no README, or malformed metadata, which `datasets` ignores too
        declared = (repocard.metadata_load(folder / "README.md") or {}).get("configs")
    configs = [entry for entry in declared or () if isinstance(entry, dict) and entry.get("data_files")]
    if not configs:
        return {}
    by_name = {str(entry.get("config_name", "default")): entry for entry in configs}
    default = next((name for name, entry in by_name.items() if entry.get("default")), None)
    if default is None and (len(by_name) == 1 or "default" in by_name):
        default = next(iter(by_name)) if len(by_name) == 1 else "default"
    name = dataset.config or default
    if name not in by_name:
        what = "several configurations" if name is None else f"no configuration {name!r}"
        raise UserError(f"{dataset.repo} has {what}: choose one with @CONFIG:SPLIT: {', '.join(by_name)}")
    files, root = by_name[name]["data_files"], str(by_name[name].get("data_dir") or "")
    entries = files if isinstance(files, list) else [files]
    by_split: dict[str, list[str]] = {}
    for entry in entries:
        split, patterns = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            whole = str(PurePosixPath(root, str(pattern)))
            found = [file for file in names if _matches(file, whole)]
            by_split.setdefault(str(split), []).extend(found)
    return {split: sorted(set(found)) for split, found in by_split.items() if found}


def _matches(name: str, pattern: str) -> bool:
    """Whether a file name matches a pattern in which `*` does not match "/", and `**/` any folders."""
    parts = re.split(r"(\*\*/|\*\*)", pattern)
    regex = "".join(
        {"**/": "(?:.*/)?", "**": ".*"}.get(part)
        or fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")
        for part in parts
        if part
    )
    return re.fullmatch(regex, name) is not None


def _by_name(dataset: HubDataset, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the files of each split by their names, as `datasets` does without metadata.

    The configuration is the first folder, as on the branch of converted files.
    """
    folders = sorted({name.partition("/")[0] for name in names if name.count("/") > 1})
    if dataset.config is not None:
        names = [name for name in names if name.startswith(f"{dataset.config}/")]
        if not names:
            raise UserError(
                f"{dataset.repo} has no configuration {dataset.config!r}: "
                + (f"choose one with @CONFIG:SPLIT: {', '.join(folders)}" if folders else f"write @:{dataset.split}")
            )
    elif folders and folders != ["data"]:
        if len(folders) > 1 and "default" not in folders:
            raise UserError(
                f"{dataset.repo} has several configurations: choose one with @CONFIG:SPLIT: {', '.join(folders)}"
            )
        first = "default" if "default" in folders else folders[0]
        names = [name for name in names if name.startswith(f"{first}/")]
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(_split_of(name), []).append(name)
    return by_split


def _split_of(name: str) -> str:
    """Returns the split of a file: that in its name, or else that of its innermost folder; without either, train."""
    for part in reversed(name.removesuffix(".parquet").split("/")):
        words = re.split(r"[\W_\d]+", part.lower())
        for split, known in _SPLIT_WORDS.items():
            if set(words) & set(known):
                return split
    return "train"


def _endpoint() -> str | None:
    """Returns HF_ENDPOINT, which huggingface_hub reads at import, which may have been before it was set."""
    return os.environ.get("HF_ENDPOINT")


class _NoBar(tqdm.tqdm):
    """A progress bar that is not shown, for files that are no data."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


@contextlib.contextmanager
def _asking(dataset: HubDataset) -> Iterator[None]:
    """Context manager that turns errors of huggingface_hub into UserErrors."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/datasets/{dataset.repo}"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(f"access to {dataset.repo} needs consent: give it on {page}, and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"the Hub no longer has the revision {dataset.revision} of {dataset.repo}: choose another by "
            "?revision=, in a new --workdir"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the Hub has no dataset {dataset.repo}, or it is private: check the name, or set HF_TOKEN"
        ) from None
    except Exception as error:  # of the connection, the server or the disk
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        fix = "; set HF_TOKEN to one with access" if refused else ""
        raise UserError(f"cannot read {dataset.repo} from the Hugging Face Hub: {reason}{fix}") from None

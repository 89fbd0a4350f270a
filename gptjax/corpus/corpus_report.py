"""The report of a preparation: report.json, report.txt, and a figure of each step."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.corpus.document_measures import Reason
from gptjax.corpus.selection import measured, selection
from gptjax.corpus.step_examples import CUT, examples_of_all
from gptjax.corpus.workspace import Workspace, load, write_json
from gptjax.files import read_json, write_whole
from gptjax.metrics.figures import TRAIN_COLOR, VALIDATION_COLOR, make_axes

Values = npt.NDArray[Any]

_LENGTH_BINS = np.logspace(0, 9, 73)  # 8 for each power of ten
_SHARE_BINS = np.linspace(0, 1, 51)
_SHOWN = 12  # languages in the figure


class _Totals:
    """Counts over all parts, for the report: their memory does not grow with the corpus."""

    def __init__(self, workspace: Workspace) -> None:
        self.documents, self.characters, self.text_bytes = Counter[Reason](), Counter[Reason](), Counter[Reason]()
        self.languages = Counter[str]()
        self.kept_characters = self.pieces = self.cut_documents = 0
        self.lengths = {reason: np.zeros(len(_LENGTH_BINS) - 1, np.int64) for reason in Reason}
        self.scores = {keeps: np.zeros(len(_SHARE_BINS) - 1, np.int64) for keeps in (True, False)}
        self.similarities = np.zeros(len(_SHARE_BINS) - 1, np.int64)
        for part in workspace.parts:
            similarities = selection(workspace, f"copies-{part.number:06d}")["similarity"]
            self._add(measured(workspace, part), selection(workspace, f"{part.number:06d}"), similarities)

    def _add(self, arrays: dict[str, Values], chosen: dict[str, Values], similarities: Values) -> None:
        for reason in Reason:
            of_reason = chosen["reason"] == reason
            self.documents[reason] += int(of_reason.sum())
            self.characters[reason] += int(arrays["characters"][of_reason].sum())
            self.text_bytes[reason] += int(arrays["text_bytes"][of_reason].sum())
            self.lengths[reason] += np.histogram(arrays["characters"][of_reason], _LENGTH_BINS)[0]
        self.languages.update(arrays["language"].tolist())
        scored = ~np.isnan(arrays["score"])
        for keeps in (True, False):
            of_filter = scored & ((arrays["reason"] != Reason.QUALITY) == keeps)
            self.scores[keeps] += np.histogram(arrays["score"][of_filter], _SHARE_BINS)[0]
        near = similarities[chosen["reason"] == Reason.NEAR_COPY]
        self.similarities += np.histogram(near, _SHARE_BINS)[0]
        document, first, stop = chosen["pieces"].T
        self.pieces += len(document)
        self.kept_characters += int((stop - first).sum())
        whole = (first == 0) & (stop == arrays["characters"][document])
        self.cut_documents += len(np.unique(document[~whole]))


def write_report(workspace: Workspace, splits: dict[str, Any]) -> None:
    """Writes the report and the figures into the corpus.

    Args:
      splits: counts of each split, of `finish_splits`.
    """
    recipe, totals, examples = workspace.recipe, _Totals(workspace), examples_of_all(workspace)

    def dropped(reason: Reason) -> dict[str, Any]:
        return {
            "dropped_documents": totals.documents[reason],
            "dropped_bytes": totals.text_bytes[reason],
            "examples": examples.get(reason.name, []),
        }

    units = [read_json(path / "index.json") for path in sorted(workspace.result("read").glob("[0-9]*"))]
    counted = ("skipped", "replaced_bytes", "replaced_documents")
    read = {name: sum(unit[name] for unit in units) for name in counted}
    steps: dict[str, dict[str, Any]] = {
        "read": {"documents": workspace.num_documents, "bytes": sum(totals.text_bytes.values()), **read}
    }
    _figure(workspace, "read", "documents", lambda axes: _lengths(axes, np.sum(list(totals.lengths.values()), 0)))
    if recipe.languages:
        steps["language"] = {"languages": dict(totals.languages.most_common()), **dropped(Reason.LANGUAGE)}
        _figure(workspace, "language", "documents", lambda axes: _languages(axes, totals.languages, recipe.languages))
    if recipe.quality_reference is not None:
        classes = load(workspace.result("classifier", 0) / "weights.npz")["documents"].tolist()
        trained = dict(zip(("reference", "source"), classes, strict=True))
        steps["quality"] = {"trained_on_documents": trained, **dropped(Reason.QUALITY)}
        _figure(workspace, "quality", "documents", lambda axes: _scores(axes, totals.scores))
    if recipe.duplicates != "none":
        steps["exact_copies"] = dropped(Reason.EXACT_COPY)
        exact = totals.lengths[Reason.EXACT_COPY]
        _figure(workspace, "exact_copies", "documents dropped", lambda axes: _lengths(axes, exact))
    if recipe.duplicates == "near":
        steps["near_copies"] = dropped(Reason.NEAR_COPY)
        _figure(workspace, "near_copies", "documents", lambda axes: _similarities(axes, totals.similarities))
    if recipe.tasks:
        tasks = _overlaps_by_task(workspace)
        kept = sum(totals.characters[reason] for reason in (Reason.KEPT, Reason.CONTAMINATED))
        removed = kept - totals.kept_characters
        cut = {"cut_documents": totals.cut_documents, "removed_characters": removed, "cuts": examples.get(CUT, [])}
        steps["contamination"] = {"tasks": tasks, **cut, **dropped(Reason.CONTAMINATED)}
        _figure(workspace, "contamination", "examples in the corpus (%)", lambda axes: _tasks(axes, tasks))
    steps["tokenise"] = {
        split: {name: counts[name] for name in ("documents", "tokens", "text_bytes")}
        for split, counts in splits.items()
    }
    tokens = np.concatenate([np.load(workspace.output / f"{split}_lengths.npy") for split in splits])
    _figure(
        workspace, "tokenise", "documents", lambda axes: _lengths(axes, np.histogram(tokens, _LENGTH_BINS)[0], "tokens")
    )
    write_json(workspace.output / "report.json", {"settings": recipe.settings(), "steps": steps})
    text = report_text(recipe.source, steps)
    write_whole(workspace.output / "report.txt", text)


def _overlaps_by_task(workspace: Workspace) -> list[dict[str, Any]]:
    """Adds to the description of each task its examples that share a 13-gram with the corpus, and common grams."""
    arrays = load(workspace.result("grams", 0) / "grams.npz")
    documents = selection(workspace, "counts")["gram_documents"]
    common = documents > workspace.recipe.max_gram_documents
    tasks = read_json(workspace.result("grams", 0) / "tasks.json")
    for index, task in enumerate(tasks):
        own = arrays["owner_task"] == index
        grams, owners = arrays["owner_gram"][own], arrays["owner_example"][own]
        removed = (documents[grams] > 0) & ~common[grams]
        task["grams"] = len(np.unique(grams))
        task["grams_in_corpus"] = len(np.unique(grams[removed]))
        task["examples_in_corpus"] = len(np.unique(owners[removed]))
        task["grams_too_common"] = len(np.unique(grams[common[grams]]))
    return list(tasks)


def report_text(source: str, steps: dict[str, dict[str, Any]]) -> str:
    """Returns the counts of the steps, one line each, with one example of what each dropped."""
    read = steps["read"]
    lines = [f"{source}: {read['documents']:,} documents, {_size(read['bytes'])}"]
    lines += [f"  {name.replace('_', ' ')}: {read[name]:,}" for name in ("skipped", "replaced_bytes") if read[name]]
    names = {
        "language": "other languages",
        "quality": "low quality",
        "exact_copies": "exact copies",
        "near_copies": "near copies",
        "contamination": "contaminated",
    }
    for step, title in names.items():
        if step not in steps:
            continue
        counts = steps[step]
        lines.append(f"{title}: {counts['dropped_documents']:,} documents, {_size(counts['dropped_bytes'])} dropped")
        for task in counts.get("tasks", ()):
            found = f"{task['examples_in_corpus']:,} of {task['examples']:,} examples in the corpus"
            short = f"{task['examples_without_13_words']:,} without 13 words"
            lines.append(f"  {task['task']}: {found}, {task['grams_too_common']:,} 13-grams too common, {short}")
        if "cut_documents" in counts:
            lines.append(
                f"  {counts['removed_characters']:,} characters cut, {counts['cut_documents']:,} documents kept"
            )
        for example in (counts["examples"] or counts.get("cuts", []))[:1]:
            about = [f"{name} {value}" for name, value in example.items() if name not in ("excerpt", "overlap")]
            excerpt = " ".join(str(example.get("overlap", example["excerpt"])).split())[:80]
            lines.append(f"  such as {', '.join(about)}: {excerpt}")
    for split, counts in steps["tokenise"].items():
        tokens = f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"
        lines.append(f"{split}: {tokens}, {_size(counts['text_bytes'])}")
    return "\n".join(lines) + "\n"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


# --- figures ----------------------------------------------------------------------------------------------------------


def _figure(workspace: Workspace, step: str, label: str, draw: Callable[[Any], None]) -> Path:
    axes = make_axes(f"{workspace.recipe.source}: {step.replace('_', ' ')}")
    axes.set_axisbelow(True)
    axes.set_ylabel(label)
    draw(axes)
    axes.figure.savefig(image := io.BytesIO(), dpi=150, format="png")
    path = workspace.output / f"{step}.png"
    write_whole(path, image.getvalue())
    return path


def _lengths(axes: Any, counts: Values, unit: str = "characters") -> None:
    axes.stairs(counts, _LENGTH_BINS, fill=True, color=TRAIN_COLOR)
    axes.set_xscale("log")
    (used,) = np.nonzero(counts)
    axes.set_xlim(_LENGTH_BINS[used[0]], _LENGTH_BINS[used[-1] + 1]) if len(used) else None
    axes.set_xlabel(f"{unit} of a document")


def _languages(axes: Any, languages: Counter[str], kept: tuple[str, ...]) -> None:
    shown = languages.most_common(_SHOWN)
    colors = [TRAIN_COLOR if language in kept else VALIDATION_COLOR for language, _ in shown]
    axes.bar([language for language, _ in shown], [count for _, count in shown], color=colors)
    axes.set_yscale("log")
    axes.set_xlabel("language (red: dropped)")


def _scores(axes: Any, scores: dict[bool, Values]) -> None:
    axes.stairs(scores[True] + scores[False], _SHARE_BINS, fill=True, color=VALIDATION_COLOR, label="dropped")
    axes.stairs(scores[True], _SHARE_BINS, fill=True, color=TRAIN_COLOR, label="kept")
    axes.set_xlabel("score of the quality classifier")
    axes.legend(frameon=False)


def _similarities(axes: Any, counts: Values) -> None:
    axes.stairs(counts, _SHARE_BINS, fill=True, color=VALIDATION_COLOR)
    axes.set_xlabel("estimated Jaccard similarity of a dropped document and its original")


def _tasks(axes: Any, tasks: list[dict[str, Any]]) -> None:
    shares = [100 * task["examples_in_corpus"] / max(1, task["examples"]) for task in tasks]
    axes.bar([Path(task["task"]).stem for task in tasks], shares, color=VALIDATION_COLOR)

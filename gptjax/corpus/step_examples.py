"""Examples of dropped documents and removed text, chosen by the hash of their text, so always the same."""

from typing import Any

import numpy as np

from gptjax.corpus.document_keys import content_keys
from gptjax.corpus.document_measures import Reason
from gptjax.corpus.selection import measured, selection
from gptjax.corpus.workspace import Part, Workspace, load, read_part
from gptjax.files import read_json

EXAMPLES = 5  # of each reason
EXCERPT = 200  # characters
CUT = "CUT"  # the group of documents that lost text, but were kept


def examples_of_part(workspace: Workspace, part: Part) -> dict[str, list[dict[str, Any]]]:
    """Returns up to `EXAMPLES` documents of a part for each reason, by its name, and for `CUT`."""
    arrays, chosen = measured(workspace, part), selection(workspace, f"{part.number:06d}")
    copies = selection(workspace, f"copies-{part.number:06d}")
    tasks = _Tasks(workspace) if workspace.recipe.tasks else None
    overlaps = arrays["overlaps"]
    found: dict[str, list[dict[str, Any]]] = {}
    for index, text in enumerate(read_part(part)):
        reason = Reason(int(chosen["reason"][index]))
        cuts = overlaps[overlaps[:, 0] == index] if tasks is not None and len(overlaps) else overlaps[:0]
        if tasks is not None and len(cuts):
            cuts = cuts[~tasks.common[cuts[:, 1]]]
        group = CUT if reason == Reason.KEPT and len(cuts) else reason.name
        if group == Reason.KEPT.name:
            continue
        example: dict[str, Any] = {"document": part.start + index, "order": int(content_keys(text)[0])}
        if reason == Reason.LANGUAGE:
            example["language"] = str(arrays["language"][index])
        if reason == Reason.QUALITY:
            example["score"] = round(float(arrays["score"][index]), 4)
        if reason in (Reason.EXACT_COPY, Reason.NEAR_COPY):
            example["copy_of"] = int(copies["copy_of"][index])
            example["similarity"] = round(float(copies["similarity"][index]), 4)
        if tasks is not None and group in (CUT, Reason.CONTAMINATED.name):
            _, gram, first, stop = cuts[0].tolist()
            example |= {"task": tasks.name_of(gram), "overlap": text[first:stop]}
        found.setdefault(group, []).append(example | {"excerpt": text[:EXCERPT]})
    return {group: _first(examples) for group, examples in found.items()}


def examples_of_all(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    """Returns the examples of the whole corpus, by the name of their reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in workspace.parts:
        counts = read_json(workspace.result("tokenise", part.number) / "counts.json")
        for group, examples in counts["examples"].items():
            found[group] = _first(found.get(group, []) + examples)
    return {
        group: [{name: value for name, value in example.items() if name != "order"} for example in examples]
        for group, examples in found.items()
    }


def _first(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(examples, key=lambda example: (example["order"], example["document"]))[:EXAMPLES]


class _Tasks:
    """The tasks that own grams."""

    def __init__(self, workspace: Workspace) -> None:
        arrays = load(workspace.result("grams", 0) / "grams.npz")
        self._grams, self._tasks = arrays["owner_gram"], arrays["owner_task"]
        self._names = workspace.recipe.tasks
        self.common = selection(workspace, "counts")["gram_documents"] > workspace.recipe.max_gram_documents

    def name_of(self, gram: int) -> str:
        """Returns the first task with a gram."""
        return self._names[int(self._tasks[np.flatnonzero(self._grams == gram)[0]])]

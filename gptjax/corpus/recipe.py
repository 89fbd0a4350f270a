"""The settings of the preparation of a corpus, and what must hold before anything is read."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from gptjax.config import UserError
from gptjax.data import tokenizers
from gptjax.data.packages import require_package
from gptjax.data.sources import Source, open_source
from gptjax.files import expand

EXTRA = "pip install 'gptjax[prepare]'"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines the content of a prepared corpus.

    Attributes:
      source: the documents, in a form of `open_source`.
      tokenizer: in a form of `DataConfig.tokenizer`; bpe:SIZE and gpt1_bpe:SIZE are trained on the kept documents.
      validation_fraction: of the kept documents, held out as by `split_documents`.
      languages: codes of the languages to keep, such as "en"; empty: all.
      quality_reference: source of documents of high quality, for the quality filter; None: no filter.
      duplicates: copies that are dropped: none, exact (equal texts) or near (also nearly equal ones).
      similarity: Jaccard similarity of the 5-word shingles from which on two documents are near copies.
      tasks: benchmarks and task files whose text is removed.
      max_gram_documents: 13-grams in more documents than this are common phrases, which stay (Brown et al. 2020,
        appendix C).
      seed: of the random numbers of the quality filter, and of its samples.
      document_separator, invalid_utf8, on_corrupt: see `open_source`.
      part_bytes: bytes of the text that a process works on at a time. It bounds memory, and the quality filter samples
        whole parts.
    """

    source: str
    tokenizer: str
    validation_fraction: float = 0.01
    languages: tuple[str, ...] = ()
    quality_reference: str | None = None
    duplicates: Literal["none", "exact", "near"] = "near"
    similarity: float = 0.8
    tasks: tuple[str, ...] = ()
    max_gram_documents: int = 10
    seed: int = 0
    document_separator: str | None = None
    invalid_utf8: Literal["replace", "error"] = "replace"
    on_corrupt: Literal["error", "skip"] = "error"
    part_bytes: int = 2**25

    def open_source(self, spec: str | None = None) -> Source:
        """Opens the source, or another one with the same settings; raises UserError as `sources.open_source`."""
        return open_source(
            self.source if spec is None else spec,
            document_separator=self.document_separator,
            invalid_utf8=self.invalid_utf8,
            on_corrupt=self.on_corrupt,
        )

    def settings(self) -> dict[str, Any]:
        """Returns the attributes as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


def check(recipe: Recipe) -> None:
    """Checks a recipe without reading documents.

    Raises:
      UserError: names the flag of a value that is invalid, or the package that it needs.
    """
    _named("--source", lambda: recipe.open_source())
    _named("--tokenizer", lambda: tokenizers.check_spec(recipe.tokenizer))
    if not 0 <= recipe.validation_fraction < 1:
        raise UserError(f"--validation_fraction={recipe.validation_fraction}: it must be at least 0 and less than 1")
    if not 0.5 <= recipe.similarity <= 1:
        raise UserError(f"--similarity={recipe.similarity}: near copies have a Jaccard similarity from 0.5 to 1")
    if recipe.duplicates == "near":
        require_package("datasketch", EXTRA, "--duplicates=near")
    if recipe.languages:
        from gptjax.corpus.language import check_languages

        check_languages(recipe.languages)
    if recipe.quality_reference is not None:
        reference = recipe.quality_reference
        _named("--quality_reference", lambda: recipe.open_source(reference))
        if reference == recipe.source:
            raise UserError(f"--quality_reference={reference} is --source itself: no classifier can tell them apart")
    if recipe.tasks:
        _check_tasks(recipe.tasks)


def _named(flag: str, opened: Any) -> None:
    try:
        opened()
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def _check_tasks(tasks: tuple[str, ...]) -> None:
    from gptjax.evaluation.catalogue import check_name

    for name in tasks:
        if not name.endswith(".jsonl"):
            _named("--tasks", lambda name=name: check_name(name, ()))
        elif not expand(name).is_file():
            raise UserError(f"--tasks: there is no task file {name}")
    names = [Path(name).stem for name in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"--tasks={','.join(tasks)}: two tasks have the same name: rename one of the files")

"""Opens corpora that `python -m gptjax.prepare` wrote, for `data.source=prepared:DIR`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.data import tokenizers
from gptjax.data.preparation import PreparedSplit
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import expand, is_in_bucket, read_json

SCHEME = "prepared:"
_TRAINED = ("bpe:", "gpt1_bpe:")


class PreparedCorpus:
    """A prepared corpus.

    Attributes:
      directory: of its files.
      train, validation: its splits.
    """

    def __init__(self, spec: str) -> None:
        """Opens the corpus of a source prepared:DIR.

        Raises:
          UserError: there is none, its preparation was stopped, or it is damaged.
        """
        self.directory = expand(spec.removeprefix(SCHEME))
        if is_in_bucket(self.directory):
            raise UserError(f"{spec} is in a bucket: copy it to a disk, or name a directory where that is mounted")
        if not (self.directory / "metadata.json").is_file():
            if (self.directory / "recipe.json").is_file():
                raise UserError(f"{spec}: its preparation was stopped: run the same gptjax.prepare again")
            raise UserError(f"{spec}: there is no prepared corpus in {self.directory}: name the --output of a prepare")
        try:
            metadata = read_json(self.directory / "metadata.json")
            self._tokenizer_spec, self._tokenizer = str(metadata["tokenizer"]), str(metadata["tokenizer_fingerprint"])
            self.train = PreparedSplit(self.directory, "train", metadata)
            self.validation = PreparedSplit(self.directory, "validation", metadata)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
            raise UserError(f"{spec} is damaged, prepare it again: {error}") from None

    def tokenizer(self, spec: str, cache_dir: Path) -> Tokenizer:
        """Opens the tokenizer `spec` of a run.

        Raises:
          UserError: it is not the one that the corpus was tokenised with.
        """
        if spec.startswith(_TRAINED):  # trained on the corpus, which has it
            if spec != self._tokenizer_spec:
                self._refuse(spec)
            return tokenizers.load(self.directory / "tokenizer", cache_dir)
        found = tokenizers.get_tokenizer(spec, train_documents=list, corpus_fingerprint="", cache_dir=cache_dir)
        self.check_tokenizer(found, spec)
        return found

    def check_tokenizer(self, tokenizer: Tokenizer, spec: str) -> None:
        """Raises UserError unless the corpus was tokenised with `tokenizer`, which `spec` names."""
        if tokenizer.encoding_fingerprint != self._tokenizer:
            self._refuse(spec)

    def _refuse(self, spec: str) -> Any:
        raise UserError(
            f"data.tokenizer={spec}, but {self.directory} was tokenised with {self._tokenizer_spec}: "
            f"set data.tokenizer={self._tokenizer_spec}, or prepare it again"
        )

    def held_out_documents(self, cache_dir: Path) -> Iterator[str]:
        """Yields the text of the validation documents, decoded."""
        tokenizer = tokenizers.load(self.directory / "tokenizer", cache_dir)
        for document, length in enumerate(self.validation.lengths.tolist()):
            yield tokenizer.decode(self.validation.read(document, 0, length - 1)) if length > 1 else ""


def is_prepared(spec: str) -> bool:
    """Whether a source names a prepared corpus."""
    return spec.startswith(SCHEME)

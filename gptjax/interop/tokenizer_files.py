"""Reading and writing of Hugging Face tokenizer files: tokenizer.json, or the older vocab.json and merges.txt."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import tiktoken
import tokenizers as huggingface
from tokenizers import decoders, models, pre_tokenizers, processors

from gptjax import files
from gptjax.config import UserError
from gptjax.data import tokenizer_check
from gptjax.data.harmony import HarmonyFormat
from gptjax.data.task_inputs import Special, special_tokens
from gptjax.data.templates import ChatFormat
from gptjax.data.tokenizers import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    read_json,
    with_declared_end,
)
from gptjax.data.vocabularies import END_OF_TEXT, gpt1_form, gpt2_form
from gptjax.interop.harmony_template import harmony_template


def read_tokenizer(directory: Path) -> HuggingFaceTokenizer | None:
    """Reads the tokenizer of a model's directory; None if there is none.

    Its end-of-text is the eos_token of tokenizer_config.json, or else the token with a usual name; `ends_of` reads the
    end tokens of the model's config files.

    Raises:
      UserError: a file is damaged.
    """
    if (directory / "tokenizer.json").is_file():
        return read_json(directory / "tokenizer.json")
    path = directory / "vocab.json"
    if not (path.is_file() and (directory / "merges.txt").is_file()):
        return None
    with tokenizer_check.LibraryErrors(f"cannot load the tokenizer {path}"):
        content = _read_vocabulary(directory).to_str()
        tokenizer_check.check(content)
        tokenizer = HuggingFaceTokenizer(content)
    return with_declared_end(tokenizer, directory)


def ends_of(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the end tokens by the eos_token_id of a model's config files, the one that separates documents first.

    As in transformers' `generate`, generation_config.json (often a list) takes precedence over config.json. Ids outside
    the vocabulary are ignored, as configs often keep GPT-2's default 50256 with other vocabularies.

    Returns:
      Empty if neither file names a token; the end-of-text of `read_tokenizer` then applies.

    Raises:
      UserError: a file is damaged, or an eos_token_id is neither an id nor a list of ids.
    """
    generation, model = (
        [token for token in _eos_token_ids(directory / name) if tokenizer.has_token(token)]
        for name in ("generation_config.json", "config.json")
    )
    ends = generation or model
    if not ends:
        return ()
    first = next(token for token in (*model[:1], tokenizer.end_of_text, ends[0]) if token in ends)
    return tuple(dict.fromkeys([first, *ends]))


def _eos_token_ids(path: Path) -> list[int]:
    try:
        found = files.read_json(path).get("eos_token_id")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
        raise UserError(f"{path}: eos_token_id={json.dumps(found)} is neither a token id nor a list of them")
    return ids


def _read_vocabulary(directory: Path) -> huggingface.Tokenizer:
    """Reads the tokenizer of vocab.json and merges.txt: GPT-1's form, whose words end in </w>, or GPT-2's."""
    if (directory / "added_tokens.json").is_file():
        raise UserError("its added_tokens.json is not supported: save the tokenizer as a tokenizer.json")
    vocab, merges = str(directory / "vocab.json"), str(directory / "merges.txt")
    vocabulary = files.read_json(directory / "vocab.json")
    files.check_size(directory / "merges.txt", files.MAX_JSON_BYTES)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):  # to_str would lose tokens after a gap
        raise UserError(f"its ids are not 0 to {len(vocabulary) - 1}: save it as a tokenizer.json")
    if any(token.endswith("</w>") for token in vocabulary):
        return gpt1_form(models.BPE.from_file(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer = gpt2_form(models.BPE.from_file(vocab, merges))
    tokenizer.add_special_tokens([END_OF_TEXT] if END_OF_TEXT in vocabulary else [])
    return tokenizer


def write_tokenizer(
    tokenizer: Tokenizer,
    directory: Path,
    context_length: int,
    chat: ChatFormat | None = None,
    *,
    is_task: bool = False,
) -> None:
    """Writes a tokenizer.json with the same ids, and a tokenizer_config.json for transformers' AutoTokenizer.

    Args:
      chat: format of a chat model, whose special tokens and template are written too; the token that ends an
        assistant's turn is the eos_token.
      is_task: for a fine-tuned task: a text is encoded as [start text extract], a pair as
        [start first delimiter second extract], and padded with the blank token (Radford et al. 2018, figure 1).

    Raises:
      UserError: a tokenizer.json cannot express the tokenizer, or not with these special tokens.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = tokenizer.content
    elif isinstance(tokenizer, TiktokenTokenizer):
        content = _from_tiktoken(tokenizer.encoding).to_str()
    elif isinstance(tokenizer, BytesTokenizer):
        content = _from_bytes().to_str()
    else:
        raise UserError(f"a {type(tokenizer).__name__} cannot be written as a tokenizer.json")
    written = huggingface.Tokenizer.from_str(content)
    if tokenizer.added:
        added = {name: tokenizer.vocab_size - len(tokenizer.added) + i for i, name in enumerate(tokenizer.added)}
        _add_special_tokens(written, added, "pretraining: train with a tokenizer that lacks it")
        content = written.to_str()
    if chat is not None:
        _add_special_tokens(written, chat.special_tokens, "the chat template: train with a template of other names")
        content = written.to_str()
    if is_task:
        names = task_tokens(special_tokens(tokenizer))
        _add_special_tokens(written, names, "a fine-tuned task: train with a tokenizer that lacks it")
        start, delimiter, extract, blank = names
        written.post_processor = processors.TemplateProcessing(
            single=f"{start}:0 $A:0 {extract}:0",
            pair=f"{start}:0 $A:0 {delimiter}:0 $B:0 {extract}:0",
            special_tokens=list(names.items()),
        )
        content = written.to_str()
    (directory / "tokenizer.json").write_bytes(content.encode())
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        # Without token_type_ids, whose token embeddings GPT-2 would add.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.end_of_text is not None:
        name = written.id_to_token(tokenizer.end_of_text)
        settings |= {"bos_token": name, "eos_token": name}
    if chat is not None:
        template = harmony_template(chat.config) if isinstance(chat, HarmonyFormat) else _jinja(chat, tokenizer)
        settings |= {"eos_token": written.id_to_token(chat.end_of_turn), "chat_template": template}
    if is_task:
        settings |= {"bos_token": start, "sep_token": delimiter, "eos_token": extract, "pad_token": blank}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _add_special_tokens(written: huggingface.Tokenizer, special: Mapping[str, int], origin: str) -> None:
    """Adds special tokens after the vocabulary, at the ids of the model.

    transformers parses their names in a text as these tokens; gptjax never does.

    Args:
      origin: their purpose and, after a colon, the remedy if an id is taken; for messages.
    """
    names = [huggingface.AddedToken(name, normalized=False, special=True) for name in special]
    written.add_special_tokens(names)
    purpose, _, remedy = origin.partition(": ")
    for name, token in special.items():
        if written.token_to_id(name) != token:
            raise UserError(
                f"the special token {name} of {purpose} has the id {token} in the model, but a tokenizer.json of this "
                f"vocabulary has {written.token_to_id(name)} for it: {remedy}"
            )


def task_tokens(special: Special) -> dict[str, int]:
    """Returns the ids of the special tokens of fine-tuned tasks, by their names in exported files."""
    return {f"<|{name}|>": token for name, token in special._asdict().items()}


def _jinja(chat: ChatFormat, tokenizer: Tokenizer) -> str:
    """Returns the chat template in transformers' Jinja format.

    transformers encodes the formatted text as a whole, so white space between template and content may be tokenised
    differently than in training; template plain is often affected.
    """
    around = {}
    for role, text in dataclasses.asdict(chat.template).items():
        before, after = (json.dumps(part, ensure_ascii=False) for part in text.split("{content}"))
        around[role] = before, after
    start = "" if tokenizer.end_of_text is None else "{{ bos_token }}"
    turns = "".join(
        f"{{% {'elif' if i else 'if'} message['role'] == '{role}' %}}{{{{ {before} + message['content'] + {after} }}}}"
        for i, (role, (before, after)) in enumerate(around.items())
    )
    prompt = f"{{% if add_generation_prompt %}}{{{{ {around['assistant'][0]} }}}}{{% endif %}}"
    return f"{start}{{% for message in messages %}}{turns}{{% endif %}}{{% endfor %}}{prompt}"


def _byte_level(
    vocabulary: dict[bytes, int], merges: list[tuple[bytes, bytes]], special: dict[str, int], pattern: str | None
) -> huggingface.Tokenizer:
    """Returns a byte-level BPE; `pattern`: regular expression of the pre-tokenisation; None: no pre-tokenisation."""
    tokenizer = huggingface.Tokenizer(
        models.BPE(
            {_letters(token): i for token, i in vocabulary.items()} | special,
            [(_letters(left), _letters(right)) for left, right in merges],
        )
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [] if pattern is None else [pre_tokenizers.Split(huggingface.Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _from_bytes() -> huggingface.Tokenizer:
    return _byte_level({bytes([i]): i for i in range(256)}, [], {END_OF_TEXT: BytesTokenizer.end_of_text}, None)


def _from_tiktoken(encoding: tiktoken.Encoding) -> huggingface.Tokenizer:
    """Converts a BPE of tiktoken; it merges the pair of lowest rank, so a merge follows from the ranks below it."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    merges = [
        _last_pair(token, ranks, rank) for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if token[1:]
    ]
    names: dict[int, str] = {}  # o200k_harmony has two names for one id, but a tokenizer.json has one for each
    for name, token in encoding._special_tokens.items():
        names.setdefault(token, name)
    special = {name: token for token, name in names.items()}
    # The tokenizers library parses {1,3}+ as a repetition, not as possessive, which makes no difference here.
    return _byte_level(ranks, merges, special, encoding._pat_str.replace("}+", "}"))


def _last_pair(token: bytes, ranks: dict[bytes, int], rank: int) -> tuple[bytes, bytes]:
    """Returns the two parts whose merge gives `token`, of rank `rank`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        at = min(range(len(joined)), key=joined.__getitem__)
        assert joined[at] < rank, f"{token!r} is not the result of a merge"
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _letters(token: bytes) -> str:
    """Maps bytes to GPT-2's visible characters (bytes_to_unicode in the code of Radford et al. 2019)."""
    return "".join(_BYTE_LETTERS[byte] for byte in token)


_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_LETTERS = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}

"""The bytes of each token of a vocabulary, which the text of a completion is the concatenation of."""

import json
from typing import Any

from gptjax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Returns the bytes of every token, by its id; empty for special tokens, and for ids without a token.

    A vocabulary that is not byte-level has the text of a token with its blanks; what its decoder does at the ends of a
    text, such as dropping the first blank, is not in it.
    """
    plain = tokenizer.vocab_size - len(tokenizer.added)
    if isinstance(tokenizer, BytesTokenizer):
        found = [bytes([token]) if token < 256 else b"" for token in range(plain)]
    elif isinstance(tokenizer, TiktokenTokenizer):
        specials = set(map(tokenizer.id_of, tokenizer.encoding.special_tokens_set))
        found = [b"" if token in specials else tokenizer._piece(token) for token in range(plain)]
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        found = _huggingface(json.loads(tokenizer.content), plain)
    else:
        found = [tokenizer.decode([token]).encode() for token in range(plain)]
    for token in tokenizer.ends:
        found[token] = b""
    return [*found, *[b""] * len(tokenizer.added)]


def _huggingface(content: dict[str, Any], size: int) -> list[bytes]:
    """The bytes of the tokens of a tokenizer.json file."""
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    decoders = content.get("decoder") or {}
    decoders = decoders.get("decoders", [decoders])
    kinds = {decoder.get("type") for decoder in decoders}
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    found = [b""] * size
    for token, number in vocabulary.items():
        if number < size and number not in added:
            found[number] = _bytes_of(token, kinds, model)
    for number, token in added.items():
        if number < size and not token.get("special"):
            found[number] = token["content"].encode()
    return found


def _bytes_of(token: str, decoders: set[Any], model: dict[str, Any]) -> bytes:
    if "ByteLevel" in decoders:
        return bytes(_BYTES[letter] for letter in token) if all(letter in _BYTES for letter in token) else b""
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or "##"
        return (token.removeprefix(prefix) if token.startswith(prefix) else f" {token}").encode()
    suffix = model.get("end_of_word_suffix")
    if suffix and token.endswith(suffix):
        token = f"{token.removesuffix(suffix)} "
    return token.replace("▁", " ").encode()


def _byte_letters() -> dict[str, int]:
    """The letter that GPT-2's vocabulary writes for each byte: printable ones for themselves, others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()

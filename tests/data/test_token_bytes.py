"""The bytes of tokens add up to the text that they decode to."""

import pytest

from gptjax.data.token_bytes import token_bytes
from gptjax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, get_tokenizer
from gptjax.data.vocabularies import train_bpe

TEXTS = ("Plain words, 12.5 of them.", "naïve 日本語 🙂\n\tdef f(): <|endoftext|>", " leading and trailing ")


@pytest.fixture(scope="module", params=["bytes", "gpt2", "bpe"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return BytesTokenizer()
    if request.param == "bpe":
        return HuggingFaceTokenizer(train_bpe(TEXTS * 3, 300).to_str())
    cache = tmp_path_factory.mktemp("cache")
    return get_tokenizer("gpt2", train_documents=list, corpus_fingerprint="", cache_dir=cache)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_add_up_to_the_text(tokenizer, text):
    pieces = token_bytes(tokenizer)
    assert len(pieces) == tokenizer.vocab_size
    assert b"".join(pieces[token] for token in tokenizer.encode(text)) == text.encode()


def test_special_tokens_have_no_bytes(tokenizer):
    added = tokenizer.with_added(["<|mask|>"])
    pieces = token_bytes(added)
    assert len(pieces) == added.vocab_size
    assert pieces[-1] == pieces[tokenizer.end_of_text] == b""

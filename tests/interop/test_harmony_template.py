"""The exported chat template writes what the library writes, by transformers' Jinja."""

import json

import pytest

from gptjax.config import ChatConfig
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.interop.harmony_template import harmony_template
from gptjax.interop.tokenizer_files import write_tokenizer
from tests.interop.write_harmony import CASES, FIXTURE

jinja2 = pytest.importorskip("jinja2")
GOLDENS = json.loads(FIXTURE.read_text())
PLAIN = [name for name in CASES if name not in ("messages of channels", "special tokens as text")]


def rendered(record: dict, settings: dict, *, prompt: bool) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    template = environment.from_string(harmony_template(ChatConfig(template="harmony", **settings)))
    return template.render(**record, add_generation_prompt=prompt, raise_exception=refuse)


@pytest.mark.parametrize("name", PLAIN)
def test_the_template_writes_the_same(name, o200k_harmony):
    (record, settings), golden = CASES[name], GOLDENS[name]
    if "tools" in record:
        with pytest.raises(ValueError, match="does not declare tools"):
            rendered(record, settings, prompt=True)
        record = {key: value for key, value in record.items() if key != "tools"}
    is_prompt = "prompt" in golden
    tokens = golden["prompt"] if is_prompt else golden["turns"][-1]["tokens"]
    wanted, found = o200k_harmony.decode(tokens), rendered(record, settings, prompt=is_prompt)
    if "tools" in CASES[name][0]:  # what declares them is left out
        wanted, found = (text[text.index("<|start|>user") :] for text in (wanted, found))
    assert found == wanted


def test_it_is_written_with_the_tokenizer(tmp_path):
    form = chat_format(ChatConfig(template="harmony"), BytesTokenizer())
    write_tokenizer(BytesTokenizer(), tmp_path, 64, form)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == harmony_template(ChatConfig(template="harmony"))
    assert settings["eos_token"] == "<|return|>"

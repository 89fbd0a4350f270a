"""configs/gpt4.py: LLaVA's two steps and training from scratch, for a laptop and as published."""

import dataclasses
import re

import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.stages import registry
from tests.tiny_images import VISION
from tests.tiny_tasks import MODEL, config_module, save_pretrained


@pytest.fixture(scope="module")
def module():
    return config_module("gpt4")


def resolved(module, argument: str) -> c.Config:
    config = c.resolve(module.get_config(argument))
    registry.check(config)
    registry.check_sections(config)
    return config


def test_scratch_reads_the_packaged_digits(module):
    local = resolved(module, "runlocal")
    assert (local.data.source, local.data.validation_source) == ("digits:train", "digits:test")
    assert (local.stage, local.peft.method, local.model.vision.image_size) == ("sft", "none", 8)
    whole = resolved(module, "data=jsonl:x.jsonl")
    assert whole.model.vision == dataclasses.replace(c.VisionConfig(), encoder="vit")
    assert whole.model.vision.tokens_per_image == 576  # LLaVA-1.5's
    assert (whole.data.source, whole.data.validation_source, whole.data.image_shift) == ("jsonl:x.jsonl", None, 0.0)
    documents = resolved(module, "stage=pretrain,runlocal")
    assert (documents.data.source, documents.chat.template) == ("digits:train:documents", "none")
    assert documents.model == local.model
    patches = resolved(module, "runlocal,encoder=patches")
    assert patches.model.vision.encoder == "patches"
    for wrong in ("stage=rlhf", "encoder=cnn"):
        with pytest.raises(UserError, match=f"unknown {wrong.partition('=')[0]}"):
            module.get_config(wrong)


def test_the_steps_of_llava_train_their_parts(module, pretrained, tmp_path):
    align = resolved(module, f"stage=align,init_from={pretrained},runlocal")
    assert (align.model.embed_dim, align.peft.method) == (MODEL.embed_dim, "parts")
    assert align.model.reads_images
    vision = dataclasses.replace(VISION, image_token=257)
    given = save_pretrained(tmp_path / "llava", settings=dataclasses.replace(MODEL, vocab_size=258, vision=vision))
    for stage, lr, rows in (("align", 1e-3, 256), ("instruct", 2e-5, 128)):
        config = resolved(module, f"stage={stage},init_from={given},data=jsonl:x.jsonl")
        assert config.model.vision == vision  # those of init_from
        assert (config.optimizer.peak_lr, config.batch.tokens_per_batch) == (lr, rows * MODEL.context_length)
        assert (config.optimizer.weight_decay, config.optimizer.warmup_fraction) == (0.0, 0.03)
    patterns = config.peft.trained
    assert any(re.fullmatch(pattern, "layers/block_0/mlp/up/kernel") for pattern in patterns)
    assert any(re.fullmatch(pattern, "vision/projector_1/kernel") for pattern in patterns)
    assert not any(re.fullmatch(pattern, "vision/encoder/block_0/mlp/up/kernel") for pattern in patterns)


def test_a_text_model_gets_a_format_of_its_own_tokens(module, pretrained, tmp_path):
    """A caption follows upon its image, and questions are answered in the vocabulary of the text model."""
    align = resolved(module, f"stage=align,init_from={pretrained},runlocal")
    assert (align.data.source, align.data.validation_source) == ("digits:train:captions", "digits:test:captions")
    tokenizer = BytesTokenizer()
    assert chat_format(align.chat, tokenizer, align.model.vision).special_tokens == {"<image>": tokenizer.vocab_size}
    assert align.chat.template == "none"
    (tmp_path / "align").mkdir()
    (tmp_path / "align/config.json").write_text(c.to_json(align))
    instruct = resolved(module, f"stage=instruct,init_from={tmp_path / 'align'},runlocal")
    assert (instruct.data.source, instruct.chat.user_format) == ("digits:train", "{content}\n")
    chat = c.replace(align, {"chat": {"template": "plain"}})
    (tmp_path / "align/config.json").write_text(c.to_json(chat))
    for stage in ("align", "instruct"):  # a chat model keeps its format
        assert resolved(module, f"stage={stage},init_from={tmp_path / 'align'},runlocal").chat == chat.chat


def test_special_tokens_may_not_take_the_place_of_the_image_token():
    tokenizer = BytesTokenizer()
    vision = dataclasses.replace(VISION, image_token=tokenizer.vocab_size)
    with pytest.raises(UserError, match=r"<\|im_start\|>, <\|im_end\|>, would take the place of the image token"):
        chat_format(c.ChatConfig(template="chatml"), tokenizer, vision)

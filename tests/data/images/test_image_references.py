"""Images of conversations: all ways to name them are the same, and one too many or too few is an error."""

import json
import re

import pytest

from gptjax.config import ChatConfig, UserError, VisionConfig
from gptjax.data.conversations import read_conversations, read_prompts, read_rankings
from gptjax.data.images.image_references import ImageReference
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import BytesTokenizer

ANSWER = {"role": "assistant", "content": "A cat."}
QUESTION = "<image>\nWhat is it?"


def parts(*content):
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER]}


def text(value):
    return {"type": "text", "text": value}


def url(value):
    return {"type": "image_url", "image_url": {"url": value}}


def messages(question=QUESTION, **fields):
    return {"messages": [{"role": "user", "content": question}, ANSWER]} | fields


@pytest.fixture
def jsonl(tmp_path):
    def write(record) -> str:
        path = tmp_path / "chats.jsonl"
        path.write_text(json.dumps(record) + "\n")
        return f"jsonl:{path}"

    return write


@pytest.mark.parametrize(
    "record",
    [
        parts(url("a.png"), text("\nWhat is it?")),
        parts({"type": "image_url", "image_url": "a.png"}, text("\nWhat is it?")),
        parts({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "\nWhat is it?"}),
        parts({"type": "image", "path": "a.png"}, text("\nWhat is it?")),
        parts({"type": "image"}, text("\nWhat is it?")) | {"images": ["a.png"]},
        messages(image="a.png"),
        messages(images=["a.png"]),
        {"image": "a.png", "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "A cat."}]},
        {"image": "a.png", "question": "What is it?", "answer": "A cat."},
        {"file_name": "a.png", "question": QUESTION, "answer": "A cat."},
    ],
)
def test_all_ways_to_name_an_image_are_the_same(jsonl, record):
    (conversation,) = read_conversations(jsonl(record))
    user, assistant = conversation.messages
    assert (user.content, assistant.content) == (QUESTION, "A cat.")
    assert [image.source for image in user.images] == ["a.png"]
    assert user.images[0].place.startswith(conversation.place)


def test_several_images_have_the_order_of_their_places(jsonl):
    record = parts(url("a.png"), text("or"), {"type": "image"}, text("?")) | {"images": ["b.png"]}
    (conversation,) = read_conversations(jsonl(record))
    assert conversation.messages[0].content == "<image>or<image>?"
    assert [image.source for image in conversation.messages[0].images] == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["caption", "text"])
def test_a_caption_follows_its_image_alone(tmp_path, name):
    (tmp_path / "captions.csv").write_text(f"file_name,{name}\na.png,A cat.\nb.png,A dog.\n")
    first, second = read_conversations(f"csv:{tmp_path}/captions.csv")
    assert [message.content for message in first.messages] == ["<image>", "A cat."]
    assert [image.source for image in second.messages[0].images] == ["b.png"]


def test_rankings_and_prompts_have_images(jsonl):
    (ranking,) = read_rankings(jsonl({"image": "a.png", "prompt": QUESTION, "chosen": "A cat.", "rejected": "A dog."}))
    assert [image.source for image in ranking.prompt[0].images] == ["a.png"]
    (prompt,) = read_prompts(jsonl({"image": "a.png", "prompt": QUESTION}))
    assert [image.source for image in prompt.messages[0].images] == ["a.png"]


def test_bytes_of_a_dataset_become_a_data_url(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": [{"bytes": b"abc", "path": "x.png"}], "question": ["What?"], "answer": ["A cat."]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (conversation,) = read_conversations(f"parquet:{tmp_path}/a.parquet")
    assert conversation.messages[0].images[0].source == "data:;base64,YWJj"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (messages("What?", image="a.png"), ":1 names 1 images, but has 0 <image>: they must be equally many"),
        (messages("<image><image>", image="a.png"), ":1 has 2 <image>, but names 1 images: they must be equally many"),
        (parts({"type": "image"}, text("?")), ":1 has 1 <image>, but names 0 images: they must be equally many"),
        (parts(url("a.png"), text("an <image>")), "messages[0]: a text next to images contains <image>"),
        (parts(url(None)), ":1: messages[0]: an image is 'None', where a path"),
        (parts(url(7)), ":1: messages[0]: an image is '7', where a path"),
        (parts(url("a.png"), {"type": "input_audio"}), "has a part of type 'input_audio': text or image"),
        (messages(image="a.png", images=["a.png"]), ":1 has images and image: keep one"),
        (
            {"messages": [{"role": "user", "content": "Draw."}, ANSWER | {"content": [url("a.png")]}]},
            ":1 has an image in a message of role assistant: only a user's may have images",
        ),
        (
            {"image": "a.png", "messages": [{"role": "system", "content": "<image>"}, *messages("Hi")["messages"]]},
            ":1 has an image in a message of role system: only a user's may have images",
        ),
    ],
)
def test_a_malformed_image_is_an_error_with_its_line(jsonl, record, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_conversations(jsonl(record))
    assert "\n" not in str(error.value)
    assert "chats.jsonl:1" in str(error.value)


VISION = VisionConfig(encoder="patches", image_size=4, patch_size=2)


def test_an_image_takes_the_places_of_its_tokens(jsonl):
    form = chat_format(ChatConfig(), BytesTokenizer(), VISION)
    assert form.special_tokens["<image>"] == form.image_token == form.vocab_size - 1
    (conversation,) = read_conversations(jsonl(parts(url("a.png"), text("b"), url("c.png"))))
    encoded = form.encode(conversation.messages)
    tokens = encoded.tokens.tolist()
    start = tokens.index(form.image_token)
    assert tokens[start : start + 9] == [form.image_token] * 4 + [ord("b")] + [form.image_token] * 4
    assert [image.source for image in encoded.images] == ["a.png", "c.png"]
    assert not encoded.loss_mask[encoded.tokens == form.image_token].any()
    assert form.encode_prompt_with_images(conversation.messages[:1]).images == encoded.images


def test_images_of_turns_that_are_dropped_are_dropped(jsonl):
    form = chat_format(ChatConfig(), BytesTokenizer(), VISION)
    record = {"messages": [*parts(url("a.png"))["messages"], *parts(url("b.png"), text("?"))["messages"]]}
    (conversation,) = read_conversations(jsonl(record))
    whole = form.encode(conversation.messages)
    assert [image.source for image in whole.images] == ["a.png", "b.png"]
    shorter = form.encode(conversation.messages, len(whole) - 1)
    assert [image.source for image in shorter.images] == ["b.png"]
    assert (shorter.tokens == form.image_token).sum() == 4


def test_a_model_refuses_what_it_does_not_read(jsonl):
    tokenizer = BytesTokenizer()
    (conversation,) = read_conversations(jsonl(parts(url("a.png"))))
    with pytest.raises(UserError, match=r"chats.jsonl:1: there is an image, but this model reads text alone"):
        chat_format(ChatConfig(), tokenizer).encode(conversation.messages, place=conversation.place)
    with pytest.raises(UserError, match="harmony has no images"):
        chat_format(ChatConfig(template="harmony"), tokenizer, VISION)
    (plain,) = read_conversations(jsonl(messages("an <image> as text")))
    assert plain.messages[0].images == ()
    with pytest.raises(UserError, match=r"x:1: a message of role user has 1 <image> for 0 images"):
        chat_format(ChatConfig(), tokenizer, VISION).encode(plain.messages, place="x:1")
    chat_format(ChatConfig(), tokenizer).encode(plain.messages)  # a text model reads it as text


def test_digits_are_conversations_without_images_of_the_other_split():
    train, test = (read_conversations(f"digits:{split}") for split in ("train", "test"))
    used = [{image.source for item in items for image in item.messages[0].images} for items in (train, test)]
    assert [len(images) for images in used] == [1437, 360]
    assert not used[0] & used[1]
    pairs = [item for item in test if len(item.messages[0].images) == 2]
    firsts = sum(item.messages[1].content == "first" for item in pairs)
    assert 0.45 < firsts / len(pairs) < 0.55
    text = read_conversations("digits:test:text")
    assert [item.messages[1] for item in text] == [item.messages[1] for item in test]
    assert {(item.messages[0].content, item.messages[0].images) for item in text} == {
        ("Which digit?", ()),
        ("Which is larger?", ()),
    }
    captions = read_conversations("digits:test:captions")
    assert [[message.content for message in item.messages] for item in captions] == [
        ["<image>", item.messages[1].content] for item in test if len(item.messages[0].images) == 1
    ]
    documents = read_conversations("digits:test:documents")
    assert "\n".join(item.messages[0].content for item in documents) == "\n".join(
        "".join(message.content for message in item.messages) for item in captions
    )
    assert max(len(item.messages[0].images) for item in documents) == 8
    for spec in ("digits", "digits:all", "digits:test:images"):
        with pytest.raises(UserError, match="digits:train or digits:test"):
            read_conversations(spec)
    image = test[0].messages[0].images[0]
    assert image == ImageReference(image.source, test[0].place)

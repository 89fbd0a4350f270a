"""Retrieval of passages: relevance, file and line."""

import importlib.util
from pathlib import Path

import pytest

from gptjax.config import UserError
from gptjax.data.words import words
from gptjax.inference.retrieval import Documents, Passage, check, citations, with_passages

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


def places(passages: list[Passage]) -> list[str]:
    return [passage.place for passage in passages]


def test_the_example_finds_its_pages():
    shop = Documents(ROOT / "examples" / "customer_service")
    for question, file, says in (
        ("How do I return shoes?", "returns.md", "within 30 days"),
        ("When do I get my refund?", "returns.md", "within 5 working days"),
        ("how much is EXPRESS delivery", "delivery.md", "1 working day"),
        ("When are you open on Saturday?", "opening_hours.txt", "10 am to 4 pm"),
        ("I forgot my password", "account.md", "valid for one\nhour"),
    ):
        best = shop.find(question)[0]
        assert says in best.text
        name, _, line = best.place.rpartition(":")
        assert name == file
        lines = (ROOT / "examples" / "customer_service" / name).read_text().splitlines()
        assert "\n".join(lines[int(line) - 1 :]).startswith(best.text)


def test_paragraphs_share_a_passage_as_far_as_it_goes(write):
    directory = write("a.txt", "one two\nthree\n\n\nfour five\n \nsix\n\nseven\n")
    passages = Documents(directory, max_words=5).passages
    assert passages == [Passage("one two\nthree\n\nfour five", "a.txt:1"), Passage("six\n\nseven", "a.txt:7")]


def test_a_heading_begins_a_passage_and_stays_with_its_text(write):
    directory = write("sub/a.MD", "intro\n\n# Top\n\n## One\n\nsome text here\n\nmore\n##no heading\n\n## Two\nlast\n")
    passages = Documents(directory, max_words=4).passages
    assert [passage.text for passage in passages] == [
        "intro",
        "# Top\n\n## One\n\nsome text here",
        "more\n##no heading",
        "## Two\n\nlast",
    ]
    assert places(passages) == ["sub/a.MD:1", "sub/a.MD:3", "sub/a.MD:9", "sub/a.MD:12"]


def test_a_heading_directly_above_its_text_begins_the_passage(write):
    directory = write("a.md", "# Price\nIt is 5.\n## Terms\nPay\nnow.\n#tag is text\n")
    assert Documents(directory).passages == [
        Passage("# Price\n\nIt is 5.", "a.md:1"),
        Passage("## Terms\n\nPay\nnow.\n#tag is text", "a.md:3"),
    ]


def test_a_comment_in_fenced_code_is_no_heading(write):
    directory = write("a.md", "Run:\n```sh\n# first\nmake\n```\n# End\nDone.\n")
    assert places(Documents(directory).passages) == ["a.md:1", "a.md:6"]


@pytest.mark.parametrize("mark", ["\f", "\u2028", "\u0085", "\v"])
def test_only_line_ends_count_as_lines(write, mark):
    directory = write("a.txt", f"one{mark}two\r\n{mark}\r\nthree\n")
    assert places(Documents(directory, max_words=2).passages) == ["a.txt:1", "a.txt:3"]


def test_a_folder_that_links_to_itself_is_read_once(write):
    directory = write("sub/a.txt", "apples")
    (directory / "sub/again").symlink_to(directory)
    assert places(Documents(directory).passages) == ["sub/a.txt:1"]


def test_a_long_paragraph_is_cut_between_words(write):
    text = "\n".join(f"w{3 * i} costs {i}.50" for i in range(7))
    passages = Documents(write("a.txt", "x\n\n" + text), max_words=4).passages[1:]
    assert "".join(passage.text for passage in passages).replace(" ", "").replace("\n", "") == text.replace(
        " ", ""
    ).replace("\n", "")
    assert [passage.text.split() for passage in passages] == [text.split()[i : i + 4] for i in range(0, 21, 4)]
    assert places(passages) == [f"a.txt:{3 + 4 * i // 3}" for i in range(6)]
    chinese = Documents(write("a.txt", "我们的商店每天都开门，欢迎你来。"), max_words=6).passages
    assert [len(words(passage.text)) for passage in chinese] == [6, 6, 2]


def test_the_best_come_first_and_others_not_at_all(write):
    write("a.txt", "apples are red")
    write("b.txt", "apples and pears are fruit, pears above all")
    directory = write("c.txt", "nothing of the kind")
    documents = Documents(directory)
    assert places(documents.find("Pears!")) == ["b.txt:1"]
    assert places(documents.find("pears or apples?")) == ["b.txt:1", "a.txt:1"]
    assert places(documents.find("pears or apples?", most=1)) == ["b.txt:1"]
    assert documents.find("bananas") == documents.find("?!") == documents.find("") == []


def test_other_scripts(write):
    write("a.txt", "商店每天九点开门")
    directory = write("b.txt", "退货是免费的")
    assert places(Documents(directory).find("几点开门？")) == ["a.txt:1"]


def test_only_texts_are_read(write):
    write("a.html", "text")
    write("notes.txt/b.md", "\ufefftext of b\n\n---")
    directory = write("c.txt", " \n***\n")
    assert Documents(directory).passages == [Passage("text of b\n\n---", "notes.txt/b.md:1")]


def test_what_the_model_reads_and_what_is_cited():
    passages = [Passage("One.", "a.md:3"), Passage("Two.", "b.txt:1")]
    assert with_passages("Why?", passages) == "[1] One.\n\n[2] Two.\n\nWhy?"
    assert citations(passages) == "[1] a.md:3\n[2] b.txt:1"
    assert with_passages("Why?", []) == "Why?"


def test_what_cannot_be_read(write, tmp_path, monkeypatch):
    directory = write("a.html", "text")
    for path, message in ((tmp_path / "none", "there is no folder"), (directory, "no text in .txt or .md files")):
        with pytest.raises(UserError, match=message):
            Documents(path)
    (directory / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"b\.txt:1 is not UTF-8 at byte 3"):
        Documents(directory)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gptjax\[retrieval\]'"):
        check(directory)

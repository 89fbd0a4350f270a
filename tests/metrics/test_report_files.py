"""Predictions are written exactly or not at all; the confusion plot accepts any labels."""

import json

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.metrics.report_files import plot_confusion, write_predictions


def test_predictions_come_back(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    records = [
        {"text": "中文 \u2028 \ud83d", "label": "spam", "probabilities": {"ham": 0.25, "spam": 0.75}},
        {"words": ["a", "b"], "tags": ["O", "O"], "index": 3},
    ]
    assert write_predictions(path, iter(records)) == 2
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")] == records
    assert "中文" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_numpy_numbers_are_numbers(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [{"a": np.float32(0.5), "b": np.int64(3), "c": np.arange(2), "d": np.bool_(True)}])
    assert json.loads(path.read_text()) == {"a": 0.5, "b": 3, "c": [0, 1], "d": True}


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"what": object()}])
def test_a_failure_leaves_what_was_there(tmp_path, bad):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [{"old": 1}])
    with pytest.raises((ValueError, AttributeError)):
        write_predictions(path, [{"new": 1}, bad])
    assert path.read_text() == '{"old": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    for write in (
        lambda path: write_predictions(path, []),
        lambda path: plot_confusion(path, np.eye(2, dtype=np.int64), ["a", "b"]),
    ):
        with pytest.raises(UserError, match=r"cannot write .*file"):
            write(tmp_path / "file" / "out")


def size(path):
    """Width and height of a PNG in pixels."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 40, 120])
def test_a_picture_of_any_number_of_labels(tmp_path, n):
    path = tmp_path / "figures" / "confusion.png"
    confusion = np.random.default_rng(0).integers(0, 2, (n, n)) * 12_345
    confusion[0] = 0  # a label without examples
    # What matplotlib would take for a formula, has no font for, or has no room for.
    names = [["PP$$", "$x_", "中文", "long " * 20, "a\\b"][i % 5] for i in range(n)]
    assert plot_confusion(path, confusion, names) == path
    width, height = size(path)
    assert min(width, height) > 300
    assert max(width, height) <= 27 * 150


def test_the_picture_shows_the_counts(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: drawn.update({(int(y), int(x)): int(text)}))
    plot_confusion(tmp_path / "confusion.png", np.array([[5, 0], [2, 3]]), ["a", "b"])
    assert drawn == {(0, 0): 5, (1, 0): 2, (1, 1): 3}

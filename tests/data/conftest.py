"""Files of test data."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(name, content)`: the path of a file with it; a dict or several are lines of JSON."""

    def write(name: str, *content: str | bytes | dict) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = [json.dumps(part) + "\n" if isinstance(part, dict) else part for part in content]
        raw = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
        path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(raw))
        return path

    return write

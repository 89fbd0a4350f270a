"""The versions of the remote files that a run reads, recorded in its workdir.

A dataset of the Hub is pinned by its commit in config.json (`hub.revisions`). Servers and buckets keep no earlier
versions that could be asked for, so `remote_files.json` records what each URL held, and a run that resumes compares it:

  {"jsonl:gs://bucket/*.jsonl": {"gs://bucket/a.jsonl": "120 bytes, md5Hash rL0Y20zC+Fzt72VPzMSk2A=="}}
"""

import dataclasses
import json
import re
from pathlib import Path

from gptjax.config import Config, UserError
from gptjax.data.hub import texts
from gptjax.data.remote_files import NoSuchFileError, RemoteFile, matching_urls
from gptjax.files import read_json

RECORD_FILE = "remote_files.json"

_SPEC = re.compile(r"(text|jsonl|csv|tsv|clue|parquet|conll|folders|tokens):(?P<url>[a-z][a-z0-9+]*://.+)")

Versions = dict[str, dict[str, str]]  # source -> URL of a file -> its size and version


def remote_versions(config: Config, workdir: Path, *, may_change: bool) -> Versions:
    """Returns the files of all sources of a config that are named by URLs, compared with the record of `workdir`.

    Args:
      workdir: of a run that resumes, or one without a record.
      may_change: the files may differ from those recorded.

    Raises:
      UserError: a file has changed, has vanished or is new since the run was started; or a server refuses.
    """
    found = dict[str, dict[str, str]]()
    recorded = _recorded(workdir)
    for spec in dict.fromkeys(text for text in texts(dataclasses.asdict(config)) if _SPEC.fullmatch(text)):
        before = None if may_change else recorded.get(spec)
        try:
            found[spec] = {file.url: _described(file) for file in matching_urls(_pattern(spec))}
        except NoSuchFileError as error:
            if before is None:
                raise
            raise _changed(str(error), workdir) from None
        if before is not None and before != found[spec]:
            raise _changed(_difference(before, found[spec]), workdir)
    return found


def record_file(versions: Versions) -> dict[str, str]:
    """Returns {name: content} of the file of `versions`, {} if the run reads no remote files."""
    return {RECORD_FILE: json.dumps(versions, indent=2) + "\n"} if versions else {}


def _pattern(spec: str) -> str:
    """Returns the URL of a source, without #FIELD or @DTYPE."""
    scheme, _, argument = spec.partition(":")
    if scheme == "tokens":
        return argument.rpartition("@")[0] or argument
    return argument.partition("#")[0] if scheme in ("jsonl", "parquet") else argument


def _described(file: RemoteFile) -> str:
    size = "unknown size" if file.size is None else f"{file.size} bytes"
    return f"{size}, {file.version or 'no version'}"


def _difference(before: dict[str, str], now: dict[str, str]) -> str:
    url = min(url for url in before.keys() | now.keys() if before.get(url) != now.get(url))
    if url not in now:
        return f"there is no longer the file {url}"
    if url not in before:
        return f"{url} is a new file"
    return f"{url} has changed, from {before[url]} to {now[url]}"


def _changed(what: str, workdir: Path) -> UserError:
    return UserError(
        f"{what}, since the run in {workdir} was started: restore it, use another --workdir, or resume with the data "
        "as they are now by --allow_config_changes"
    )


def _recorded(workdir: Path) -> Versions:
    path = workdir / RECORD_FILE
    try:
        found = read_json(path)
        return {str(spec): dict(files) for spec, files in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; remove it to resume with the data as they are now") from None

"""Reads image-text pairs from tar files in the layout of WebDataset (Aizman, Maltby and Breuel 2019).

Members of one name up to the first dot of its last part are a sample, such as 000012.jpg and 000012.json. A shard is
indexed once, header by header; then each image is read where it lies, in any order, and none stays in memory.
"""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from gptjax.config import UserError
from gptjax.data.images.image_references import FIELDS
from gptjax.data.remote_files import DataFile, is_url, open_binary

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "gif", "webp", "bmp", "tif", "tiff", "ppm")
VIDEO_SUFFIXES = ("mp4", "mov", "mkv", "webm", "avi")
SCHEME = "tar:"  # of the source of an image in a shard: "tar:PATH#FIRST_BYTE+SIZE"
_TEXT_SUFFIXES = ("txt", "json")
_MAX_TEXT = 2**26  # bytes of a text member
_SOURCE = re.compile(rf"{SCHEME}(.+)#(\d+)\+(\d+)", re.DOTALL)
# Fields of a record that hold the text: a caption in a .txt member would be a second one.
_CONVERSATIONS = ("messages", "conversations", "instruction", "question", "prompt", "chosen", "ranking")
_CAPTIONS = ("caption", "text")


class Member(NamedTuple):
    """A file of a shard: its name, where its content lies, and the content of a text."""

    name: str
    first_byte: int
    size: int
    content: bytes = b""

    @property
    def key(self) -> str:
        """The name up to the first dot of its last part."""
        folder, name = posixpath.split(self.name)
        return posixpath.join(folder, name.partition(".")[0])

    @property
    def suffix(self) -> str:
        return self.name.rpartition(".")[2].lower()


class Part(NamedTuple):
    """The bytes of an image in a shard."""

    path: str
    first_byte: int
    size: int

    @property
    def is_remote(self) -> bool:
        return is_url(self.path)

    def read(self) -> bytes:
        """Reads the bytes, fewer if the file is shorter; raises OSError if that fails."""
        import fsspec

        with fsspec.open(self.path, "rb") as file:
            file.seek(self.first_byte)
            return bytes(file.read(self.size))


def parse_source(source: str) -> Part | None:
    """The part of a shard that a source such as "tar:a.tar#1536+789" names; None: it is no such source."""
    match = _SOURCE.fullmatch(source)
    return None if match is None else Part(match[1], int(match[2]), int(match[3]))


def read_shards(shards: Sequence[DataFile], skip_damaged: bool = False) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields the record of each sample of some shards with its place, "shard.tar: 000012", in their order.

    A record has the fields of the .json member, the text of the .txt member as `caption`, and the images or
    videos, in their order in the shard, as `images` or `videos`, which replace those that the .json names. Other
    members are ignored.

    Args:
      skip_damaged: samples with damaged members, and the rest of a shard that is damaged, are skipped; a warning has
        their number.

    Raises:
      UserError: a shard cannot be read, is compressed or damaged, or a member is damaged or a second one of its name.
    """
    damaged: list[UserError] = []
    for shard in shards:
        for members in _samples(shard, damaged):
            place = f"{shard}: {members[0].key}"
            try:
                record = _record(shard, members, place)
            except UserError as error:
                damaged.append(error)
            else:
                if record:
                    yield record, place
            if damaged and not skip_damaged:
                raise damaged[0]
        if damaged and not skip_damaged:
            raise damaged[0]
    if damaged:
        logging.warning("skipped %d damaged samples or ends of shards; the first: %s", len(damaged), damaged[0])


def _samples(shard: DataFile, damaged: list[UserError]) -> Iterator[list[Member]]:
    """Yields the members of each sample, which need not be adjacent; appends to `damaged` if the shard is."""
    samples: dict[str, list[Member]] = {}
    before = len(damaged)
    try:
        for member in _members(shard):
            samples.setdefault(member.key, []).append(member)
    except UserError as error:
        damaged.append(error)
    except (tarfile.TarError, EOFError) as error:
        damaged.append(UserError(f"{shard} is damaged: {error}"))
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror or error}") from None
    if len(damaged) > before and samples:
        samples.popitem()  # which may lack members
    yield from samples.values()


def _members(shard: DataFile) -> Iterator[Member]:
    """Yields the files of a shard; raises UserError or TarError where it is not a whole tar file."""
    with open_binary(shard) as file:
        begin = file.read(6)
        if begin.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise UserError(f"{shard} is compressed, so that its images cannot be read in any order: decompress it")
        size = file.seek(0, 2)
        file.seek(0)
        end = 0
        tar: Any
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (found := tar.next()) is not None:
                tar.members.clear()  # a shard has many, and this list all of them
                stored = found.size if found.isreg() else 0
                end = found.offset_data + -(-stored // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if found.offset_data + stored > size:
                    raise UserError(f"{shard} is damaged: it ends within {found.name}")
                if found.isreg() and not posixpath.basename(found.name).startswith("."):
                    member = Member(posixpath.normpath(found.name), found.offset_data, found.size)
                    if member.suffix in _TEXT_SUFFIXES and found.size <= _MAX_TEXT:
                        file.seek(found.offset_data)
                        member = member._replace(content=file.read(found.size))
                    yield member
        # tarfile takes a damaged header for the end, which is a block of zeros, or that of the file.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise UserError(f"{shard} is damaged: no header of a file is at byte {end}")


def _record(shard: DataFile, members: Sequence[Member], place: str) -> dict[str, Any]:
    """The record of a sample; empty if none of its members is read."""
    record: dict[str, Any] = {}
    texts = {member.suffix: member for member in members if member.suffix in _TEXT_SUFFIXES}
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{place} has two files of one name: rename one")
    if "json" in texts:
        record = _json(texts["json"], place)
    if "txt" in texts and not any(record.get(name) for name in _CONVERSATIONS):
        caption = _text(texts["txt"], place)
        record = {name: value for name, value in record.items() if name not in _CAPTIONS} | {"caption": caption}
    named = {"images": IMAGE_SUFFIXES, "videos": VIDEO_SUFFIXES}
    found = {
        field: [f"{SCHEME}{shard}#{m.first_byte}+{m.size}" for m in members if m.suffix in suffixes]
        for field, suffixes in named.items()
    }
    if any(found.values()):
        record = {name: value for name, value in record.items() if name not in FIELDS}
        record |= {field: sources for field, sources in found.items() if sources}
    return record


def _json(member: Member, place: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(member, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: {member.name} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: {member.name} is not a JSON object")
    return value


def _text(member: Member, place: str) -> str:
    if member.size > _MAX_TEXT:
        raise UserError(f"{place}: {member.name} has {member.size:,} bytes: too many for a text")
    try:
        return member.content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{place}: {member.name} is damaged: it is not UTF-8") from None

"""An emulator of Google Cloud Storage on loopback: the JSON API that gcsfs and TensorStore use, with injected faults.

It keeps objects in memory. Generations and their preconditions, listing with prefixes and delimiters, media, multipart
and resumable uploads, ranged reads, deletes, copies and composition follow
https://cloud.google.com/storage/docs/json_api/v1. The emulators of the package index have no preconditions, without
which two runs could hold one lock.
"""

import base64
import dataclasses
import hashlib
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class StoredObject:
    content: bytes
    generation: int
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class RequestError(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that are made at the same time


class Emulator:
    """The objects of all buckets, and the server.

    Attributes:
      objects: by bucket and name.
      requests: (method, bucket/object) of every request.
      fault: called with method and "bucket/object"; returns an HTTP status to refuse a request with, or None.
    """

    def __init__(self, *buckets: str) -> None:
        self.objects: dict[str, dict[str, StoredObject]] = {bucket: {} for bucket in buckets}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], int | None] = lambda method, name: None
        self.lock = threading.Lock()
        self._generation = 0
        handler = type("Handler", (_Handler,), {"emulator": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process uses the emulator."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "emulator",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, prefix: str) -> list[str]:
        """Names of the objects whose "bucket/name" starts with `prefix`, which they are returned without."""
        bucket, _, start = prefix.partition("/")
        with self.lock:
            return sorted(name.removeprefix(start) for name in self.objects[bucket] if name.startswith(start))

    def read(self, path: str) -> bytes:
        bucket, _, name = path.partition("/")
        with self.lock:
            return self.objects[bucket][name].content

    def write(self, path: str, content: bytes) -> None:
        bucket, _, name = path.partition("/")
        with self.lock:
            self.put(bucket, name, content, {}, {})

    def remove(self, path: str) -> None:
        bucket, _, name = path.partition("/")
        with self.lock:
            del self.objects[bucket][name]

    # --- with the lock held -------------------------------------------------------------------------------------------

    def bucket(self, bucket: str) -> dict[str, StoredObject]:
        if bucket not in self.objects:
            raise RequestError(404, "The specified bucket does not exist.")
        return self.objects[bucket]

    def get(self, bucket: str, name: str, query: dict[str, str], prefix: str = "if") -> StoredObject:
        self.check(bucket, name, query, prefix)
        found = self.bucket(bucket).get(name)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise RequestError(404, f"No such object: {bucket}/{name}")
        return found

    def check(self, bucket: str, name: str, query: dict[str, str], prefix: str = "if") -> None:
        """Raises unless the preconditions of a request hold; generation 0 is that of a missing object."""
        found = self.bucket(bucket).get(name)
        generation = 0 if found is None else found.generation
        if (wanted := query.get(f"{prefix}GenerationMatch")) is not None and int(wanted) != generation:
            raise RequestError(412, "At least one of the pre-conditions you specified did not hold.")
        if (other := query.get(f"{prefix}GenerationNotMatch")) is not None and int(other) == generation:
            raise RequestError(304, "")

    def put(
        self, bucket: str, name: str, content: bytes, metadata: dict[str, Any], query: dict[str, str]
    ) -> dict[str, Any]:
        self.check(bucket, name, query)
        self._generation += 1
        self.objects[bucket][name] = StoredObject(content, self._generation, metadata)
        return self.resource(bucket, name)

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        found = self.objects[bucket][name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{found.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(found.generation),
            "metageneration": "1",
            "size": str(len(found.content)),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
            "etag": str(found.generation),
            **found.metadata,
        }


class _Handler(BaseHTTPRequestHandler):
    emulator: Emulator
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):  # the client was killed
            self.close_connection = True

    def _do(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        parts = parts[1:] if parts[0] in ("upload", "download") else parts
        place = "/".join(part for part in parts[3:] if part != "o")  # after storage/v1/b
        if url.path.startswith("/upload") and "name" in query:
            place = f"{parts[3]}/{query['name']}"
        elif url.path.startswith("/upload") and (name := re.search(rb'"name": ?"([^"]*)"', body[:4096])) is not None:
            place = f"{parts[3]}/{name[1].decode()}"
        self.emulator.requests.append((self.command, place))
        try:
            if (status := self.emulator.fault(self.command, place)) is not None:
                raise RequestError(status, f"injected fault {status}")
            with self.emulator.lock:
                self._route(url.path, parts[3:], query, body)
        except RequestError as error:
            if error.status == 304:  # has no body
                self._send(304, b"")
                return
            self._json({"error": {"code": error.status, "message": str(error)}}, error.status)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _do

    def _route(self, path: str, parts: list[str], query: dict[str, str], body: bytes) -> None:
        emulator = self.emulator
        if path.startswith("/upload/"):
            self._upload(parts[0], query, body)
        elif len(parts) == 1:
            emulator.bucket(parts[0])
            self._json({"kind": "storage#bucket", "name": parts[0], "id": parts[0], "location": "US"})
        elif len(parts) == 2:
            self._list(parts[0], query)
        elif "rewriteTo" in parts or "copyTo" in parts:
            verb = "rewriteTo" if "rewriteTo" in parts else "copyTo"
            bucket, name, target_bucket, target = parts[0], parts[2], parts[5], parts[7]
            source = emulator.get(
                bucket, name, {"generation": query["sourceGeneration"]} if query.get("sourceGeneration") else {}
            )
            made = emulator.put(target_bucket, target, source.content, source.metadata, query)
            self._json(
                {"kind": "storage#rewriteResponse", "done": True, "resource": made} if verb == "rewriteTo" else made
            )
        elif len(parts) > 3 and parts[3] == "compose":
            pieces = json.loads(body)["sourceObjects"]
            content = b"".join(emulator.get(parts[0], piece["name"], {}).content for piece in pieces)
            self._json(emulator.put(parts[0], parts[2], content, {}, query))
        elif len(parts) > 3:
            raise RequestError(404, "Not Found")
        elif self.command == "DELETE":
            emulator.get(parts[0], parts[2], query)
            del emulator.objects[parts[0]][parts[2]]
            self._send(204, b"")
        elif query.get("alt") == "media" or path.startswith("/download/"):
            self._media(emulator.get(parts[0], parts[2], query))
        else:
            emulator.get(parts[0], parts[2], query)
            self._json(emulator.resource(parts[0], parts[2]))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        after, limit = query.get("pageToken", ""), int(query.get("maxResults", 1000))
        items: dict[str, bool] = {}  # name -> whether it is a prefix
        for name in sorted(self.emulator.bucket(bucket)):
            if not name.startswith(prefix) or name < start or (end is not None and name >= end):
                continue
            head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if mark:
                items[prefix + head + mark] = True
            else:
                items[name] = False
        names = [name for name in items if name > after]
        page = names[:limit]
        found: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [self.emulator.resource(bucket, name) for name in page if not items[name]],
            "prefixes": [name for name in page if items[name]],
        }
        if len(names) > limit:
            found["nextPageToken"] = page[-1]
        self._json({key: value for key, value in found.items() if value})

    def _media(self, found: StoredObject) -> None:
        content, size = found.content, len(found.content)
        headers = {"X-Goog-Generation": str(found.generation), "ETag": str(found.generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        if wanted[1] == "":
            first, last = max(0, size - int(wanted[2])), size - 1
        else:
            first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first >= size:
            raise RequestError(416, "The requested range cannot be satisfied.")
        self._send(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        emulator = self.emulator
        emulator.bucket(bucket)
        kind = query["uploadType"]
        if kind == "media":
            self._json(emulator.put(bucket, query["name"], body, {}, query))
        elif kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert boundary is not None
            _, first, second, _ = body.split(b"--" + boundary[1].encode(), 3)
            metadata, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (first, second))
            content = content[:-2] if content.endswith(b"\r\n") else content[:-1]
            described = json.loads(metadata)
            self._json(emulator.put(bucket, described["name"], content, _kept(described), query))
        elif "upload_id" not in query:
            described = json.loads(body or b"{}")
            key = str(len(emulator.uploads))
            name = query.get("name", described.get("name"))
            emulator.uploads[key] = {"name": name, "query": query, "content": b"", "metadata": _kept(described)}
            location = f"{emulator.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            self._send(200, b"", {"Location": location})
        else:
            self._continue_upload(bucket, query["upload_id"], body)

    def _continue_upload(self, bucket: str, key: str, body: bytes) -> None:
        upload = self.emulator.uploads[key]
        if self.command == "DELETE":
            self._send(499, b"")
            return
        piece = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        upload["content"] = upload["content"][: int(piece[1] or 0)] + body if piece is not None else body
        if piece is None or piece[3] == str(len(upload["content"])):
            made = self.emulator.put(bucket, upload["name"], upload["content"], upload["metadata"], upload["query"])
            self._json(made)
            return
        self._send(308, b"", {"Range": f"bytes=0-{len(upload['content']) - 1}"} if upload["content"] else {})

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _kept(described: dict[str, Any]) -> dict[str, Any]:
    return {name: described[name] for name in ("metadata", "contentType") if name in described}


@contextmanager
def emulated(*buckets: str) -> Iterator[Emulator]:
    """Runs an emulator with empty buckets; this process and those it starts use it."""
    emulator = Emulator(*buckets)
    previous = {name: os.environ.get(name) for name in emulator.environment}
    os.environ.update(emulator.environment)
    try:
        yield emulator
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        emulator.close()

"""A web server on loopback that sends files as web servers, the Hugging Face Hub, S3 and Google Cloud Storage do."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape


class FileServer:
    """Serves `files`, path -> content, under four interfaces.

    A web server: /web/PATH, with a list of links at /web/. S3: /s3/BUCKET/KEY, for the endpoint URL/s3. Google Cloud
    Storage: /storage/v1/b/BUCKET/o/KEY. The Hub: /api/datasets/OWNER/NAME, and
    /datasets/OWNER/NAME/resolve/REVISION/PATH for the files in `revisions`. A bucket is the first part of a path.

    Attributes:
      url: of the server.
      files: path -> content.
      revisions: OWNER/NAME -> {revision: {path: content}}; the last one is the newest.
      branches: OWNER/NAME -> {branch: revision}.
      requests: the method and target of each request.
      refused: parts of paths that are answered with 403.
      cut: parts of paths whose next answer is cut off after half of its bytes; each works once.
      has_ranges: whether parts of files are sent.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.revisions: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.refused: set[str] = set()
        self.cut: list[str] = []
        self.has_ranges = True
        self.url = ""

    def answer(self, method: str, target: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body of a request."""
        path, _, raw_query = target.partition("?")
        raw_path, path, query = path, urllib.parse.unquote(path), dict(urllib.parse.parse_qsl(raw_query))
        self.requests.append((method, target))
        if any(part in target for part in self.refused):
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            return 403, {"Content-Type": "application/xml"}, b"" if method == "HEAD" else body
        first, _, rest = path.lstrip("/").partition("/")
        if first == "web":
            return self._web(rest, headers)
        if first == "s3":
            return self._s3(rest, query, headers)
        if path.startswith("/api/datasets/"):
            return self._hub_api(raw_path.removeprefix("/api/datasets/"), query)
        if first == "datasets":
            owner, name, _, revision, file = rest.split("/", 4)
            found = self._revision(f"{owner}/{name}", revision)
            if found is None or file not in found[1]:
                return self._missing("RevisionNotFound" if found is None else "EntryNotFound")
            return self._content(found[1][file], headers, {"X-Repo-Commit": found[0]})
        if "storage/v1/b/" in path:
            return self._gcs(path.partition("storage/v1/b/")[2], raw_query, query, headers)
        return self._missing("EntryNotFound")

    def _web(self, path: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
        if path in self.files:
            return self._content(self.files[path], headers, {})
        names = [name for name in self.files if name.startswith(path)]
        links = "".join(f'<a href="/web/{name}">{name}</a>' for name in names)
        return (200, {"Content-Type": "text/html"}, links.encode()) if names else self._missing("EntryNotFound")

    def _s3(self, path: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        bucket, _, key = path.partition("/")
        if key:
            name = f"{bucket}/{key}"
            return self._content(self.files[name], headers, {}) if name in self.files else self._missing("NoSuchKey")
        items = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{_hash(content)}&quot;</ETag><Size>{len(content)}</Size></Contents>"
            for name, content in self._listed(bucket, query.get("prefix", ""))
        )
        body = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        return 200, {"Content-Type": "application/xml"}, body.encode()

    def _gcs(self, path: str, raw_query: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        bucket, _, rest = path.partition("/")
        key = rest.removeprefix("o").lstrip("/")
        name = f"{bucket}/{key}"
        if key and name not in self.files:
            return self._missing("notFound")
        if key and query.get("alt") == "media":
            return self._content(self.files[name], headers, {})
        if key:
            return _json(_gcs_object(bucket, key, self.files[name]))
        listed = self._listed(bucket, query.get("prefix", ""))
        return _json({"items": [_gcs_object(bucket, name, content) for name, content in listed]})

    def _listed(self, bucket: str, prefix: str) -> Iterator[tuple[str, bytes]]:
        for name, content in sorted(self.files.items()):
            if name.startswith(f"{bucket}/{prefix}"):
                yield name.removeprefix(f"{bucket}/"), content

    def _hub_api(self, path: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        owner, name, *rest = map(urllib.parse.unquote, path.split("/"))
        repo = f"{owner}/{name}"
        if repo not in self.revisions:
            return self._missing("RepoNotFound")
        found = self._revision(repo, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self._missing("RevisionNotFound")
        revision, files = found
        if rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            entries = {}
            for path, content in files.items():
                inside = path.removeprefix(folder)
                if path.startswith(folder) and ("/" not in inside or query.get("recursive", "").lower() == "true"):
                    entries[path] = {"type": "file", "path": path, "size": len(content), "oid": _hash(content)}
                elif path.startswith(folder):
                    name = folder + inside.partition("/")[0]
                    entries[name] = {"type": "directory", "path": name, "size": 0, "oid": _hash(name.encode())}
            return _json(list(entries.values()))
        siblings = [{"rfilename": path} for path in files]
        return _json({"id": repo, "sha": revision, "siblings": siblings, "tags": [], "private": False})

    def _revision(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        known = self.revisions.get(repo, {})
        main = next(reversed(known), "")
        revision = {"main": main, **self.branches.get(repo, {})}.get(revision, revision)
        return (revision, known[revision]) if revision in known else None

    def _content(self, content: bytes, headers: Any, more: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        found = {"ETag": f'"{_hash(content)}"', "Accept-Ranges": "bytes" if self.has_ranges else "none", **more}
        asked = headers.get("Range", "").removeprefix("bytes=")
        if not (asked and self.has_ranges):
            return 200, found, content
        begin, _, end = asked.partition("-")
        start, stop = int(begin or 0), min(int(end or len(content) - 1), len(content) - 1)
        found["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
        return 206, found, content[start : stop + 1]

    def _missing(self, code: str) -> tuple[int, dict[str, str], bytes]:
        headers = {"X-Error-Code": code, "Content-Type": "application/xml"}
        # The Hub does not tell strangers whether a private repository exists.
        status = 401 if code == "RepoNotFound" else 404
        return status, headers, f"<Error><Code>{code}</Code></Error>".encode()


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _gcs_object(bucket: str, key: str, content: bytes) -> dict[str, str]:
    size, digest = str(len(content)), _hash(content)
    return {"kind": "storage#object", "bucket": bucket, "name": key, "size": size, "md5Hash": digest}


@contextmanager
def serving() -> Iterator[FileServer]:
    """Context manager with a server that answers requests."""
    server = FileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _send(self) -> None:
            status, headers, body = server.answer(self.command, self.path, self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = next((part for part in server.cut if part in self.path), None)
            if cut is not None:
                server.cut.remove(cut)
                self.close_connection = True
            self.wfile.write(body if cut is None else body[: len(body) // 2])

        do_GET = do_HEAD = _send

        def log_message(self, *arguments: Any) -> None:
            """Keeps the tests' output free of requests."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # connections that are made at the same time

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Keeps the tests' output free of connections that a client closed."""

    http = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()

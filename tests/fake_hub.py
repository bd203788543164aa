"""A hub of one data set on this machine: real `datasets` and `huggingface_hub` read it over HTTP, files by ranges."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

COMMIT = "a" * 40


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    files: Mapping[str, bytes]
    most: int | None = None


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            self._file(path.split("/resolve/")[1].partition("/")[2])
        elif "/tree/" in path:
            self._json(self._listed(path.split("/tree/")[1].partition("/")[2]))
        elif re.fullmatch(r"/api/datasets/[^/]+/[^/]+(/revision/[^/]+)?", path):
            names = [{"rfilename": name} for name in self.server.files]
            self._json({"_id": "1", "id": "owner/set", "sha": COMMIT, "siblings": names, "tags": [], "private": False})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._json([self._entry(name) for name in self.server.files])

    def _file(self, name: str) -> None:
        if name not in self.server.files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, data, headers)
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        if self.server.most is not None and stop > self.server.most:
            return self._answer(404, b"", {})
        headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
        return self._answer(206, data[start:stop], headers)

    def _listed(self, folder: str) -> list[dict[str, object]]:
        inside = [name for name in self.server.files if str(PurePosixPath(name).parent) == (folder or ".")]
        below = {str(PurePosixPath(name).parent) for name in self.server.files} - {".", folder}
        return [{"type": "directory", "oid": COMMIT, "path": name} for name in sorted(below) if not folder] + [
            self._entry(name) for name in inside
        ]

    def _entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "oid": COMMIT, "size": len(self.server.files[name]), "path": name}

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def fake_hub(home: Path, files: Mapping[str, bytes], *, most: int | None = None) -> Iterator[dict[str, str]]:
    """The environment in which `owner/set` on the hub has `files`; of a file no byte behind `most` is to be had.

    Whatever the libraries copy lies below `home`.
    """
    server = _Server(("127.0.0.1", 0), _Handler)
    server.files, server.most = files, most
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_ENDPOINT": where, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    finally:
        server.shutdown()
        server.server_close()

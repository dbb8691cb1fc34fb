"""A hub on loopback that has one data set: what `datasets` asks of the real one to read it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
ETAG = '"{:040x}"'


@contextmanager
def dataset_hub(repo: str, files: dict[str, bytes]) -> Iterator[str]:
    """Serve `files` as the data set `repo`; yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            path = urlsplit(self.path).path
            if path.startswith(f"/api/datasets/{repo}/paths-info/"):
                found = [
                    _entry(name, files)
                    for name in files
                    if json.dumps(name) in asked or f"paths={name}" in unquote(asked)
                ]
                self._send(200, json.dumps(found).encode())
            else:
                self._send(404, b"{}")

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            resolved = f"/datasets/{repo}/resolve/"
            if path.startswith(resolved) and (name := path.removeprefix(resolved).partition("/")[2]) in files:
                self._send(200, files[name], with_body=with_body, etag=ETAG.format(hash(name) % 2**64))
            elif path == f"/api/datasets/{repo}" or path.startswith(f"/api/datasets/{repo}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}).encode())
            elif path.startswith(f"/api/datasets/{repo}/tree/"):
                folder = path.removeprefix(f"/api/datasets/{repo}/tree/").partition("/")[2]
                self._send(200, json.dumps(_tree(folder, files, everything="recursive=True" in self.path)).encode())
            else:
                self._send(404, b"{}", with_body=with_body)

        def _send(self, status: int, body: bytes, *, with_body: bool = True, etag: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if etag is not None:
                self.send_header("ETag", etag)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _tree(folder: str, files: dict[str, bytes], *, everything: bool) -> list[dict[str, object]]:
    below = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(below)]
    folders = {below + name.removeprefix(below).partition("/")[0] for name in inside if "/" in name.removeprefix(below)}
    listed = inside if everything else [name for name in inside if "/" not in name.removeprefix(below)]
    entries = [{"type": "directory", "path": name, "oid": "b" * 40} for name in sorted(folders)]
    return [*entries, *(_entry(name, files) for name in listed)]


def _entry(name: str, files: dict[str, bytes]) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(files[name]), "oid": f"{hash(name) % 2**64:040x}"}

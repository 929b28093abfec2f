"""A download from the Hub, played by a server on this machine.

In a process of its own, because the Hub's client reads its settings once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from adapterhub_lite.bases import fetch

COMMIT = "a" * 40
KEPT = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 3_000_000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "odd[1].json": b"{}",
}
REFUSED = {"pytorch_model.bin": b"x", "modeling.py": b"x", "adapter_config.json": b"{}", "onnx/config.json": b"{}"}
REPOS = {"org/good": {**KEPT, **REFUSED}, "org/pickle": REFUSED}
SCRIPT = """
from adapterhub_lite.bases.fetch import locate
events = []
for name in ("org/good", "org/pickle", "org/none"):
    try:
        found = locate(name, on_event=events.append)
        print(found.origin, found.revision, *sorted(path.name for path in found.folder.iterdir()))
    except Exception as error:
        print(type(error).__name__, *str(error).splitlines())
print(events[-1])
"""


class Hub(BaseHTTPRequestHandler):
    """The four answers that a download needs."""

    def log_message(self, format: str, *args: object) -> None: ...

    def answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        repo = next((name for name in REPOS if f"/{name}/" in f"{path}/"), None)
        if repo is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "/resolve/" in path:
            body = REPOS[repo][path.split(f"/resolve/{COMMIT}/")[1]]
            self.answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif "/tree/" in path:
            files = REPOS[repo].items()
            rows = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in files]
            self.answer(json.dumps(rows).encode())
        else:
            siblings = [{"rfilename": name} for name in REPOS[repo]]
            self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download_takes_what_a_base_needs(endpoint: str, tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": str(Path(fetch.__file__).parents[2]),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "AHL_CACHE": str(tmp_path / "cache"),
        "NO_PROXY": "*",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    good, pickle, none, last = done.stdout.splitlines()
    assert good == " ".join(["hub org/good", COMMIT, *sorted(KEPT)])
    assert pickle.startswith("BaseUnavailable")
    assert "only in pickle files" in pickle
    assert "no such model" in none
    size = sum(len(body) for body in KEPT.values())
    assert last == f"Progress(title='download org/good', done={size}, total={size}, unit='B')"

"""A small Hub on this machine: repositories with commits, downloads, and the calls that a push makes.

Clients run in processes of their own, because the Hub's client reads its settings once, when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import adapterhub_lite

TOKEN = "hf_CANARYcanaryCANARY"
LFS = ".safetensors"
Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits by hash, branches and tags by name; `files` of main."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> Files:
        return self.commits[self.refs["main"]]

    def commit(self, files: Files, ref: str = "main") -> str:
        """Point a branch at a new state; its hash."""
        commit = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit


class FakeHub:
    """The server and all it knows. `faults` maps `repo` or `repo/file` to what goes wrong there."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: dict[str, Any] = {}
        self.ignored: set[str] = set()
        self.before_file: Callable[[str, str], object] = lambda repo, name: None
        self.after_info: Callable[[str], object] = lambda repo: None
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, files: Files, private: bool = False) -> str:
        """Make a repository; the hash of its first commit."""
        self.repos[repo] = Repo(private)
        return self.repos[repo].commit(files)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a client process sees: this Hub, and folders of its own below `home`."""
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        places = {"HF_HOME": home / "hf", "HOME": home, "TMPDIR": home / "tmp", "AHL_HOME": home / "store"}
        return {
            **{name: str(path) for name, path in places.items()},
            **({"HF_TOKEN": token} if token else {}),
            "PYTHONPATH": str(Path(adapterhub_lite.__file__).parents[1]),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
        }


def python(*arguments: str, env: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a client to its end."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**env, **more}, timeout=120)


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None: ...

    @property
    def path_(self) -> str:
        return unquote(self.path.split("?")[0])

    def do_GET(self) -> None:
        self._note()
        path = self.path_
        if path.startswith("/cdn/"):
            self._send(200, self.hub.stored[path.removeprefix("/cdn/")])
        elif path.startswith("/api/models/"):
            self._info(*path.removeprefix("/api/models/").partition("/revision/")[::2])
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            commit, _, name = rest.partition("/")
            self._file(repo, commit, name)
        else:
            self._fail(404)

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path_
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(401, message="Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/objects/batch"):
            self._batch(json.loads(body))
        elif "/preupload/" in path:
            self._preupload(path.removeprefix("/api/models/").partition("/preupload/")[0], json.loads(body))
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], lines)
        else:
            self._fail(404)

    def do_PUT(self) -> None:
        self._note()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.stored[hashlib.sha256(data).hexdigest()] = data
        self._send(200)

    # --- reading ---

    def _info(self, repo: str, revision: str) -> None:
        found = self._open(repo)
        if found is None:
            return
        commit = found.refs.get(revision or "main", revision)
        if commit not in found.commits:
            self._fail(404, "RevisionNotFound")
            return
        siblings = [self._sibling(name, data) for name, data in found.commits[commit].items()]
        changes = self.hub.faults.get(f"{repo} info", {})
        self._json({"id": repo, "sha": commit, "private": found.private, "siblings": siblings, **changes})
        self.hub.after_info(repo)

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        told: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
        if name.endswith(LFS):
            sha256 = hashlib.sha256(data).hexdigest()
            told |= {"blobId": "0" * 40, "lfs": {"size": len(data), "sha256": sha256, "pointerSize": 130}}
        return told

    def _file(self, repo: str, commit: str, name: str) -> None:
        found = self._open(repo)
        if found is None:
            return
        self.hub.before_file(repo, name)
        commit = found.refs.get(commit, commit)
        data, fault = found.commits[commit][name], self.hub.faults.get(f"{repo}/{name}")
        if isinstance(fault, int):
            self._fail(fault)
        elif fault == "gated":
            self._fail(403, "GatedRepo")
        elif fault == "breaks off":
            self._send(200, data[: len(data) // 2], length=len(data))
            self.close_connection = True
        elif callable(fault):
            self._send(200, fault(data))
        elif name.endswith(LFS):  # as the Hub does: to a host that must not see the login
            digest = hashlib.sha256(data).hexdigest()
            self.hub.stored[digest] = data
            self._send(302, location=f"http://localhost:{self.hub.port}/cdn/{digest}?signature=secret")
        else:
            self._send(200, data)

    def _open(self, repo: str) -> Repo | None:
        """The repository, if this request may see it; else it is answered."""
        fault = self.hub.faults.get(repo)
        found = self.hub.repos.get(repo)
        if fault == "gated":
            self._fail(403, "GatedRepo", "Access is restricted.")
        elif isinstance(fault, int):
            login = self.headers.get("Authorization", "")
            self._fail(fault, message=f"The token {login.removeprefix('Bearer ')} is no use ({login})")
        elif found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._fail(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
        else:
            return found
        return None

    # --- writing ---

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "forbidden":
            self._fail(403, message="You don't have the rights to create a model under this namespace.")
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        self._json({"url": f"{self.hub.endpoint}/{repo}"})

    def _preupload(self, repo: str, asked: dict[str, Any]) -> None:
        there = self.hub.repos[repo].files
        rows = []
        for entry in asked["files"]:
            name, known = entry["path"], there.get(entry["path"])
            lfs = name.endswith(LFS)
            oid = None if known is None else hashlib.sha256(known).hexdigest() if lfs else git_blob(known)
            mode, ignored = ("lfs" if lfs else "regular"), name in self.hub.ignored
            rows.append({"path": name, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self._json({"files": rows})

    def _batch(self, asked: dict[str, Any]) -> None:
        rows = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": rows})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        if self.hub.faults.get(f"{repo} commit"):
            self._fail(self.hub.faults[f"{repo} commit"])
            return
        found = self.hub.repos[repo]
        files = dict(found.files)
        for line in lines:
            told = line["value"]
            if line["key"] == "file":
                files[told["path"]] = base64.b64decode(told["content"])
            elif line["key"] == "lfsFile":
                files[told["path"]] = self.hub.stored[told["oid"]]
        found.messages.append(lines[0]["value"]["summary"])
        commit = found.commit(files)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    # --- answers ---

    def _note(self) -> None:
        host = self.headers.get("Host", "").partition(":")[0]
        self.hub.requests.append((self.command, f"{host}{self.path_}", self.headers.get("Authorization")))

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), content_type="application/json")

    def _fail(self, status: int, code: str = "", message: str = "") -> None:
        self._send(status, x_error_code=code, x_error_message=message)

    def _send(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

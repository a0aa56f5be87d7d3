"""A stand-in of the Hugging Face Hub on 127.0.0.1, with those parts of its HTTP interface by which a model is up- and downloaded.

Written from the interface that huggingface_hub speaks: repositories, branches, preupload, LFS batches with a PUT for each file, and
commits as lines of JSON; the tree of a branch, and each of its files. It keeps what it gets, and can be told to fail, or be slow.
"""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".mp4", ".png")  # what a new repository's .gitattributes has in LFS


@dataclass
class Branch:
    """A branch's files by path, and a number of commits, which its newest commit is named by."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 1

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class Repository:
    private: bool
    branches: dict[str, Branch] = field(default_factory=lambda: {"main": Branch()})
    large: dict[str, bytes] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)


class Hub:
    """The stand-in. `users` has the user of each token; `faults` has requests to fail, once each: a part of the path, and a status
    or "drop". Files are sent at `rate` bytes a second, each in ten parts; None: at once.
    """

    def __init__(self) -> None:
        self.users: dict[str, str] = {"hf_me": "me"}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.faults: list[tuple[str, int | str]] = []
        self.rate: float | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].branches[branch].files

    def sent(self, part: str) -> list[str]:
        """The requests whose method and path have a part."""
        return [request for request in self.requests if part in request]


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", url: str = "") -> None:
        self.status, self.code = status, code
        self.answer = {"error": message, "url": url}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if fault[0] in path:
                self.hub.faults.remove(fault)
                if fault[1] == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                self._send(int(fault[1]), {"error": "the stand-in was told to fail"})
                return
        try:
            if "/resolve/" in path:
                self._send_file(path)
            else:
                self._send(200, self._do(path, body))
        except _Refused as refused:
            self._send(refused.status, refused.answer, refused.code)

    def _send(self, status: int, answer: Any, code: str = "") -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status >= 400:
            self.send_header("X-Error-Message", answer["error"])
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(text)

    def _send_file(self, path: str) -> None:
        repo, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        branch = self._branch(self._repository(repo), revision)
        if name not in branch.files:
            raise _Refused(404, f"no file {name}", "EntryNotFound")
        content = branch.files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", branch.sha)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        part = max(1, len(content) // 10)
        for start in range(0, len(content), part):
            self.wfile.write(content[start : start + part])
            self.wfile.flush()
            if self.hub.rate:
                time.sleep(part / self.hub.rate)

    def _user(self) -> str:
        user = self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def _do(self, path: str, body: bytes) -> Any:
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":  # addresses of a store that knows no users
            self._repository("/".join(parts[1:3])).large[parts[3]] = body
            return {}
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"].split("---\n")[1]
            if not isinstance(yaml.safe_load(text), dict):
                raise _Refused(400, "not a mapping")
            return {"errors": [], "warnings": []}
        if path == "/api/whoami-v2":
            return {"name": self._user(), "type": "user"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(path.strip("/").split(".git/")[0], json.loads(body))
        return self._model("/".join(parts[2:4]), parts[4:], body)

    def _repository(self, repo: str) -> Repository:
        if repo not in self.hub.repositories:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo]

    def _may_write(self, owner: str) -> None:
        if owner != self._user():
            raise _Refused(403, f"You don't have the rights to write in the namespace {owner}")

    def _create(self, wanted: dict[str, Any]) -> Any:
        owner = wanted.get("organization") or self._user()
        self._may_write(owner)
        self.hub.created.append(wanted)
        repo = f"{owner}/{wanted['name']}"
        if repo in self.hub.repositories:
            raise _Refused(409, "You already created this model repo", url=f"{self.hub.address}/{repo}")
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.repositories[repo] = Repository(private)
        return {"url": f"{self.hub.address}/{repo}"}

    def _batch(self, repo: str, wanted: dict[str, Any]) -> Any:
        self._may_write(repo.partition("/")[0])
        large = self._repository(repo).large
        objects = []
        for each in wanted["objects"]:
            actions = {"upload": {"href": f"{self.hub.address}/lfs/{repo}/{each['oid']}"}}
            objects.append(each if each["oid"] in large else {**each, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def _model(self, repo: str, rest: list[str], body: bytes) -> Any:
        found = self._repository(repo)
        what, name = rest or ["revision", "main"]
        if what == "branch":
            self._may_write(repo.partition("/")[0])
            if name in found.branches:
                raise _Refused(409, "Reference already exists")
            found.branches[name] = Branch(dict(found.branches["main"].files))
            return {}
        branch = self._branch(found, name)
        if what == "revision":
            siblings = [{"rfilename": path, "size": len(content)} for path, content in branch.files.items()]
            about = {"id": repo, "sha": branch.sha, "private": found.private, "cardData": found.card}
            return {**about, "siblings": siblings}
        if what == "tree":
            return [_entry(path, content) for path, content in branch.files.items()]
        self._may_write(repo.partition("/")[0])
        if what == "preupload":
            files = [(each["path"], branch.files.get(each["path"])) for each in json.loads(body)["files"]]
            return {"files": [_mode(path, there) for path, there in files]}
        for line in body.splitlines():
            self._commit(found, branch, json.loads(line))
        branch.commits += 1
        return {"commitUrl": f"{self.hub.address}/{repo}/commit/{branch.sha}", "commitOid": branch.sha}

    def _branch(self, found: Repository, name: str) -> Branch:
        by_commit = {branch.sha: branch for branch in found.branches.values()}
        branch = found.branches.get(name) or by_commit.get(name)
        if branch is None:
            raise _Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return branch

    def _commit(self, found: Repository, branch: Branch, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "header":
            self.hub.messages.append(value["summary"])
        elif line["key"] == "file":
            branch.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = found.large.get(value["oid"], b"")
            if hashlib.sha256(content).hexdigest() != value["oid"]:
                raise _Refused(422, f"{value['path']} has not been uploaded")
            branch.files[value["path"]] = content
        else:
            raise _Refused(400, f"unknown operation {line['key']}")


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree of a branch names it."""
    sha = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": sha[:40]}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
    return entry


def _mode(path: str, there: bytes | None) -> dict[str, Any]:
    """How a file is to be sent, and by what hash it is there already."""
    is_large = path.endswith(LARGE)
    answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
    if there is None:
        return answer
    blob = b"blob %d\0" % len(there) + there
    return {**answer, "oid": hashlib.sha256(there).hexdigest() if is_large else hashlib.sha1(blob).hexdigest()}

"""A Hub on the loopback interface, as much of it as huggingface_hub's client asks for, with faults on demand."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

OWNERS = {"hf_writer": ("me", "write"), "hf_reader": ("me", "read"), "hf_stranger": ("stranger", "write")}


class Repository:
    """Branches that point at commits, which are whole listings; nothing is ever half of one."""

    def __init__(self, private=False, files=None):
        self.private, self.branches, self.commits = private, {}, {}
        self.commit("main", files or {".gitattributes": b""})

    def commit(self, branch, files):
        said = json.dumps([branch, len(self.commits), sorted(files)]).encode()
        self.branches[branch] = sha = hashlib.sha1(said).hexdigest()
        self.commits[sha] = dict(files)
        return sha

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.resolve(revision)]


class Hub:
    """`with Hub() as hub:` serves at `hub.endpoint`. `hub.repositories` is what it holds."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self._faults: list[dict] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def fail(self, path_part, status=None):
        """The next request whose path holds `path_part` gets this status or, without, a cut in the middle."""
        self._faults.append({"part": path_part, "status": status})

    def fault(self, path):
        found = next((fault for fault in self._faults if fault["part"] in path), None)
        if found:
            self._faults.remove(found)
        return found

    def add_folder(self, repo_id, folder, private=False):
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        self.repositories[repo_id] = Repository(private, files)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(path)
        if fault and fault["status"] is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if fault:
            self.reply(fault["status"], {"error": "injected"})
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in OWNERS:
            self.reply(401, {"error": "no"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        self.user, self.role = OWNERS.get(token, (None, None))
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            if self.user is None:
                self.reply(401, {"error": "no"})
            else:
                self.reply(200, {"name": self.user, "type": "user", "auth": {"accessToken": {"role": self.role}}})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(body)["content"])
            self.reply(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})
        elif parts[0] == "api" and parts[1] in ("models", "spaces") and len(parts) >= 4:
            kind = "spaces/" * (parts[1] == "spaces")
            self.model(f"{kind}{parts[2]}/{parts[3]}", parts[4:], body)
        elif parts[0] == "spaces" and len(parts) >= 6 and parts[3] == "resolve":
            self.resolve("/".join(parts[:3]), parts[4], "/".join(parts[5:]))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(404, {"error": "not found"})

    def create(self, asked):
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        if self.role != "write" or not self.owns(repo_id):
            self.reply(403, {"error": "forbidden"}, {"X-Error-Message": "you may not"})
            return
        repo_id = f"spaces/{repo_id}" if asked.get("type") == "space" else repo_id
        known = repo_id in self.hub.repositories
        if not known:
            self.hub.repositories[repo_id] = Repository(asked.get("private") or asked.get("visibility") == "private")
        self.reply(409 if known else 200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def owns(self, repo_id):
        return repo_id.removeprefix("spaces/").startswith(f"{self.user}/")

    def repository(self, repo_id, revision):
        """The repository and the commit, or an answer that there is none."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self.owns(repo_id)):
            self.reply(401 if self.user is None else 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        elif found.resolve(revision) is None:
            self.reply(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return found, found.resolve(revision)
        return None, None

    def model(self, repo_id, rest, body):
        asks = rest[0] if rest else "revision"
        revision = "main" if asks == "branch" or len(rest) < 2 else rest[1]
        found, sha = self.repository(repo_id, revision)
        if found is None:
            return
        files = found.commits[sha]
        if self.command == "POST" and (self.role != "write" or not self.owns(repo_id)):
            self.reply(403, {"error": "forbidden"}, {"X-Error-Message": "you may not"})
        elif asks == "revision":
            siblings = [{"rfilename": path} for path in files]
            about = {
                "id": repo_id.removeprefix("spaces/"),
                "sha": sha,
                "private": found.private,
                "siblings": siblings,
                "tags": [],
            }
            self.reply(200, about)
        elif asks == "tree":
            self.reply(200, [{"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in files.items()])
        elif asks == "branch":
            known = rest[1] in found.branches
            found.branches.setdefault(rest[1], sha)
            self.reply(409 if known else 200, {})
        elif asks == "preupload":
            wanted = [entry["path"] for entry in json.loads(body)["files"]]
            oids = {path: git_oid(files[path]) if path in files else None for path in wanted}
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": oids[p]} for p in wanted]
            self.reply(200, {"files": modes})
        elif asks == "commit":
            after = dict(files)
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    after[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del after[entry["value"]["path"]]
            sha = found.commit(revision, after)
            url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
            self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        else:
            self.reply(404, {"error": "not found"})

    def resolve(self, repo_id, revision, path):
        found, sha = self.repository(repo_id, revision)
        if found is None:
            return
        if path not in found.commits[sha]:
            self.reply(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        content = found.commits[sha][path]
        self.reply(200, content, {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"'})

    def reply(self, status, content, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_errors(card: str) -> list[str]:
    """What the Hub would say of a card's metadata; the fields that we write, by its documentation."""
    try:
        data = yaml.safe_load(card.split("---\n")[1])
    except (IndexError, yaml.YAMLError) as error:
        return [f"no metadata: {error}"]
    errors = [f'"{name}" must be a string' for name in ("library_name", "pipeline_tag", "base_model")
              if not isinstance(data.get(name, ""), str)]  # fmt: skip
    errors += [f'"{name}" must be an array of strings' for name in ("tags", "datasets")
               if not all(isinstance(value, str) for value in data.get(name, []))]  # fmt: skip
    for model in data.get("model-index", []):
        for result in model["results"]:
            for part, needed in (("task", ["type"]), ("dataset", ["type", "name"])):
                errors += [f'"model-index": {part}.{name} is required' for name in needed if not result[part].get(name)]
            if not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                errors.append('"model-index": a metric needs type and value')
    return errors

"""Models by hub id: from huggingface_hub's cache on disk, and from a hub that this test is.

huggingface_hub reads its environment when it is imported, so every case is a process of its own.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_llama
from longspan import CheckpointError, InvalidArgument
from longspan import EngineConfig as Config
from longspan.hub import is_repo_id
from longspan.model_path import resolve_model

SHA = "a" * 40
OLD_SHA = "b" * 40
OTHER_FILES = {
    "modeling_internlm2.py": b"raise SystemExit('remote code was run')\n",
    "README.md": b"a card",
    "consolidated.safetensors": b"the weights a second time",
    "original/model.safetensors": b"and a third",
}

_ASK = """
import json, sys
from longspan import LongspanError, pipeline, EngineConfig
from longspan.model_path import resolve_model
model, options, load = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "load"
try:
    if load:
        with pipeline(model, EngineConfig(dtype="float32", session_len=64, **options)) as pipe:
            print(pipe.get_ppl([1, 2, 3])[0])
    else:
        print(resolve_model(model, **options))
except LongspanError as error:
    print(type(error).__name__, error)
"""


def ask(home: Path, model: str, load: bool = False, env: Any = (), **options: Any) -> str:
    """What resolve_model, or a pipeline, says in a process with this HF_HOME."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **dict(env)}
    environment["XDG_CACHE_HOME"] = str(home / "cache")
    done = subprocess.run(
        [sys.executable, "-c", _ASK, model, json.dumps(options), "load" if load else "resolve"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(path)
    own = {file.name: file.read_bytes() for file in path.iterdir()}
    return own | OTHER_FILES


def cache(home: Path, files: dict[str, bytes], repo: str = "org/tiny") -> Path:
    """Lays a model out as huggingface_hub's cache; returns its snapshot."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    for revision, sha in (("main", SHA), ("v1", OLD_SHA)):
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(sha)
        snapshot = root / "snapshots" / sha
        snapshot.mkdir(parents=True)
        (root / "blobs").mkdir(exist_ok=True)
        for name, content in files.items():
            if "/" in name or name in OTHER_FILES:
                continue
            blob = root / "blobs" / hashlib.sha1(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return root / "snapshots" / SHA


OFFLINE = {"HF_HUB_OFFLINE": "1"}


def test_what_is_cached_is_used_offline(tmp_path: Path, files: dict[str, bytes]) -> None:
    snapshot = cache(tmp_path, files)
    assert ask(tmp_path, "org/tiny", env=OFFLINE) == str(snapshot)
    assert ask(tmp_path, "org/tiny", env=OFFLINE, revision="v1") == str(snapshot.parent / OLD_SHA)
    assert ask(tmp_path, "org/tiny", env=OFFLINE, revision=SHA) == str(snapshot)
    assert float(ask(tmp_path, "org/tiny", load=True, env=OFFLINE)) > 1
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "hub").rename(elsewhere)
    found = ask(tmp_path, "org/tiny", env=OFFLINE, download_dir=str(elsewhere))
    assert found.startswith(str(elsewhere))


def test_what_is_not_cached_says_so_offline(tmp_path: Path, files: dict[str, bytes]) -> None:
    cache(tmp_path, files)
    for model, options in (("org/other", {}), ("org/tiny", {"revision": "v2"})):
        said = ask(tmp_path, model, env=OFFLINE, **options)
        assert said.startswith("CheckpointError"), said
        assert "HF_HUB_OFFLINE is set" in said and f"hf download {model}" in said


def test_a_hub_that_cannot_be_reached(tmp_path: Path, files: dict[str, bytes]) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": "1"}
    said = ask(tmp_path, "org/tiny", env=nobody)
    assert said.startswith("CheckpointError org/tiny: "), said
    assert "cannot be reached" in said
    snapshot = cache(tmp_path, files)  # what is there is used all the same
    assert ask(tmp_path, "org/tiny", env=nobody) == str(snapshot)


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as a download of a snapshot asks for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/org/gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/broken"):
            self._send(500, b"{}")
        elif path == "/api/models/org/tiny/revision/v9":
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/tiny/revision/"):
            names = [{"rfilename": name} for name in self.files]
            self._send_json({"id": "org/tiny", "sha": SHA, "siblings": names})
        elif path.startswith("/api/models/org/tiny/tree/"):
            self._send_json(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for name, content in self.files.items()
                ]
            )
        elif path.startswith("/org/tiny/resolve/"):
            content = self.files[path.split("/", 5)[5]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": SHA})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Any = ()) -> None:
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[tuple[dict[str, str], type[_Hub]]]:
    handler = type("Hub", (_Hub,), {"files": dict(files), "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_only_what_is_needed_is_downloaded_and_once(
    tmp_path: Path, hub: tuple[dict[str, str], type[_Hub]], files: dict[str, bytes]
) -> None:
    env, handler = hub
    path = Path(ask(tmp_path, "org/tiny", env=env))
    assert {file.name for file in path.iterdir()} == files.keys() - OTHER_FILES.keys()
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]
    handler.asked.clear()
    assert float(ask(tmp_path, "org/tiny", load=True, env=env)) > 1
    assert not [line for line in handler.asked if line.startswith("GET /org/tiny/resolve")]
    assert ask(tmp_path, "org/tiny", env=OFFLINE) == str(path)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("org/absent", {}, "org/absent: expected a model directory, a .gguf file or a model of"),
        ("org/gated", {}, "org/gated: expected access to this gated model"),
        ("org/broken", {}, "org/broken: expected "),
        ("org/tiny", {"revision": "v9"}, "org/tiny: revision: expected a branch, tag or commit"),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path,
    hub: tuple[dict[str, str], type[_Hub]],
    model: str,
    options: dict[str, Any],
    expected: str,
) -> None:
    said = ask(tmp_path, model, env=hub[0], **options)
    assert said.startswith(f"CheckpointError {expected}"), said


def test_a_model_without_safetensors_names_the_option(
    tmp_path: Path, hub: tuple[dict[str, str], type[_Hub]], files: dict[str, bytes]
) -> None:
    env, handler = hub
    del handler.files["model.safetensors"]
    handler.files["pytorch_model.bin"] = b"a pickle"
    said = ask(tmp_path, "org/tiny", env=env)
    assert said.startswith("CheckpointError org/tiny: expected weights in model.safetensors"), said
    assert "use_safetensors=False" in said
    assert not [line for line in handler.asked if "pytorch_model" in line]
    said = ask(tmp_path, "org/tiny", env=env, use_safetensors=False)  # which asks for them
    assert "pytorch_model.bin: expected weights saved by torch" in said
    assert [line for line in handler.asked if line.startswith("GET") and "pytorch_model" in line]


def test_what_is_written_as_an_id(tmp_path: Path) -> None:
    for name in ("org/name", "internlm/internlm2_5-7b-chat-1m", "Qwen/Qwen2.5-7B", "o/n"):
        assert is_repo_id(name)
    for name in (
        "name",
        "/name",
        "./name",
        "../name",
        "a/b/c",
        "org/",
        "~/name",
        "a/..",
        "a b/c",
        "",
    ):
        assert not is_repo_id(name)
    here = tmp_path / "models"
    here.mkdir()
    with pytest.raises(CheckpointError, match="got nothing there"):
        resolve_model(here / "absent")


@pytest.mark.parametrize(
    "options", [{"revision": 3}, {"revision": ""}, {"download_dir": 1}, {"use_safetensors": "no"}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=f"{next(iter(options))}: expected"):
        Config(**options)

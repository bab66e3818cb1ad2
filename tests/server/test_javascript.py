"""OpenAI's JavaScript client hears the same as its Python twin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from books import with_template, words
from served import TOOLS, served, until

import pi_gguf
from pi_gguf.server.guard import Rules

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "js"
MODULE = FOLDER / "node_modules" / "openai" / "index.mjs"
SAID = [{"role": "user", "content": "Who keeps the lighthouse?"}]
PARAMETERS = {
    "type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [1, 2]}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def module() -> Path:
    """The client, installed once into a folder that git does not see."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs Node.js with npm")
    if not MODULE.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(FOLDER), "--no-audit", "--no-fund", "--ignore-scripts", "openai@7"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"npm cannot install openai: {done.stderr[-300:]}")
    return MODULE


def test_every_endpoint(module, tiny_gguf, tmp_path):
    path = with_template(tiny_gguf, tmp_path / "tiny-chat.gguf", TOOLS)
    with pi_gguf.open(path, n_ctx=2048) as model:
        completion = "".join(model.complete("Once upon a time", max_tokens=24))
        chat = "".join(model.chat(SAID, max_tokens=24))
        ends = {str(token): -100 for token in range(model.n_vocab) if model.is_end(token)}
    tool = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
    with served(path, tmp_path, rules=Rules(key="a key"), n_ctx=2048) as server:
        asked = {
            "KEY": "a key", "MODEL": "tiny-chat", "TOOL": json.dumps(tool), "ENDLESS": json.dumps(ends),
            "BOOK": words(200),
        }  # fmt: skip
        done = subprocess.run(
            ["node", str(Path(__file__).parent / "openai_client.mjs"), server.url, str(module)],
            env={**os.environ, **asked}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        until(lambda: server.engine.figures().busy == 0)
        assert server.engine.figures().cancelled == 1, "the stream that was left"
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout)
    assert heard["models"] == ["tiny-chat"]
    assert heard["completion"] == heard["completionStream"] == heard["tokens"] == completion
    assert heard["chat"] == heard["chatStream"] == chat and heard["usage"] == heard["chatStreamUsage"] > 17
    assert [call["name"] for call in heard["calls"]] == ["add"]
    assert set(json.loads(heard["calls"][0]["arguments"])) == set(json.loads(heard["response"])) == {"a", "b"}
    assert heard["events"] == ["response.created", "response.completed"]
    assert heard["errors"] == [
        [400, "invalid_request_error", "n"], [404, "not_found_error", "model"],
        [400, "exceed_context_size_error", None], [401, "authentication_error", None],
    ]  # fmt: skip
    assert heard["document"] == ["document", "book.txt"] and heard["quotes"] is True

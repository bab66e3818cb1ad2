"""The commands that ready a file for other programs, and what they print for people."""

from __future__ import annotations

from typing import Any

from pi_gguf.cli.building import command


def _show_ollama(model: Any) -> str:
    from pi_gguf.common.files import human_bytes

    stops = " ".join(model.stop) or "none; Ollama ends where the file says"
    template = "none: Ollama passes text on as it is"
    if model.has_template:
        template = f"left to the file; ollama show --template {model.name} says what Ollama took it for"
    create, run = model.commands
    return (
        f"wrote {model.path}\n  num_ctx: {model.num_ctx}; its cache takes {human_bytes(model.cache_bytes)}\n"
        f"  stop: {stops}\n  template: {template}\nnext: {create}\n      {run}"
    )


EXPORTS = {
    "ollama": (
        "Write a Modelfile for Ollama.",
        lambda: command("pipeline.ollama:export_ollama", _show_ollama, name="ollama"),
    ),
}

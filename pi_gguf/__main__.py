"""`python -m pi_gguf` is `pi-gguf`."""

from pi_gguf.cli import entry_point

entry_point()

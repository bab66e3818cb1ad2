"""`python -m pi_gguf` is `pi-gguf`."""

from pi_gguf.cli.app import entry_point

entry_point()

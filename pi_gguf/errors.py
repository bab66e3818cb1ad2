"""The errors a user can meet, each with the exit code of the command line.

PiGgufError              1   base; any of the below
├── OptionError          2   a chosen value cannot work
├── CheckpointError      3   the checkpoint is missing, partial or inconsistent
│   └── UnsupportedError 4   the checkpoint is sound, but not a model or a feature that is handled
├── TextError            5   the text is missing, empty or too short
├── GgufError            6   the GGUF file is unreadable or lacks a key
├── CheckError           7   what was written differs from the plan or from the Hugging Face model
├── ResourceError        8   it does not fit in memory or on disk
└── CertificateError     9   a file measures less than was required

Everything else that is raised is a bug. Ctrl-C exits with 130.
"""

from __future__ import annotations


class PiGgufError(Exception):
    """A problem the user can act on: what is wrong, and one action that helps.

    Args:
        message: one line, `path: what is wrong` or `name must rule, got value`.
        hint: one action.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class OptionError(PiGgufError):
    exit_code = 2


class CheckpointError(PiGgufError):
    exit_code = 3


class UnsupportedError(CheckpointError):
    exit_code = 4


class TextError(PiGgufError):
    exit_code = 5


class GgufError(PiGgufError):
    exit_code = 6


class CheckError(PiGgufError):
    exit_code = 7


class ResourceError(PiGgufError):
    exit_code = 8


class CertificateError(PiGgufError):
    exit_code = 9

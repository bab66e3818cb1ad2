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

A message is two lines: what is wrong, and a hint. Everything else that is raised is a bug. A signal exits with 128 and
its number: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP; what is temporary is deleted, what a run goes on with is kept.
"""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Return what an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class PiGgufError(Exception):
    """A problem the user can act on: what is wrong, and one action that helps.

    Args:
        message: one line, `path: what is wrong` or `name must rule, got value`.
        hint: one action; the kind's own when left out.
    """

    exit_code = 1
    usual_hint = "--debug shows where it comes from"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class OptionError(PiGgufError):
    exit_code = 2
    usual_hint = "--help shows what each option takes"


class CheckpointError(PiGgufError):
    exit_code = 3
    usual_hint = "save or download the checkpoint again, or correct that file"


class UnsupportedError(CheckpointError):
    exit_code = 4
    usual_hint = "pi-gguf models lists what is converted"


class TextError(PiGgufError):
    exit_code = 5
    usual_hint = "give text files in UTF-8, longer than the window"


class GgufError(PiGgufError):
    exit_code = 6
    usual_hint = "write or download the file again; pi-gguf inspect shows what it states"


class CheckError(PiGgufError):
    exit_code = 7
    usual_hint = "convert again; if it differs again, say so with the versions of pi-gguf and llama-cpp-python"


class ResourceError(PiGgufError):
    exit_code = 8
    usual_hint = "close other programs, or choose something smaller"


class CertificateError(PiGgufError):
    exit_code = 9
    usual_hint = "fine-tune longer, or require less"


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

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
        hint: one action; that of the class when left out.
    """

    exit_code = 1
    advice = "pi-gguf --help lists the commands"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.advice


class OptionError(PiGgufError):
    exit_code = 2
    advice = "the command with --help says what its options take"


class CheckpointError(PiGgufError):
    exit_code = 3
    advice = "correct the file, or download or save the model again"


class UnsupportedError(CheckpointError):
    exit_code = 4
    advice = "pi-gguf models lists what is handled"


class TextError(PiGgufError):
    exit_code = 5
    advice = "give another text: a file, or a folder of them"


class GgufError(PiGgufError):
    exit_code = 6
    advice = "pi-gguf inspect shows what a file states; copy or convert it again"


class CheckError(PiGgufError):
    exit_code = 7
    advice = "convert the model again, from a folder that holds nothing else"


class ResourceError(PiGgufError):
    exit_code = 8
    advice = "free some memory or disk, or take a smaller model or window"


class CertificateError(PiGgufError):
    exit_code = 9
    advice = "pi-gguf inspect shows what was measured"

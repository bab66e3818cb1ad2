"""Which tensors of a checkpoint lie in which tensor of a GGUF file.

In: a `Checkpoint`, whose tensors need not be there yet. Out: a `Place` for each tensor of the file but the factors of
the rotation's frequencies. Writing goes from left to right, unpacking back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pi_gguf.checkpoint.checkpoint import Checkpoint
from pi_gguf.errors import UnsupportedError
from pi_gguf.families.family import Transform
from pi_gguf.gguf.file import tensor_namer

NUMBERED = re.compile(r"(\.experts)\.\d+\.|\.norms\.\d+\.")
"""Parts that a checkpoint stores one by one and GGUF as one tensor: experts, and norms of single heads."""


@dataclass(frozen=True)
class Place:
    """A tensor of a file and what it is made of.

    Args:
        written: GGUF's name.
        names: of the checkpoint's tensors; several are experts or heads, stacked along a new first dimension.
        stacked: whether they are.
        transform: what is done to the tensor then; None where nothing is.
    """

    written: str
    names: list[str]
    stacked: bool
    transform: Transform | None


def places(checkpoint: Checkpoint, names: Iterable[str]) -> list[Place]:
    """Return where tensors of a checkpoint go, in the order of the names.

    Raises:
        UnsupportedError: a tensor that GGUF has no name for.
    """
    family = checkpoint.family
    gguf_name = tensor_namer(family.arch, checkpoint.n_layers)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(NUMBERED.sub(r"\1.", name), []).append(name)
    found = []
    for merged, parts in groups.items():
        parts.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
        written = gguf_name(family.rename(merged))
        if written is None:
            raise UnsupportedError(
                f"{checkpoint.path}: {merged} has no place in a GGUF file of {family.arch}",
                "llama.cpp takes the embedding for the head of this family; set tie_word_embeddings to true only if "
                "they are one"
                if merged in checkpoint.untied_heads
                else "llama.cpp has no such variant of this family",
            )
        found.append(Place(written, parts, merged != parts[0], family.transform(merged)))
    return found

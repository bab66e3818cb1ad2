"""GPUs by name, for plans of machines that are not here: what each has, and how it is spelled.

In: words like `8xH100-80GB`, `4090` or `2x8xA100-80GB` (machines x cards x kind). Out: how many of which `Card`.
Rates are of dense products in bf16 that add up in 32 bits. Sources: NVIDIA's data sheets of B200, H200, H100, A100,
L40S, L4, A10, RTX A6000 and RTX 6000 Ada; of GeForce cards the white papers of GA102, AD102 and GB202. The memory is
the "total capacity" that torch names in its errors on such a card, a little below what stands on the box.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pi_gguf.errors import OptionError

_HOPPER = "7 B parameters took 0.32 on an H200, other runs 0.19 to 0.31 (recipes/gpu)"
_OTHERS = (
    "assumed: torchtitan reached 0.52 to 0.58 on A100 and 0.39 on H100, where ours is 0.30 (its docs/performance.md, "
    "benchmarks/llama3_h100_202412_torchtitan.md)"
)


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Args:
        name: with the memory on its box.
        memory_gib: that torch sees.
        tera_operations: a second, in 10^12: dense, bf16.
        bandwidth: of its memory, GB/s.
        link: to the other cards of its machine, GB/s in one direction: NVLink, or PCIe of 16 lanes.
        network: to those of other machines, GB/s in one direction; assumed: 400 Gb/s a card beside Hopper and
            Blackwell, 200 beside A100, and 100 for all eight of the others.
        share: of its rate that training reaches; operations that are computed again do not count.
        share_source: where that comes from.
    """

    name: str
    memory_gib: float
    tera_operations: float
    bandwidth: float
    link: float
    network: float = 12.5 / 8
    share: float = 0.40
    share_source: str = _OTHERS

    @property
    def free_bytes(self) -> int:
        """What training may take: CUDA itself, its libraries' and NCCL's buffers take the rest, about."""
        return int((self.memory_gib - 0.75) * 2**30)

    @property
    def operations_a_second(self) -> float:
        """What training is expected to compute."""
        return self.share * self.tera_operations * 1e12


CARDS = (
    Card("B200-180GB", 178.4, 2250, 7700, 900, 50, 0.30, f"assumed as of H200: {_HOPPER}"),
    Card("H200-141GB", 139.8, 989, 4800, 450, 50, 0.30, _HOPPER),
    Card("H100-80GB", 79.1, 989, 3350, 450, 50, 0.30, f"assumed as of H200: {_HOPPER}"),
    Card("H100-PCIe-80GB", 79.1, 756, 2000, 64, 50, 0.30, f"assumed as of H200: {_HOPPER}"),
    Card("A100-80GB", 79.15, 312, 2039, 300, 25),
    Card("A100-40GB", 39.4, 312, 1555, 300, 25),
    Card("L40S-48GB", 44.4, 362, 864, 32),
    Card("L4-24GB", 22.0, 121, 300, 32),
    Card("A10-24GB", 22.0, 125, 600, 32),
    Card("A6000-48GB", 47.5, 154.8, 768, 32),
    Card("6000-Ada-48GB", 47.5, 364, 960, 32),
    Card("5090-32GB", 31.3, 209.5, 1792, 64),
    Card("4090-24GB", 23.6, 165.2, 1008, 32),
    Card("4080-16GB", 15.7, 97.5, 717, 32),
    Card("3090-24GB", 23.6, 71, 936, 32),
)

_NO_NAMES = {"nvidia", "geforce", "rtx", "tesla", "sxm", "sxm4", "sxm5", "generation"}
"""Words of a card's name that tell nothing; so do those of its kind of memory, as HBM3."""

_MOST_CARDS, _MOST_MACHINES = 16, 512
_MEMORIES = {int(card.name.rsplit("-", 1)[1].removesuffix("GB")) for card in CARDS}


def parse_cards(text: str) -> tuple[int, int, Card]:
    """Read cards as a user writes them: how many machines, how many cards in each, and which.

    Raises:
        OptionError: not of the form, no such kind, or one of two memories.
    """
    known = f"known are {', '.join(card.name for card in CARDS)}"
    count = r"(?:([0-9]{1,6})\s*[x×*]\s*)?"
    match = re.fullmatch(rf"\s*{count}{count}([A-Za-z0-9][-A-Za-z0-9 _.,()/]*)", text, re.IGNORECASE)
    form = "CARD, nxCARD or machines x n x CARD, e.g. 8xH100-80GB, 4090 or 2x8xA100-80GB"
    if match is None:
        raise OptionError(f"on must be {form}, got {text!r}", known)
    counts, found = [int(n) for n in match.groups()[:2] if n], _kinds(match[3])
    if len(found) > 1:
        raise OptionError(f"on {text!r} is one of {' and '.join(card.name for card in found)}", "name its memory")
    if not found:
        raise OptionError(f"on must be {form}; no such card as {match[3].strip()!r}", known)
    nodes, each = [1, 1, *counts][-2:]
    if not (1 <= each <= _MOST_CARDS and 1 <= nodes <= _MOST_MACHINES):
        raise OptionError(
            f"on must be of 1 to {_MOST_CARDS} cards in each of 1 to {_MOST_MACHINES} machines, got {text!r}",
            f"more cards are more machines: 2x8x{found[0].name}",
        )
    return nodes, each, found[0]


def _kinds(text: str) -> list[Card]:
    """Return the cards that are called so, whatever makers and shops write around it."""
    words, memory = _words(text)
    own = [(card, *_words(card.name)) for card in CARDS]
    if "pcie" in words and all(words != theirs for _, theirs, _ in own):
        words -= {"pcie"}  # of a kind that is told apart by its memory alone
    return [card for card, theirs, box in own if words == theirs and memory in (None, box)]


def _words(name: str) -> tuple[frozenset[str], int | None]:
    """Split a name into what tells cards apart, and the memory where it is said, in GB."""
    joined = re.sub(r"(\d)\s*(?:gib|gb|g)\b", r"\1gb", name.lower())
    joined = re.sub(r"(\d)(ada)\b", r"\1 \2", joined)
    words = [word.removeprefix("rtx") for word in re.findall(r"[a-z0-9]+", joined)]
    words = [word for word in words if word and word not in _NO_NAMES and not word.startswith("hbm")]
    sizes = [word for word in words if re.fullmatch(r"\d+gb", word)]
    if not sizes and len(words) > 1 and words[-1].isdigit() and int(words[-1]) in _MEMORIES:
        sizes = words[-1:]
    memory = int(sizes[-1].removesuffix("gb")) if sizes else None
    return frozenset(words) - set(sizes), memory

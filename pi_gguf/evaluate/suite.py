"""What every suite does with its targets: check them, open one after another, go on from what is kept, record, draw.

In: targets, how they are opened, and what the suite leaves behind. Out: what the suite's own measure makes of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from pi_gguf.common.options import flag
from pi_gguf.common.provenance import provenance
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.options import SuiteOptions
from pi_gguf.measure.journal import Kept
from pi_gguf.measure.language_model import LanguageModel
from pi_gguf.measure.plots import check_plot
from pi_gguf.models.options import TargetOptions
from pi_gguf.models.targets import check_targets, choose_windows, identity, opened

T = TypeVar("T")


class Suite:
    """Targets of one suite, checked before long work.

    Args:
        models: targets.
        target: how they are opened; `ServerOptions` where a server may be asked.
        options: what is kept, drawn and recorded.
        draws_one: whether the plot shows one model only.

    Raises:
        OptionError: a target, the journal or the plot cannot be.
    """

    def __init__(
        self,
        models: Sequence[str | LanguageModel],
        target: TargetOptions,
        options: SuiteOptions,
        *,
        draws_one: bool = False,
    ) -> None:
        check_targets(models, target)
        check_plot(options.plot, options.overwrite, of_one=models if draws_one else ())
        self._models, self._target, self._options = models, target, options
        self._kept = Kept(options.keep)
        self.names: list[str] = []
        """Of the targets measured so far, as reports have them."""

    def windows(self, *, least: int = 2048) -> list[int]:
        """Return the windows to measure, in tokens: those asked for, or `least` and its doublings."""
        return choose_windows(self._options.windows, self._models, self._target, least=least)

    def measure(
        self,
        of_one: Callable[[LanguageModel, Kept], T],
        settings: dict[str, Any],
        *,
        n_ctx: int | None = None,
        at_most: int | None = None,
    ) -> list[T]:
        """Open one target after another, and return what `of_one` makes of each.

        Args:
            of_one: takes the open model, and the journal with what tells the target.
            settings: what else tells an item from another one.
            n_ctx: tokens to open it for; its own window when None.
            at_most: less than its own window, where that is enough.
        """
        found = []
        for model in self._models:
            kept = self._kept.under({**identity(model, **asdict(self._target)), **settings})
            with opened(model, self._target, n_ctx=n_ctx, at_most=at_most) as lm:
                self.names.append(lm.name)
                found.append(of_one(lm, kept))
        return found

    def record(self, **more: Any) -> dict[str, Any]:
        """Return the provenance of what was measured."""
        target = self._target
        return provenance(
            seed=self._options.seed, device=target.device, type_k=target.type_k, type_v=target.type_v, **more
        )


def check_counts(counts: Mapping[str, int]) -> None:
    """Check that options which count something are at least 1.

    Raises:
        OptionError: one is not.
    """
    for name, value in counts.items():
        if value < 1:
            raise OptionError(f"{flag(name)} must be at least 1, got {value}")

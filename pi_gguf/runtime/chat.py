"""A conversation with a model, about a document or about nothing in particular; what was read of it is not read again.

In: an open `Model` with a chat template, and what the user says. Out: what the model answers, and all of it
as Markdown.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pi_gguf.documents.quotes import Quote, find_quotes
from pi_gguf.errors import GgufError, OptionError, TextError
from pi_gguf.runtime.model import Model
from pi_gguf.runtime.reading import DOCUMENT, INTRODUCTION, TASK, Reading, choose_form
from pi_gguf.runtime.sampling import Sampling
from pi_gguf.runtime.session import Cancelled, Progress, Stopped, check_fits, never, silent
from pi_gguf.runtime.text import stream


@dataclass
class Conversation:
    """What was said so far, and what is said next.

    Args:
        model: an open model with a chat template.
        system: what stands before everything, for templates that have a place for it.
        reading: a document that it is about; read with the form `chat` and the same `system`.

    Raises:
        GgufError: the file has no chat template, or none that shows a document.
        OptionError: the document was read in another form, or with another `system`.

    Example:
        >>> with pi_gguf.open("m.gguf") as model:  # doctest: +SKIP
        ...     talk = Conversation(model)
        ...     print("".join(talk.say("Hello!")))
    """

    model: Model
    system: str | None = None
    reading: Reading | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    """What was said, in turn, by `user` and `assistant`, as it was typed and written."""

    def __post_init__(self) -> None:
        if self.reading and self.reading.form != choose_form(self.model, "chat", self.system):
            raise OptionError(
                f"{self.reading.document.name} was read in another form, or with another system",
                "read it in the form chat, with the system of the conversation",
            )

    def say(
        self, text: str, *, max_tokens: int | None = None, cancelled: Cancelled = never,
        on_progress: Progress = silent, **sampling: Any,
    ) -> Generator[str, None, str]:  # fmt: skip
        """Say something, and yield the answer as it comes; one that is left early counts as far as it came.

        Args:
            text: what to say.
            max_tokens: limit of the answer; as much as the window allows when None.
            cancelled: asked before each batch and token whether to stop.
            on_progress: told how many tokens were read, how many have to be, and how many were written.
            sampling: the fields of `Sampling`.

        Returns:
            Why it ended: stop, length or cancelled.

        Raises:
            GgufError: the file has no chat template, or none that can be run.
            OptionError: the conversation does not fit the window any more; nothing of it is ever cut.
            TextError: there is nothing to say.
        """
        if not text.strip():
            raise TextError("there is nothing to say", "write something")
        how = Sampling(**sampling)
        with self.model.turns(cancelled) as mine:
            if not mine:
                return "cancelled"
            return (yield from self._say(text, max_tokens, cancelled, on_progress, how))

    def _say(
        self, text: str, max_tokens: int | None, cancelled: Cancelled, on_progress: Progress, how: Sampling
    ) -> Generator[str, None, str]:
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []
        try:
            ids = self._ids()
            hint = "take back the last turns with /undo, or begin anew"
            room = check_fits("conversation", len(ids), self.model.n_ctx, max_tokens, hint)
            if self.reading:
                self.reading.read(cancelled=cancelled, on_progress=on_progress)
            tokens = self.model.session.write(
                ids, max_tokens or room, how, cancelled=cancelled, on_progress=on_progress
            )
            answer = stream(tokens, self.model.session.piece, how.stop)
            while True:
                try:
                    parts.append(next(answer))
                except StopIteration as end:
                    return str(end.value)
                yield parts[-1]
        except Stopped:
            return "cancelled"
        finally:
            if parts:
                self.messages.append({"role": "assistant", "content": "".join(parts)})
            else:
                self.messages.pop()

    def undo(self) -> bool:
        """Take back what was said last, and the answer; False where nothing was said."""
        if not self.messages:
            return False
        del self.messages[-2:]
        return True

    @property
    def tokens(self) -> int:
        """How many tokens of the window the conversation takes."""
        return len(self._ids()) if self.messages or self.reading else 0

    def quotes(self) -> list[Quote]:
        """Return what the last answer quotes of the document."""
        if self.reading is None or not self.messages:
            return []
        return find_quotes(self.messages[-1]["content"], self.reading.document)

    def to_markdown(self) -> str:
        """Return the conversation as Markdown."""
        about = f"# About {self.reading.document.name}\n\n" if self.reading else ""
        names = {"user": "**You:** ", "assistant": ""}
        return about + "\n\n".join(names[one["role"]] + one["content"].strip() for one in self.messages) + "\n"

    def _ids(self) -> list[int]:
        """Return the tokens of all that was said, up to where the model answers."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [dict(one) for one in self.messages or [{"role": "user", "content": ""}]]
        return conversation_ids(self.model, messages, self.reading)


def conversation_ids(
    model: Model, messages: Sequence[Mapping[str, Any]], reading: Reading | None = None, *, tools: Any = None
) -> list[int]:
    """Return the tokens of a conversation as the file's chat template writes it, up to where the model answers.

    Args:
        model: an open model with a chat template.
        messages: what was said, objects with `role` and `content`; one of them by `user`.
        reading: a document that it is about, which stands in the first message of the user.
        tools: what the template shows the model as tools.

    Raises:
        GgufError: the file has no chat template, or none that can be run or shows a document.
    """
    if reading is None:
        return model.chat_ids(messages, tools)
    first = next(i for i, one in enumerate(messages) if one["role"] == "user")
    asked = {**messages[first], "content": f"{INTRODUCTION}{DOCUMENT}{TASK}{messages[first]['content']}"}
    _, shown, rest = model.render([*messages[:first], asked, *messages[first + 1 :]], tools).partition(DOCUMENT)
    if not shown:
        raise GgufError(f"{model.path}: its chat template leaves out the first message", "begin anew: /read")
    between = reading.form.between
    if not rest.startswith(between):  # a template that writes a message otherwise when others follow
        return [*reading.document_ids, *model.rendered_ids(rest)]
    return [*reading.ids, *model.rendered_ids(rest[len(between) :])]

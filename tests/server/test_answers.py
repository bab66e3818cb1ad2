"""Answers in OpenAI's form: nothing of the text is lost or doubled, numbers are those of the engine."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator

import pytest

from pi_gguf.engine.jobs import Choice, Ended, Event, PromptScored, Read, Written
from pi_gguf.engine.library import UnknownDocument
from pi_gguf.errors import GgufError
from pi_gguf.server.answers import (
    ChatForm,
    CompletionForm,
    Echo,
    Gathered,
    Logprobs,
    Wanted,
    Within,
    chat_logprobs,
    gather,
    usage,
    with_usage,
)
from pi_gguf.server.protocol import ApiError
from pi_gguf.server.tools import Apart

END = Ended("stop", 5, 2, 3, 0.5, 0.25, 0.75)
STOP = 9
EURO = "€".encode()


def choice(piece: bytes, logprob: float = -1.0, *top: tuple[bytes, float], token: int = 0) -> Choice:
    return Choice(token, piece, logprob, tuple((1, *one) for one in top))


async def told(*events: Event) -> AsyncGenerator[Event, None]:
    for event in events:
        yield event


def streamed(form: CompletionForm | ChatForm, wanted: Wanted, *events: Event, echo: Echo | None = None) -> list[dict]:
    async def chunks() -> list[dict]:
        if isinstance(form, ChatForm):
            part = form.stream(told(*events), wanted)
        else:
            part = form.stream(3, told(*events), echo, wanted)
        return [value async for _, value in with_usage([part], form, wanted)]

    found = asyncio.run(chunks())
    assert len({(one["id"], one["model"], one["created"], one["object"]) for one in found}) == 1
    json.dumps(found, allow_nan=False)
    return found


def test_offsets_are_characters_whose_bytes_come_apart():
    logprobs = Logprobs()
    first = logprobs.of([None, choice(b" ab"), choice(EURO[:1])], Echo("ab€c", b"<s>", (b"", b"ab")))
    second = logprobs.of([choice(EURO[1:]), choice(b"c")])
    assert first["text_offset"] + second["text_offset"] == [0, 0, 2, 2, 3]
    assert first["tokens"] + second["tokens"] == ["<s>", " ab", "bytes:\\xe2", "bytes:\\x82\\xac", "c"]
    assert first["token_logprobs"] == [None, -1.0, -1.0] and first["top_logprobs"][0] is None


def test_the_chosen_token_is_among_the_most_probable():
    told = Logprobs().of([choice(b"b", -3.0, (b"a", -0.5)), choice(b"a", -0.5, (b"a", -0.5), (b"a", -2.0))])
    assert told["top_logprobs"] == [{"a": -0.5, "b": -3.0}, {"a": -0.5}]


def test_minus_infinity_has_a_number():
    choices = [choice(b"b", -math.inf, (b"a", -math.inf))]
    assert Logprobs().of(choices)["token_logprobs"] == [-9999.0]
    told = chat_logprobs(choices, lambda _: False)["content"][0]
    assert told["logprob"] == told["top_logprobs"][0]["logprob"] == -9999.0


def test_a_chat_tells_bytes_and_leaves_out_the_end():
    choices = [choice(EURO[:2], -1.0, (b"x", -2.0)), choice(b"", -0.1, token=STOP)]
    told = chat_logprobs(choices, lambda token: token == STOP)["content"]
    assert told == [
        {
            "token": "\ufffd", "bytes": [0xE2, 0x82], "logprob": -1.0,
            "top_logprobs": [{"token": "x", "bytes": [120], "logprob": -2.0}],
        }
    ]  # fmt: skip


def test_usage_is_of_all_prompts():
    assert usage(END, END) == {
        "prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16, "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip


def test_an_answer_that_did_not_end_is_an_error():
    for last in (Written("a"), Ended("cancelled", 1, 0, 1, 0, 0, 0)):
        found = asyncio.run(gather(told(Read(0, 1, 0), last)))
        with pytest.raises(ApiError) as error:
            _ = found.end
        assert error.value.status == 503


def test_a_completion_streams_text_progress_and_usage():
    found = streamed(
        CompletionForm("m"), Wanted(usage=True, progress=True), Read(0, 3, 2), Read(3, 3, 2), Written("one"),
        Written(""), Written(" two"), END,
    )  # fmt: skip
    assert [one.get("prompt_progress", {}).get("processed") for one in found[:2]] == [2, 5]
    assert found[0]["prompt_progress"]["total"] == 5 and found[0]["prompt_progress"]["cache"] == 2
    texts = [one["choices"][0]["text"] for one in found[:-1]]
    assert texts == ["", "", "one", " two", ""] and found[-2]["choices"][0]["finish_reason"] == "stop"
    assert all(one["choices"][0]["index"] == 3 and one["usage"] is None for one in found[:-1])
    assert found[-1]["choices"] == [] and found[-1]["usage"] == usage(END)
    assert found[-2]["timings"] == {"read_seconds": 0.5, "write_seconds": 0.25, "waited_seconds": 0.75}


def test_what_was_not_asked_for_is_not_told():
    found = streamed(CompletionForm("m"), Wanted(), Read(0, 3, 2), Written("one", (choice(b"one"),)), END)
    assert len(found) == 2 and found[0]["choices"][0]["logprobs"] is None
    assert not any("usage" in one or "prompt_progress" in one or "ended" in one for one in found)


def test_an_echo_comes_once_with_its_log_probabilities():
    scored, echo = PromptScored((None, choice(b"b"))), Echo("ab", b"a", (b"a", b"b"))
    found = streamed(CompletionForm("m"), Wanted(), Written("c"), END, echo=echo)
    assert [one["choices"][0]["text"] for one in found] == ["ab", "c", ""]
    found = streamed(CompletionForm("m"), Wanted(logprobs=True), scored, Written("c", (choice(b"c"),)), END,
                     echo=echo)  # fmt: skip
    assert [one["choices"][0]["text"] for one in found] == ["ab", "c", ""]
    assert [one["choices"][0]["logprobs"]["text_offset"] for one in found[:2]] == [[0, 1], [2]]


def test_held_text_has_its_log_probabilities():
    wanted = Wanted(logprobs=True)
    events = (Written("", (choice(EURO[:1]),)), Written("€", (choice(EURO[1:]),)), Written("x"), END)
    choices = [one["choices"][0] for one in streamed(CompletionForm("m"), wanted, *events)]
    assert [one["text"] for one in choices] == ["€", "x", ""]
    assert [len(one["logprobs"]["tokens"]) for one in choices if one["logprobs"]] == [2, 0]
    choices = [one["choices"][0] for one in streamed(ChatForm("m", lambda _: False), wanted, *events)]
    assert [one["delta"].get("content") for one in choices] == ["", "", "€", "x", None]
    assert [len(one["logprobs"]["content"]) for one in choices if one["logprobs"]] == [1, 1, 0]


def test_the_tokens_of_a_stop_string_are_no_part_of_a_completion():
    wanted, one, two, end = Wanted(logprobs=True), choice(b"one E"), choice(b"N"), choice(b"D two")
    events = (Written("one ", (one,)), Written("", (two,)), Written("", (end,)), END)
    choices = [part["choices"][0] for part in streamed(CompletionForm("m"), wanted, *events)]
    assert [(part["text"], (part["logprobs"] or {}).get("tokens")) for part in choices] == [
        ("one ", ["one E"]),
        ("", None),
    ]
    limit = Ended("length", 5, 2, 3, 0.5, 0.25, 0.75)
    choices = [part["choices"][0] for part in streamed(CompletionForm("m"), wanted, *events[:2], Written("EN"), limit)]
    assert [token for part in choices if part["logprobs"] for token in part["logprobs"]["tokens"]] == ["one E", "N"]
    by_the_model = Within()
    assert by_the_model.add("a", [choice(b"a"), choice(EURO[:1]), choice(b"", token=STOP)]) == [choice(b"a")]
    assert len(by_the_model.end("stop")) == 2, "the token that ends an answer is told"


@pytest.mark.parametrize("error", [UnknownDocument("doc-1"), GgufError("a: no text", "give it again")])
def test_an_answer_is_there_where_its_document_is_not_any_more(error):
    async def quotes(_: str) -> list[dict]:
        raise error

    form = ChatForm("m", lambda _: False, None, quotes)
    whole = asyncio.run(form.answer(Gathered("a", [], None, END), False))
    assert whole["choices"][0]["message"]["content"] == "a" and whole["quotes"] == []
    assert streamed(form, Wanted(), Written("a"), END)[-1]["quotes"] == []


def test_a_chat_streams_its_role_first_and_quotes_last():
    async def quotes(text: str) -> list[dict]:
        return [{"text": text}]

    form = ChatForm("m", lambda _: False, None, quotes)
    found = streamed(form, Wanted(progress=True), Read(0, 3, 2), Written("one"), Written(" two"), END)
    assert [one["choices"][0]["delta"] for one in found] == [
        {"role": "assistant", "content": ""}, {}, {"content": "one"}, {"content": " two"}, {},
    ]  # fmt: skip
    assert found[-1]["quotes"] == [{"text": "one two"}] and found[-1]["choices"][0]["finish_reason"] == "stop"


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def test_calls_are_streamed_with_numbers():
    form = ChatForm("m", lambda _: False, Apart(["add"], "hermes"))
    found = streamed(form, Wanted(), Written("I add." + CALL[:20]), Written(CALL[20:]), Written(CALL), END)
    deltas = [one["choices"][0]["delta"] for one in found]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]) for call in calls] == [
        (n, {"name": "add", "arguments": '{"a": 1}'}) for n in (0, 1)
    ]
    assert "".join(delta.get("content", "") for delta in deltas) == "I add."
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_whole_answer_with_calls_has_no_content():
    form = ChatForm("m", lambda _: False, Apart(["add"], "hermes"))
    answer = asyncio.run(form.answer(Gathered(CALL, ended=END), False))
    message = answer["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["name"] == "add"
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_an_empty_answer_is_an_empty_text():
    answer = asyncio.run(ChatForm("m", lambda _: False).answer(Gathered("", ended=END), False))
    assert answer["choices"][0]["message"]["content"] == "" and "tool_calls" not in answer["choices"][0]["message"]

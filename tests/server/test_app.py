"""The server as clients meet it: OpenAI's own client over every endpoint, streaming and not, and what goes wrong."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from books import with_template, words
from served import TOOLS, Served, served, until

import pi_gguf
from pi_gguf.server.guard import Rules

WINDOW = 2048
SAID = [{"role": "user", "content": "Who keeps the lighthouse?"}]
KEY = "a key for this test"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
YES_OR_NO = {
    "type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tiny_gguf, tmp_path_factory) -> Path:
    return with_template(tiny_gguf, tmp_path_factory.mktemp("served") / "tiny-chat.gguf", TOOLS)


@pytest.fixture(scope="module")
def server(path, tmp_path_factory) -> Iterator[Served]:
    with served(path, tmp_path_factory.mktemp("kept"), n_ctx=WINDOW) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.fixture(scope="module")
def alone(path) -> dict[str, str]:
    """What the model writes by itself: greedy, and after a conversation."""
    with pi_gguf.open(path, n_ctx=WINDOW) as model:
        return {
            "completion": "".join(model.complete("Once upon a time", max_tokens=24)),
            "chat": "".join(model.chat(SAID, max_tokens=24)),
            "drawn": "".join(model.complete("Once upon a time", max_tokens=24, temperature=0.9, seed=5)),
        }


MODEL = "tiny-chat"


def complete(client: openai.OpenAI, **options: object):
    return client.completions.create(
        **{"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, **options}
    )


def chat(client: openai.OpenAI, **options: object):
    return client.chat.completions.create(**{"model": MODEL, "messages": SAID, "max_tokens": 24, **options})


# The model


def test_the_model_is_listed(client, http, path):
    models = list(client.models.list())
    assert [model.id for model in models] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
    meta = http.get("/v1/models").json()["data"][0]["meta"]
    assert meta["n_ctx"] == WINDOW and meta["slots"] == 2 and meta["chat"] and meta["form"] == "chat"
    assert meta["size"] == path.stat().st_size and meta["measured"] is None and "never measured" in meta["trust"]
    assert meta["n_params"] > 1_000_000


def test_another_model_is_not_there(client):
    for ask in (complete, chat):
        with pytest.raises(openai.NotFoundError) as error:
            ask(client, model="gpt-5")
        assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


# Completions


def test_a_completion_is_what_the_model_writes_alone(client, alone):
    answer = complete(client)
    assert answer.choices[0].text == alone["completion"] and answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.model == MODEL and answer.id.startswith("cmpl-")
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert answer.model_extra["timings"].keys() == {"read_seconds", "write_seconds", "waited_seconds"}


def test_a_stream_is_the_same_text(client, alone):
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == alone["completion"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert all(chunk.usage is None for chunk in list(complete(client, stream=True)))


def test_a_seed_repeats_what_was_drawn(client, alone):
    assert complete(client, temperature=0.9, seed=5).choices[0].text == alone["drawn"]
    assert len({complete(client, temperature=0.9).choices[0].text for _ in range(4)}) > 1


def test_a_stop_string_ends_and_is_no_part(client, alone):
    stop = alone["completion"][9:13]
    expected = alone["completion"][: alone["completion"].index(stop)]
    scored = complete(client, stop=stop, logprobs=0).choices[0]
    assert scored.text == expected and all(offset < len(expected) for offset in scored.logprobs.text_offset)
    for stops in (stop, ["never there", stop]):
        for stream in (False, True):
            answer = complete(client, stop=stops, stream=stream)
            chunks = list(answer) if stream else [answer]
            assert "".join(chunk.choices[0].text for chunk in chunks) == expected
            assert chunks[-1].choices[0].finish_reason == "stop"


def test_few_tokens_are_written_where_no_number_is_given(client):
    assert client.completions.create(model=MODEL, prompt="Once").usage.completion_tokens == 16


def test_prompts_are_answered_in_their_order(client, server):
    prompts = ["Once upon a time", "The sea", "A ship", "Once upon a time"]
    together = complete(client, prompt=prompts, max_tokens=8)
    texts = [complete(client, prompt=prompt, max_tokens=8).choices[0].text for prompt in prompts]
    assert [(one.index, one.text) for one in together.choices] == list(enumerate(texts))
    ids = [server.engine.model.tokenize(prompt) for prompt in prompts]
    assert [one.text for one in complete(client, prompt=ids, max_tokens=8).choices] == texts
    assert complete(client, prompt=ids[1], max_tokens=8).choices[0].text == texts[1]
    parts = ["", "", "", ""]
    for chunk in complete(client, prompt=prompts, max_tokens=8, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == texts
    assert together.usage.prompt_tokens == sum(map(len, ids)) and together.usage.completion_tokens == 32


def expected_logprobs(server: Served, ids: list[int]) -> np.ndarray:
    """The log-probabilities of tokens after the first, by the model itself."""
    with pi_gguf.open(server.engine.model.path, n_ctx=WINDOW) as model:
        logits = np.concatenate(list(model.logits_chunks(ids, len(ids)))).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_scores_the_prompt(client, server, max_tokens):
    text = "Once upon a time there was a house by the sea, and nobody"
    ids = server.engine.model.tokenize(text)
    expected = expected_logprobs(server, ids)
    for prompt in (text, ids):
        choice = complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens).choices[0]
        told = choice.logprobs
        assert choice.text.startswith(text) and len(told.tokens) == len(ids) + max_tokens
        assert told.token_logprobs[0] is None
        shown = list(zip(told.tokens, told.text_offset, strict=True))[1:]
        assert all(choice.text.startswith(token, offset) for token, offset in shown), shown
        np.testing.assert_allclose(told.token_logprobs[1 : len(ids)], expected, atol=2e-3)
        assert all(token in top for token, top in zip(told.tokens[1:], told.top_logprobs[1:], strict=True))
    whole = complete(client, prompt=text, echo=True, logprobs=1, max_tokens=4)
    chunks = [c.choices[0] for c in complete(client, prompt=text, echo=True, logprobs=1, max_tokens=4, stream=True)]
    assert "".join(one.text for one in chunks) == whole.choices[0].text
    tokens = [token for one in chunks for token in (one.logprobs.tokens if one.logprobs else [])]
    offsets = [offset for one in chunks for offset in (one.logprobs.text_offset if one.logprobs else [])]
    assert tokens == whole.choices[0].logprobs.tokens and offsets == whole.choices[0].logprobs.text_offset


def test_the_end_is_among_the_log_probabilities(client, server, alone):
    """Of a completion, as programs count on one a token that was asked for; a chat leaves it out."""
    model = server.engine.model
    ids = [*model.chat_ids(SAID), *model.tokenize(alone["chat"], add_special=False)]
    answer = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1)
    told = answer.choices[0].logprobs
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 0
    assert len(told.tokens) == len(told.token_logprobs) == len(ids) + 1 and told.token_logprobs[-1] > -1
    content = chat(client, logprobs=True).choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == alone["chat"]


def test_an_echo_without_log_probabilities_is_text(client, alone):
    assert complete(client, echo=True).choices[0].text == "Once upon a time" + alone["completion"]
    parts = [chunk.choices[0].text for chunk in complete(client, echo=True, stream=True)]
    assert parts[0] == "Once upon a time" and "".join(parts[1:]) == alone["completion"]


def test_log_probabilities_are_of_what_was_written(client, server):
    choice = complete(client, logprobs=3).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text and len(told.tokens) == 24
    assert all(max(top, key=top.get) == token for token, top in zip(told.tokens, told.top_logprobs, strict=True))
    assert all(len(top) == 3 for top in told.top_logprobs) and told.text_offset[:2] == [0, len(told.tokens[0])]
    ids = server.engine.model.tokenize("Once upon a time" + choice.text)
    if len(ids) == len(server.engine.model.tokenize("Once upon a time")) + 24:
        np.testing.assert_allclose(told.token_logprobs, expected_logprobs(server, ids)[-24:], atol=2e-3)


def test_sampling_reaches_the_engine(client, alone):
    first = complete(client, max_tokens=1, logprobs=1)
    token = next(iter(first.choices[0].logprobs.top_logprobs[0]))
    assert token == first.choices[0].text
    grammar = complete(client, extra_body={"grammar": 'root ::= "yes" | "no"'})
    assert grammar.choices[0].text in ("yes", "no") and grammar.choices[0].finish_reason == "stop"
    schema = complete(client, extra_body={"json_schema": YES_OR_NO}, max_tokens=100)
    assert json.loads(schema.choices[0].text)["answer"] in ("yes", "no")
    assert complete(client, frequency_penalty=2, presence_penalty=2).choices[0].text != alone["completion"]
    assert complete(client, extra_body={"repeat_penalty": 5}).choices[0].text != alone["completion"]
    assert complete(client, temperature=1, seed=1, extra_body={"top_k": 1}).choices[0].text == alone["completion"]


def test_a_bias_forbids_a_token(client, server):
    ids = server.engine.model.tokenize("Once upon a time")
    first = complete(client, prompt=ids, max_tokens=1).choices[0].text
    candidates = [
        i for i in range(server.engine.model.n_vocab) if server.engine.model.session.piece(i) == first.encode()
    ]
    assert candidates
    answer = complete(client, prompt=ids, max_tokens=1, logit_bias={str(i): -100 for i in candidates})
    assert answer.choices[0].text != first


# Chats


def test_a_chat_is_what_the_model_answers_alone(client, alone):
    answer = chat(client)
    message = answer.choices[0].message
    assert message.content == alone["chat"] and message.role == "assistant" and message.tool_calls is None
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason == "stop"
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == alone["chat"]
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_what_was_read_is_counted_as_cached(client):
    messages = [{"role": "user", "content": words(120)}]
    chat(client, messages=messages)
    details = chat(client, messages=messages).usage
    assert details.prompt_tokens - details.prompt_tokens_details.cached_tokens <= 2


def test_parts_and_both_limits(client, alone):
    parts = [{"role": "user", "content": [{"type": "text", "text": SAID[0]["content"]}]}]
    assert chat(client, messages=parts).choices[0].message.content == alone["chat"]
    answer = client.chat.completions.create(model=MODEL, messages=SAID, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5


def test_a_special_token_in_a_message_is_text(client):
    empty, evil = (
        chat(client, messages=[{"role": "user", "content": text}], max_tokens=1).usage.prompt_tokens
        for text in ("", "</s><s>")
    )
    assert evil >= empty + 4, "one token each if they were special"


def test_log_probabilities_of_a_chat(client):
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    told = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode() == choice.message.content
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob for one in told)
    chunks = [c.choices[0] for c in chat(client, logprobs=True, top_logprobs=2, stream=True)]
    streamed = [one for c in chunks if c.logprobs for one in c.logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in told]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_an_answer_has_the_form_that_was_asked_for(client):
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": YES_OR_NO, "strict": True}}
    for stream in (False, True):
        answer = chat(client, response_format=named, max_tokens=100, stream=stream)
        text = (
            "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        )
        assert json.loads(text)["answer"] in ("yes", "no")
    free = chat(client, response_format={"type": "json_object"}, max_tokens=200).choices[0].message.content
    assert free.lstrip().startswith("{")
    assert not re.search(r"[\0-\x1f]", free), "no control code stands in a string of JSON"


def test_reading_is_told_before_the_first_text(client):
    messages = [{"role": "user", "content": words(400, skip=3000)}]
    chunks = list(chat(client, messages=messages, stream=True, extra_body={"return_progress": True}))
    told = [chunk.model_extra.get("prompt_progress") for chunk in chunks]
    progress = [one for one in told if one]
    assert len(progress) >= 2 and progress[-1]["processed"] == progress[-1]["total"] > 400
    first_text = next(n for n, chunk in enumerate(chunks) if chunk.choices and chunk.choices[0].delta.content)
    assert max(n for n, one in enumerate(told) if one) < first_text
    assert not any(c.model_extra.get("prompt_progress") for c in chat(client, messages=messages, stream=True))


# Tools


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_demanded_call_is_made(client, choice):
    for stream in (False, True):
        answer = chat(client, tools=[ADD], tool_choice=choice, max_tokens=200, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            calls = [call for one in chunks for call in one.delta.tool_calls or []]
            assert chunks[-1].finish_reason == "tool_calls" and not any(one.delta.content for one in chunks)
            assert [call.index for call in calls] == [0]
        else:
            calls = answer.choices[0].message.tool_calls
            assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        assert calls[0].function.name == "add" and calls[0].id.startswith("call_")
        assert set(json.loads(calls[0].function.arguments)) == {"a", "b"}


def test_a_call_and_its_result_go_to_the_template(client, server):
    called = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [
        *SAID, {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "three"},
    ]  # fmt: skip
    template = [
        *SAID, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
        {"role": "tool", "content": "three"},
    ]  # fmt: skip
    text = server.engine.model.render(template, [ADD])
    assert '"arguments": {"a": 1, "b": 2}' in text and "Add two numbers." in text
    answer = chat(client, messages=messages, tools=[ADD], max_tokens=1)
    assert answer.usage.prompt_tokens == len(server.engine.model.chat_ids(template, [ADD]))


def test_no_tools_means_none(client):
    without = chat(client, max_tokens=1).usage.prompt_tokens
    assert chat(client, tools=[ADD], tool_choice="none", max_tokens=1).usage.prompt_tokens == without
    assert chat(client, tools=[ADD], max_tokens=1).usage.prompt_tokens > without
    assert chat(client, tools=[], max_tokens=1).usage.prompt_tokens == without


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(client, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **options)
    assert error.value.param == param


# Responses


def test_a_response(client, server):
    answer = client.responses.create(model=MODEL, input="Who is it?", instructions="Be short.", max_output_tokens=8)
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who is it?"}]
    expected = chat(client, messages=said, max_tokens=8)
    assert answer.output_text == expected.choices[0].message.content and answer.status == "incomplete"
    assert answer.usage.input_tokens == expected.usage.prompt_tokens and answer.usage.output_tokens == 8
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Who is it?"}]}]
    again = client.responses.create(model=MODEL, input=items, instructions="Be short.", max_output_tokens=8)
    assert again.output_text == answer.output_text


def test_a_response_streams_its_events(client):
    form = {"format": {"type": "json_schema", "name": "answer", "schema": YES_OR_NO}}
    with client.responses.stream(model=MODEL, input="Yes?", text=form, max_output_tokens=100) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed" and final.status == "completed"
    assert json.loads(final.output_text)["answer"] in ("yes", "no")
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == final.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


# Documents


def give(http: httpx.Client, text: str, name: str = "book.txt") -> dict:
    answer = http.post("/v1/documents", files={"file": (name, text.encode())})
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def test_a_document_is_given_asked_about_and_removed(client, http):
    entry = give(http, words(300))
    assert entry["object"] == "document" and entry["name"] == "book.txt" and entry["characters"] == len(words(300))
    assert http.post("/v1/documents", files={"file": ("book.txt", words(300).encode())}).status_code == 200
    assert entry["id"] in [one["id"] for one in http.get("/v1/documents").json()["data"]]
    events = [
        json.loads(line[5:])
        for line in http.get(f"/v1/documents/{entry['id']}/progress").text.splitlines()
        if line.startswith("data:")
    ]
    assert events[-1]["status"] == "kept" and events[-1]["read"] == events[-1]["tokens"]
    assert http.get(f"/v1/documents/{entry['id']}").json()["status"] == "kept"
    extra = {"document": entry["id"]}
    answer = chat(client, extra_body=extra)
    assert answer.usage.prompt_tokens_details.cached_tokens >= events[-1]["tokens"] - 1
    assert isinstance(answer.model_extra["quotes"], list)
    chunks = list(chat(client, extra_body=extra, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert chunks[-1].model_extra["quotes"] == answer.model_extra["quotes"]
    text = http.get(f"/v1/documents/{entry['id']}/text", params={"start": 3, "end": 20}).json()
    assert text["text"] == words(300)[3:20] and (text["start"], text["end"]) == (3, 20)
    assert http.post(f"/v1/documents/{entry['id']}/read").json()["id"] == entry["id"]
    looked = http.post(f"/v1/documents/{entry['id']}/looked", json={"messages": SAID, "answer": "the sea"}).json()
    assert abs(sum(one["share"] for one in looked["passages"]) - 1) < 0.01
    nowhere = http.post(f"/v1/documents/{entry['id']}/looked", json={"messages": SAID, "answer": "€€"})
    assert nowhere.status_code == 400 and nowhere.json()["error"]["param"] == "answer"
    gone = http.delete(f"/v1/documents/{entry['id']}")
    assert gone.json() == {"id": entry["id"], "object": "document", "deleted": True}
    for answer in (http.get(f"/v1/documents/{entry['id']}"), http.delete(f"/v1/documents/{entry['id']}")):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "document_not_found"
    with pytest.raises(openai.NotFoundError):
        chat(client, extra_body=extra)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd.txt", "passwd.txt"), ("..\\..\\windows\\system.txt", "system.txt"),
        ("/etc/hosts.txt", "hosts.txt"),
        ("a\u202etxt.exe.txt", "atxt.exe.txt"), ("x" * 300 + ".txt", "x" * 116 + ".txt"),
        ("...hidden.txt", "hidden.txt"),
        ("a\tb\u200b.txt", None), ("日本.txt", "日本.txt"),
    ],
)  # fmt: skip
def test_a_name_is_a_name_and_no_path(http, tmp_path, name, shown):
    entry = give(http, f"{words(60)} {name}", name)
    assert shown is None or entry["name"] == shown
    assert not any(c in entry["name"] for c in "/\\\u202e\u200b\t\0") and len(entry["name"]) <= 120
    assert http.delete(f"/v1/documents/{entry['id']}").status_code == 200


@pytest.mark.parametrize(
    ("files", "content"),
    [
        (None, b""), (None, b"--x\r\nbroken"), ({"other": ("a.txt", b"text")}, None), ({"file": ("a.txt", b"")}, None),
        ({"file": ("a.pdf", b"%PDF-1.4 broken")}, None), ({"file": ("a.docx", b"PK\x03\x04 broken")}, None),
        ({"file": ("a.xyz", b"\xff\xfe\x00\x01" * 9)}, None),
    ],
)  # fmt: skip
def test_what_is_no_document_is_refused(http, files, content):
    headers = {} if files else {"content-type": "multipart/form-data; boundary=x"}
    answer = http.post("/v1/documents", files=files, content=content, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
    assert "/tmp" not in answer.text


def test_a_document_that_is_too_long_has_both_numbers(http):
    answer = http.post("/v1/documents", files={"file": ("long.txt", words(4000).encode())})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "exceed_context_size_error"
    assert error["n_ctx"] == WINDOW < error["n_prompt_tokens"]


@pytest.mark.parametrize("query", ["start=-1", "start=x", "end=1.5", "start=9&end=3", "end=99999999", "start=²"])
def test_characters_that_are_not_there_are_refused(http, query):
    entry = give(http, words(50))
    answer = http.get(f"/v1/documents/{entry['id']}/text?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_markdown_is_rendered_harmless(http):
    answer = http.post("/v1/render", json={"markdown": "*a* <script>alert(1)</script> ![x](http://evil.example/x.png)"})
    html = answer.json()["html"]
    assert "<em>a</em>" in html and "<script" not in html and "<img" not in html and answer.json()["quotes"] == []
    entry = give(http, f"{words(50)} the lamp was lit at dusk")
    body = {"markdown": 'It says "the lamp was lit at dusk".', "document": entry["id"]}
    assert http.post("/v1/render", json=body).json()["quotes"][0]["found"] == "exact"


# The rest


def test_tokens_and_back(http, server):
    text = "The sea, é and €."
    ids = http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids == server.engine.model.tokenize(text, add_special=False)
    assert http.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"][1:] == ids
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"content": ""}
    assert http.post("/detokenize", json={"tokens": [server.engine.model.n_vocab]}).status_code == 400


def test_figures_are_those_of_the_engine(http, client, server):
    before = server.engine.figures()
    complete(client, max_tokens=3)
    lines = http.get("/metrics").text.splitlines()
    told = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    assert told["pi_gguf_requests_total"] == before.requests + 1 and told["pi_gguf_slots"] == 2
    assert told["pi_gguf_written_tokens_total"] == before.written_tokens + 3
    assert told["pi_gguf_cache_used"] == server.engine.figures().cache_used
    assert http.get("/health").json() == {"status": "ok"}


def test_the_page_is_kept_by_browsers_until_it_changes(http):
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.headers["cache-control"] == "no-cache"
    assert http.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    script = http.get("/desk/desk.js")
    assert script.headers["content-type"].startswith("text/javascript")
    for path in ("/desk/../app.py", "/desk/%2e%2e/app.py", "/desk/..%2fapp.py", "/desk/app.py", "/desk/", "/desk/%00"):
        assert http.get(path).status_code == 404, path


@pytest.mark.parametrize(
    ("method", "address", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1", 404), ("GET", "/v1/completions", 405), ("PUT", "/v1/models", 405),
     ("POST", "/", 405), ("GET", "/v1/documents/doc-0", 404), ("GET", "/v1/documents/..%2f..%2fetc", 404)],
)  # fmt: skip
def test_what_is_not_there_is_an_error_in_openais_form(http, method, address, status):
    answer = http.request(method, address)
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert (status == 405) == ("allow" in answer.headers)


def test_the_description_names_what_there_is(http):
    described = http.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/health", "/metrics", "/v1/models", "/v1/models/{id}", "/v1/completions", "/v1/chat/completions",
        "/v1/responses", "/tokenize", "/detokenize", "/v1/render", "/v1/documents", "/v1/documents/{id}",
        "/v1/documents/{id}/progress", "/v1/documents/{id}/read", "/v1/documents/{id}/stop", "/v1/documents/{id}/text",
        "/v1/documents/{id}/looked",
    }  # fmt: skip
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert len(named) > 20 and named <= set(described["components"]["schemas"])


# What does not work


def test_a_prompt_that_does_not_fit_has_both_numbers(client):
    for ask, options in (
        (complete, {"prompt": "word " * 3000}),
        (complete, {"max_tokens": 3000}),
        (chat, {"messages": [{"role": "user", "content": "word " * 3000}]}),
        (chat, {"max_tokens": 3000, "stream": True}),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, **options)
        assert error.value.type == "exceed_context_size_error"
        assert error.value.body["n_ctx"] == WINDOW and error.value.body["n_prompt_tokens"] > 3


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2}, {"best_of": 3}, {"suffix": "end"}, {"prompt": [5_000_000]}, {"prompt": [-1]},
        {"logit_bias": {"5000000": 1}}, {"extra_body": {"grammar": "root ::= ("}}, {"temperature": -1},
        {"extra_body": {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#/x"}}}}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_refused(client, options, stream):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, stream=stream, **options)
    assert "/" not in error.value.message.replace("grammars/README", "").replace("#/x", ""), "no folder of this machine"


def test_a_conversation_that_is_far_too_long_is_refused_before_its_template_is_run(http, server):
    much = "<|" * (32 * server.engine.model.n_ctx)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {much: {}}}}}
    for body in (
        {"messages": [{"role": "user", "content": much + "."}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [tool]},
    ):
        answer = http.post("/v1/chat/completions", json=body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "exceed_context_size_error", error
        assert "characters does not fit" in error["message"] and error["n_prompt_tokens"] > error["n_ctx"] == 2048
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": much[20:]}]})
    assert "characters" not in answer.json()["error"]["message"], "of others the tokens are counted"


def test_bad_json_is_refused(http):
    for content in (b"{", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 10_000, b"\xff\xfe"):
        answer = http.post("/v1/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_a_conversation_needs_a_template(tiny_gguf, tmp_path):
    with served(tiny_gguf, tmp_path, n_ctx=256) as server:
        client, name = server.client(), tiny_gguf.stem
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, model=name)
        assert "chat_template is missing" in error.value.message and str(tiny_gguf.parent) not in error.value.message
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, model=name, tools=[ADD])
        assert error.value.param == "tools"
        assert complete(client, model=name).usage.completion_tokens == 24


def test_a_key_is_asked_for(path, tmp_path):
    with served(path, tmp_path, rules=Rules(key=KEY), n_ctx=256) as server:
        with pytest.raises(openai.AuthenticationError):
            complete(server.client())
        assert complete(server.client(api_key=KEY), max_tokens=2).usage.completion_tokens == 2
        with server.http() as http:
            assert http.get("/").status_code == http.get("/health").status_code == 200
            assert http.get("/v1/documents").status_code == http.get("/metrics").status_code == 401
            assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
            assert http.post("/v1/documents", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_body_that_is_too_large_is_answered(http):
    answer = http.post("/v1/completions", content=b" " * (8 * 2**20 + 1))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"


def asked(server: Served, body: dict) -> socket.socket:
    """A connection on which something was asked for."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(server, stream):
    """Without an end and without text: nothing but the engine's figures tells that it was noticed."""
    before = server.engine.figures()
    body = {"messages": SAID, "max_tokens": 1900, "stream": stream, "grammar": "root ::= [a-z]+ root"}
    connection = asked(server, body)
    until(lambda: server.engine.figures().written_tokens > before.written_tokens)
    connection.close()
    until(lambda: server.engine.figures().busy == 0)
    after = server.engine.figures()
    assert after.cancelled == before.cancelled + 1 and after.written_tokens < before.written_tokens + 1900


def test_a_client_that_goes_away_while_it_waits_is_forgotten(server):
    body = {"messages": SAID, "max_tokens": 1900, "grammar": "root ::= [a-z]+ root", "stream": True}
    before = server.engine.figures()
    busy = [asked(server, {**body, "seed": n}) for n in range(2)]
    until(lambda: server.engine.figures().busy == 2)
    waiting = [asked(server, {**body, "stream": stream}) for stream in (True, False)]
    until(lambda: server.engine.figures().waiting == 2)
    for connection in waiting:
        connection.close()
    until(lambda: server.engine.figures().waiting == 0)
    assert server.engine.figures().busy == 2
    for connection in busy:
        connection.close()
    until(lambda: server.engine.figures().busy == 0)
    assert server.engine.figures().cancelled == before.cancelled + 4


def test_many_ask_at_once(server, alone):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(server.client()).choices[0].text, range(16)))
    assert answers == [alone["completion"]] * 16

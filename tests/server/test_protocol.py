"""Requests: what cannot be honoured is refused by name, what is not known is left aside, nothing is a bug of ours."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from pi_gguf.engine.jobs import QueueFull
from pi_gguf.engine.library import UnknownDocument
from pi_gguf.errors import GgufError, OptionError, ResourceError, TextError
from pi_gguf.runtime.session import TooLong
from pi_gguf.server.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    dumped,
    error_of,
    read_body,
)
from pi_gguf.server.responses import ResponseRequest

SAID = [{"role": "user", "content": "Hello"}]


def chat(**fields: object) -> ChatRequest:
    return read_body(json.dumps({"messages": SAID, **fields}).encode(), ChatRequest)


def complete(**fields: object) -> CompletionRequest:
    return read_body(json.dumps({"prompt": "Once", **fields}).encode(), CompletionRequest)


def refused(body: bytes | dict, kind: type = CompletionRequest) -> dict:
    with pytest.raises(ApiError) as error:
        read_body(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    assert error.value.status == 400
    return error.value.body["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff", b"{", b'{"prompt": NaN}', b'{"prompt": -Infinity}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "x": "\\udfff"}', b'{"\\ud800": 1, "prompt": "a"}', b"[" * 100_000,
        b'{"prompt": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", b'{"prompt": "a"} x', b'{"prompt": "\xed\xa0\x80"}',
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(body):
    assert refused(body)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [[], "text", 3, None])
def test_what_is_no_object_is_refused(body):
    assert "object" in refused(json.dumps(body).encode())["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", True), ("temperature", "0.5"), ("temperature", -1), ("temperature", 101),
        ("temperature", 1e-38), ("top_p", 0),
        ("top_p", 1.5), ("top_k", 0), ("top_k", 1.5), ("top_k", True), ("min_p", 1), ("repeat_penalty", 0),
        ("repeat_penalty", 1e-50),
        ("frequency_penalty", 3), ("presence_penalty", -2.1), ("seed", -1), ("seed", 2**63), ("seed", 1.0),
        ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", ["a"] * 17), ("n", 2), ("n", True), ("stream", 1),
        ("stream", "yes"), ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": True}), ("logit_bias", [1]), ("stream_options", []), ("model", 3), ("grammar", 3),
        ("json_schema", "x"), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True), ("logprobs", 21),
        ("logprobs", True), ("best_of", 2), ("suffix", "end"), ("echo", "yes"), ("prompt", None), ("prompt", []),
        ("prompt", [[]]), ("prompt", [1.5]), ("prompt", [True]), ("prompt", ["a", 1]), ("prompt", {"a": 1}),
        ("prompt", ["a"] * 257),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_honoured_is_refused_by_name(field, value):
    error = refused({"prompt": "Once", field: value})
    assert error["param"] == field and error["message"].startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []), ("messages", [{"role": "robot", "content": "a"}]), ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 3}]), ("messages", "Hello"), ("max_tokens", 0), ("logprobs", 3),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("max_completion_tokens", 0), ("top_logprobs", 3), ("response_format", {"type": "xml"}),
        ("tools", [{"type": "web_search"}]), ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tool_choice", "perhaps"), ("functions", []), ("function_call", "auto"), ("audio", {}),
        ("modalities", ["text", "audio"]), ("document", 3),
    ],
)  # fmt: skip
def test_a_chat_is_checked_as_well(field, value):
    assert refused({"messages": SAID, field: value}, ChatRequest)["param"] == field


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (CompletionRequest, "prompt", ["a", 1] * 100_000), (ChatRequest, "messages", [{"role": 3}] * 100_000),
        (DetokenizeRequest, "tokens", ["a"] * 100_000), (CompletionRequest, "prompt", [[1, "a"]] * 100_000),
        (CompletionRequest, "logit_bias", {f"a{n}": 1 for n in range(100_000)}),
        (CompletionRequest, "stop", [1] * 100_000), (ResponseRequest, "input", [3] * 100_000),
        (ChatRequest, "messages", [{"role": "user", "content": [3] * 100_000}]),
    ],
)  # fmt: skip
def test_a_hundred_thousand_faults_are_found_by_the_first(kind, field, value):
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"messages": SAID, "prompt": "a", field: value})
    assert error.value.error_count() < 12


@pytest.mark.parametrize(
    ("kind", "field", "one", "most"),
    [
        (ChatRequest, "messages", SAID[0], 10_000), (ResponseRequest, "input", SAID[0], 10_000),
        (ChatRequest, "tools", {"type": "function", "function": {"name": "a"}}, 10_000),
        (CompletionRequest, "prompt", "a", 256), (CompletionRequest, "prompt", [1], 256),
        (CompletionRequest, "prompt", 1, 2**20), (DetokenizeRequest, "tokens", 1, 2**20),
    ],
)  # fmt: skip
def test_no_more_are_looked_at_than_there_may_be(kind, field, one, most):
    body = {"messages": SAID, "prompt": "a"}
    assert len(getattr(read_body(json.dumps({**body, field: [one] * most}).encode(), kind), field)) == most
    error = refused({**body, field: [one] * (most + 1)}, kind)
    assert (
        error["param"] == field and f"{field}: must have at most {most:,} parts, got {most + 1:,}" in error["message"]
    )
    with pytest.raises(ValidationError) as found:  # not one of a hundred thousand wrong ones is reported before
        kind.model_validate({**body, field: [*[one] * most, *[3.5] * 100_000]})
    assert "parts, got" in str(found.value)


def test_a_message_has_so_many_parts_at_most():
    parts = [{"type": "text", "text": ""}]
    assert chat(messages=[{"role": "user", "content": parts * 10_000}]).messages[0].text() == ""
    error = refused({"messages": [{"role": "user", "content": parts * 10_001}]}, ChatRequest)
    assert "must have at most 10,000 parts, got 10,001" in error["message"]


def test_what_is_missing_is_named():
    assert refused(b"{}") == {
        "message": "prompt: field required", "type": "invalid_request_error", "param": "prompt",
        "code": "missing_required_parameter",
    }  # fmt: skip


def test_unknown_fields_and_nulls_are_left_aside():
    nulls = dict.fromkeys(("temperature", "stop", "n", "seed", "tools", "logprobs", "response_format", "functions"))
    asked = chat(**nulls, user="me", store=True, service_tier="auto", parallel_tool_calls=True)
    assert asked.sampling().temperature == 0 and asked.sampling().stop == () and asked.top is None


def test_fields_become_sampling():
    asked = complete(
        temperature=1, top_p=0.5, top_k=7, min_p=0.1, repeat_penalty=1.1, frequency_penalty=-2, presence_penalty=0.5,
        seed=2**32, stop=["a", "b"], logit_bias={"5": -100},
    )  # fmt: skip
    sampling = asked.sampling(["c"])
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 0.5, 7, 0.1)
    assert (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.1, -2, 0.5)
    assert (sampling.seed, sampling.stop, sampling.logit_bias) == (1, ("a", "b", "c"), {5: -100})
    assert complete(stop="end").sampling().stop == ("end",)


def test_without_a_seed_each_answer_has_its_own():
    assert len({complete().sampling().seed for _ in range(8)}) == 8


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_are_texts_or_tokens(prompt, prompts):
    assert complete(prompt=prompt).prompts() == prompts


def test_formats_are_schemas():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert chat(response_format=named).sampling().json_schema == schema
    assert chat(response_format={"type": "json_object"}).sampling().json_schema == {"type": "object"}
    assert chat(response_format={"type": "text"}).sampling().json_schema is None
    assert complete(json_schema=schema).sampling().json_schema == schema
    assert complete(grammar='root ::= "a"').sampling().grammar == 'root ::= "a"'
    for fields in (
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'},
        {"grammar": "root ::= ("},
        {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}},
    ):
        with pytest.raises(ApiError) as error:
            chat(**fields).sampling()
        assert error.value.status == 400 and error.value.body["error"]["param"] in fields


def test_messages_become_those_of_templates():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " short."}]},
            {"role": "user", "content": "Add.", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ]
    )
    called = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert [message.to_template() for message in asked.messages] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Add.", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize("arguments", ["[]", "{", "3"])
def test_arguments_of_a_call_are_an_object(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    asked = chat(messages=[*SAID, {"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(ApiError, match="arguments"):
        asked.messages[1].to_template()


def test_both_limits_of_a_chat():
    assert chat(max_tokens=3).limit == chat(max_completion_tokens=3).limit == 3
    assert chat(max_tokens=9, max_completion_tokens=3).limit == 3 and chat().limit is None
    assert chat(logprobs=True).top == 0 and chat(logprobs=True, top_logprobs=4).top == 4


@pytest.mark.parametrize("tokens", [[-1], [2**31], [1.0], [True], ["a"], 3])
def test_tokens_are_numbers(tokens):
    assert refused({"tokens": tokens}, DetokenizeRequest)["param"] == "tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "web_search"}]), ("previous_response_id", "resp_1"), ("background", True),
        ("input", [{"type": "function_call_output", "call_id": "1", "output": "2"}]), ("max_output_tokens", 0),
        ("conversation", "conv_1"), ("input", []),
    ],
)  # fmt: skip
def test_a_response_is_text_only(field, value):
    assert refused({"input": "Hello", field: value}, ResponseRequest)["param"] == field


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OptionError("n must be 1"), 400, "invalid_request_error"),
        (TextError("empty"), 400, "invalid_request_error"),
        (UnknownDocument("doc-1"), 404, "not_found_error"),
        (QueueFull(5, 7), 429, "rate_limit_error"),
        (TooLong("prompt", 10, 1, 8, "shorten it"), 400, "exceed_context_size_error"),
        (ResourceError("no memory"), 503, "server_error"),
        (GgufError("/home/me/a b/m.gguf: its logits are no numbers", "copy it"), 500, "server_error"),
        (GgufError("/home/me/a b/m.gguf: tokenizer.chat_template: roles"), 400, "invalid_request_error"),
    ],
)
def test_errors_of_ours_in_openais_form(error, status, kind):
    told = error_of(error, "/home/me/a b/m.gguf")
    assert (told.status, told.body["error"]["type"]) == (status, kind)
    assert "/home" not in told.body["error"]["message"] and "--" not in told.body["error"]["message"]
    if status == 429:
        assert told.headers == {"Retry-After": "7"}
    if "context" in kind:
        assert (told.body["error"]["n_prompt_tokens"], told.body["error"]["n_ctx"]) == (10, 8)


def test_other_files_have_their_names_only():
    told = error_of(ResourceError("/var/tmp/x/state.bin: no space left", "delete /var/tmp/old"), "/home/m.gguf")
    assert told.body["error"]["message"] == "state.bin: no space left; delete old"


def test_json_on_the_way_is_one_line_of_ascii():
    assert dumped({"a": "\u2028\x85é\n"}) == '{"a":"\\u2028\\u0085\\u00e9\\n"}'

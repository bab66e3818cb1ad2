"""Tools: calls are found as models write them, never invented; a demanded call is one that the schema allows."""

from __future__ import annotations

import json

import pytest

from pi_gguf.errors import OptionError
from pi_gguf.llamacpp.grammars import check_grammar
from pi_gguf.server.tools import Apart, as_answered, call_grammar, knows_tools, style_of

CALL = '{"name": "add", "arguments": {"a": 1, "b": "é"}}'
LLAMA = '{"name": "add", "parameters": {"a": 1, "b": "é"}}'
ARGUMENTS = {"a": 1, "b": "é"}


def apart(text: str, style: str, size: int) -> tuple[str, list]:
    """What an answer is taken apart to when it comes in parts of a size."""
    one, found, calls = Apart(["add", "sub"], style), "", []
    for start in range(0, len(text), size):
        more, called = one.add(text[start : start + size])
        found, calls = found + more, calls + called
    more, called = one.end()
    return found + more, calls + called


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("style", "text", "content", "names"),
    [
        ("hermes", f"I add.\n<tool_call>\n{CALL}\n</tool_call>", "I add.\n", ["add"]),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", "", ["add", "add"]),
        ("hermes", f"<tool_call>{CALL}", "", ["add"]),
        ("hermes", f"<tool_call>{CALL}</tool_call> That is it.", " That is it.", ["add"]),
        ("hermes", "a < b <tool> and <tool_cal", "a < b <tool> and <tool_cal", []),
        ("hermes", "<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "add", "arguments": 3}</tool_call>', None, []),
        ("hermes", CALL, CALL, []),
        ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", ["add", "add"]),
        ("mistral", f"Well [TOOL_CALLS] [{CALL}]", "Well ", ["add"]),
        ("mistral", "see [TOOL] here", "see [TOOL] here", []),
        ("bare", LLAMA, "", ["add"]),
        ("bare", f"\n{LLAMA}; {LLAMA}", "", ["add", "add"]),
        ("bare", f"<|python_tag|>{LLAMA}", "", ["add"]),
        ("bare", f'{{"type": "function", "function": {CALL}}}', "", ["add"]),
        ("bare", '{"answer": 4}', '{"answer": 4}', []),
        ("bare", '{"name": "Ann", "age": 4}', '{"name": "Ann", "age": 4}', []),
        ("bare", f"It is {LLAMA}", None, []),
        ("bare", "", "", []),
    ],
)
def test_calls_and_text_are_taken_apart(style, text, content, names, size):
    found, calls = apart(text, style, size)
    assert [call.name for call in calls] == names
    assert found == (text if content is None else content)
    assert all(json.loads(call.arguments) == ARGUMENTS for call in calls)


def test_only_what_may_be_a_call_is_held_back():
    hermes, bare = Apart(["add"], "hermes"), Apart(["add"], "bare")
    assert hermes.add("One < two <to")[0] == "One < two " and hermes.add("uch")[0] == "<touch"
    assert bare.add(' {"ans')[0] == ' {"ans' and bare.add('wer": 1')[0] == 'wer": 1'


@pytest.mark.parametrize(
    ("template", "known", "style"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False, "bare"),
        ("tools are nice {% for m in messages %}{{ m.content }}{% endfor %}", False, "bare"),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True, "bare"),
        ("{%- if tools is not none %}<tool_call>{% endif %}", True, "hermes"),
        ("{{ '[AVAILABLE_TOOLS]' + tools|tojson }}[TOOL_CALLS]", True, "mistral"),
    ],
)
def test_a_template_tells_whether_and_how(template, known, style):
    assert (knows_tools(template), style_of(template)) == (known, style)


@pytest.mark.parametrize("style", ["hermes", "mistral", "bare"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_grammar_of_a_call_is_one_that_llama_cpp_reads(style, count):
    parameters = {"type": "object", "properties": {"root": {"type": "integer"}}, "required": ["root"]}
    functions = [{"name": "add", "parameters": parameters}, {"name": "no-op", "parameters": None}][:count]
    grammar = call_grammar(functions, style)
    check_grammar(grammar)
    assert grammar.startswith("root ::=") and grammar.count("\nroot ::=") == 0


def test_a_schema_that_is_none_is_refused():
    with pytest.raises(OptionError, match="tools"):
        call_grammar([{"name": "add", "parameters": {"$ref": "#/nowhere"}}], "hermes")


def test_calls_have_names_of_their_own():
    one, calls = Apart(["add"], "mistral"), []
    one.add(f"[TOOL_CALLS][{CALL}, {CALL}]")
    calls = as_answered(one.end()[1], 3, streamed=True)
    assert [call["index"] for call in calls] == [3, 4] and len({call["id"] for call in calls}) == 2
    assert "index" not in as_answered(one.end()[1] or [], streamed=False)

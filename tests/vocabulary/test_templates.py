"""Chat templates: the text is the one of transformers, and no template costs more than its bounds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import pi_gguf
from pi_gguf.errors import CheckpointError, GgufError
from pi_gguf.gguf.header import Entry, read_header, write_changed
from pi_gguf.vocabulary.templates import MAX_SOURCE, check_template, render_chat

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Ünïcode <b>&amp;</b> 'quoted' \n\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And {{ this }}?"},
]
TEMPLATES = {
    "roles": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "blocks": "{{ bos_token }}\n  {%- for m in messages %}\n    {% if m.role == 'system' %}\n    {% continue %}\n"
    "    {% endif %}\n"
    "    {{- m.role | upper }}: {{ m.content }}\n    {% if loop.index == 3 %}{% break %}{% endif %}\n  {%- endfor %}\n",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}",
    "state": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% endfor %}"
    "{{ ns.n }}{% macro show(x) %}[{{ x }}]{% endmacro %}{{ show(pad_token) }}{{ dict(a=1).a }}",
    "tools": "{% if tools is not none %}{{ tools }}{% endif %}{% if documents %}{{ documents }}{% endif %}"
    "{{ tools is defined }}{{ sep_token is defined }}{{ messages[-1]['content'].split('?')[0] }}"
    "{{ strftime_now('%Y') }}",
    "training": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_text_that_transformers_makes(name, llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = "</s>"
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    ours = render_chat(TEMPLATES[name], MESSAGES, tokenizer.special_tokens_map, "model.gguf")
    assert ours == expected and ours


BOMBS = {
    "{{ 'A' * 10**10 }}": "more than 1024 MiB",
    "{{ [1]*10**9 }}": "more than 1024 MiB",
    "{{ 'x'|indent(10**10) }}": "more than 1024 MiB",
    "{{ '%9000000000d' % 1 }}": "chat_template",
    "{{ range(10**9)|list }}": "Range too big",
    "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}": "writes more than",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "nested too deeply",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000: "nested too deeply",
    "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}": "nested too deeply",
    "{{ " + "9" * 9000 + " }}": "broken",
    "x" * (MAX_SOURCE + 1): "characters",
    "{{ ''.__class__.__base__.__subclasses__() }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% break %}": "outside loop",
    "{{ messages + 1 }}": "concatenate",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{% for": "broken",
    "{{ 1 | no_such_filter }}": "no_such_filter",
    "{{ 1 is no_such_test }}": "no_such_test",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ '\\ud800' }}": "half a surrogate",
}


@pytest.mark.parametrize("template", BOMBS, ids=lambda text: text[:30])
def test_a_template_that_costs_too_much_or_fails_is_an_error(template):
    started = time.monotonic()
    with pytest.raises(GgufError, match=BOMBS[template]) as refused:
        render_chat(template, MESSAGES, {}, "model.gguf")
    assert "without the chat template" in refused.value.hint
    assert str(refused.value).startswith("model.gguf: tokenizer.chat_template") and "\n" not in str(refused.value)
    assert time.monotonic() - started < 20


def test_a_template_that_runs_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr("pi_gguf.vocabulary.templates._CPU_SECONDS", 1)
    loop = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    with pytest.raises(GgufError, match=r"takes more than 1 s"):
        render_chat(loop, MESSAGES, {}, "model.gguf")


def test_what_a_checkpoint_has_for_a_template_is_parsed_only():
    check_template("{{ 'A' * 10**10 }}{% break %}", "chat_template")  # harmless where it is not run
    for wrong in (5, None, ["a"], {"a": 1}, "\ud800", "{% if %}"):
        with pytest.raises(CheckpointError, match="chat_template") as refused:
            check_template(wrong, "chat_template")
        assert refused.value.hint


def templated(source: Path, out: Path, template: str) -> Path:
    write_changed(read_header(source).changed({"tokenizer.chat_template": Entry.of(template)}), out)
    return out


@pytest.fixture(scope="module")
def plain_file(llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "model.gguf"
    pi_gguf.convert(str(llama), out, quant="F32", check="none")
    return out


@pytest.mark.parametrize("template", ["{{ 'A' * (3*10**9) }}", "{% break %}", "{% for"])
def test_a_file_opens_and_completes_whatever_its_template_is(template, plain_file, tmp_path, cli):
    path = templated(plain_file, tmp_path / "bomb.gguf", template)
    assert cli("inspect", path)[0] == 0
    assert cli("run", path, "--prompt", "a", "--max-tokens", "2")[0] == 0
    code, _, err = cli("run", path, "--prompt", "a", "--max-tokens", "2", "--chat")
    assert code == 6 and [line.partition(":")[0] for line in err.splitlines()[-2:]] == ["error", "hint"]


@pytest.mark.parametrize("name", ["<s>", "</s>"])
def test_the_name_of_a_special_token_is_none_wherever_a_client_writes_it(name, plain_file, tmp_path):
    path = templated(plain_file, tmp_path / "tools.gguf", "{{ tools | tojson }}{{ messages | tojson }}")
    with pi_gguf.open(path, n_ctx=512) as model:
        (special,) = model.tokenize(name, add_special=False)
        for value in (name, {"a": name}, {name: "a"}, {"a": [{f"b{name}c": {name: 1}}]}):
            ids = model.chat_ids([{"role": "user", "content": name, "name": name}], [value])
            assert special not in ids
            text = b"".join(map(model.session.piece, ids)).decode()
            assert name in text and json.loads(text[: text.index("]" + "[{")] + "]") == [value]


def test_a_conversation_is_read_as_transformers_tokenizes_it(plain_file, llama, tmp_path):
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    path = templated(plain_file, tmp_path / "chat.gguf", template)
    expected = AutoTokenizer.from_pretrained(llama).apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True
    )["input_ids"]
    with pi_gguf.open(path, n_ctx=512) as model:
        assert isinstance("".join(model.chat(MESSAGES, max_tokens=3)), str)
        assert model.session.ids[: len(expected)] == expected


@pytest.mark.parametrize(
    "template",
    [5, {"a": 1}, [{"name": "default"}], ["x"], [{"name": 5, "template": "x"}], "\ud800", "{% if 1 %}" * 2000],
)
def test_a_template_of_another_kind_is_refused_with_two_lines(template, llama_copy, tmp_path, cli):
    path = llama_copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    code, _, err = cli("convert", llama_copy, tmp_path / "out.gguf", "--quant", "F32", "--check", "none")
    assert code in (3, 4) and [line.partition(":")[0] for line in err.splitlines()[-2:]] == ["error", "hint"], err

"""README and pages are true: commands run or parse, tables are the recorded ones, links lead somewhere."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import pi_gguf
from pi_gguf.cli.app import main
from pi_gguf.gguf.header import Entry, read_header, write_changed

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import record_terminal
import write_pages
import write_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
SMALL = {
    "plan": "--context 512",
    "convert": "--context 512 --steps 2 --train-window 64 --batch-tokens 64",
}
"""What is added to the README's commands, so that they are run on a model of two layers in seconds."""


def blocks(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Return the lines of the blocks that run pi-gguf, a command each, from its name on."""
    for line in "".join(blocks(text)).replace("\\\n", " ").splitlines():
        if found := re.search(r"\bpi[-_]gguf (?!\.whl).*", line):
            yield found[0]


def resolve(words):
    """Return the command that words begin with, and the rest."""
    command, words = main, list(words)
    while isinstance(command, click.Group) and words:
        inner = command.get_command(None, words[0])
        assert inner, f"no command {words[0]}"
        command, words = inner, words[1:]
    return command, words


# README


def test_the_readme_is_read_in_three_minutes():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


@pytest.fixture
def shell(tmp_path):
    """Run a line in bash, in a folder of its own, with this environment's commands."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "pi-gguf").write_text(f'#!/bin/sh\nexec {sys.executable} -m pi_gguf "$@"\n')
    (tools / "pi-gguf").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(*arguments):
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}\n{done.stderr}"
        return done.stdout

    return run


@pytest.mark.slow
def test_the_readmes_commands_run_one_after_another(shell, llama, tmp_path):
    (tmp_path / "my-llama").symlink_to(llama)
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "one.txt").write_text("The ship was called the Northern Star, and she was old. " * 400)
    (tmp_path / "long-document.txt").write_text("The captain went on board.")
    given = list(commands(README))
    assert [line.split()[1] for line in given] == ["plan", "convert", "inspect", "inspect", "ask", "serve"]
    for line in given[:-1]:
        out = shell("bash", "-c", f"{line} {SMALL.get(line.split()[1], '')}")
        assert out.strip(), line
        if line.startswith("pi-gguf inspect"):
            assert "512 tokens (original 64)" in out
    until = "until grep -q 'the desk: http' served; do sleep 0.1; kill -0 $! || exit 1; done"
    end = "kill -INT $!; wait $!; [ $? = 130 ] && cat served"
    served = shell("bash", "-c", f"{given[-1]} --port 0 2> served & {until}; {end}")
    assert "the API:  http" in served
    (program,) = blocks(README, "python")
    assert shell(sys.executable, "-c", program).strip()


@pytest.fixture(scope="module")
def talker(llama, tmp_path_factory):
    """A file with a window of 2048 tokens and a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    pi_gguf.convert(str(llama), folder / "plain.gguf", context=2048, steps=0, quant="F32", check="none")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    changed = read_header(folder / "plain.gguf").changed({"tokenizer.chat_template": Entry.of(template)})
    write_changed(changed, folder / "talker.gguf")
    return folder / "talker.gguf"


DOCUMENT_PROGRAMS = blocks(PYTHON.partition("\n## A document\n")[2].partition("\n## ")[0], "python")


def test_the_page_has_a_program_for_each_way_to_ask():
    for word in ("model.read(", "book.ask(", "book.fit()", "Reading(", "Conversation(", "Stream("):
        assert any(word in program for program in DOCUMENT_PROGRAMS), word


@pytest.mark.parametrize("program", DOCUMENT_PROGRAMS)
def test_the_programs_about_a_document_run(program, shell, talker, tmp_path):
    (tmp_path / "my-llama-32k.gguf").symlink_to(talker)
    (tmp_path / "book.txt").write_text("Old Tom keeps the lighthouse, and a boy comes to see him.\n\n" * 4)
    assert shell(sys.executable, "-c", program).strip()


def test_the_picture_of_a_terminal_is_small_and_fetches_nothing():
    picture = ROOT / "docs" / "pictures" / "terminal.svg"
    text = picture.read_text().replace("&#160;", " ")
    assert f"]({picture.relative_to(ROOT)})" in README
    assert picture.stat().st_size < 100_000
    assert not re.search(r"url\((?!#)|@import|href=", text)
    for name in ("plan", "convert", "inspect"):
        assert f"pi-gguf {name} " in text


def test_a_picture_is_what_a_run_leaves_on_the_screen(tmp_path):
    assert record_terminal.screen("10 %\r\x1b[2Kdone\nlost\n\x1b[1A\x1b[2K\x1b[31mkept\x1b[0m\n") == [
        "done", "\x1b[31mkept\x1b[0m", "",
    ]  # fmt: skip
    drawn = record_terminal.draw(["pi-gguf models"], [record_terminal.run("pi-gguf models", tmp_path)])
    assert "26&#160;families" in drawn and "@font-face" not in drawn
    with pytest.raises(SystemExit, match="exit code 2"):
        record_terminal.run("pi-gguf plan nowhere --context x", tmp_path)


def test_what_the_readme_makes_is_made():
    rules = (ROOT / "Makefile").read_text()
    used = {word for page in PAGES for word in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", page.read_text(), re.M)}
    names = {name for pair in used for name in pair if name}
    assert {"demo", "test", "docs", "gpu"} <= names
    assert all(re.search(rf"^{name}:", rules, re.MULTILINE) for name in names), names


# Pages


def test_every_command_of_the_pages_parses():
    lines = [(page.name, line) for page in PAGES for line in commands(page.read_text())]
    assert len(lines) >= 40
    for page, line in lines:
        command, words = resolve(itertools.takewhile("<".__ne__, shlex.split(line, comments=True)[1:]))
        try:
            command.make_context(command.name, words)
        except click.ClickException as error:
            pytest.fail(f"{page}: {line}\n{error.format_message()}")


def test_every_option_that_the_text_gives_to_a_command_exists():
    found = [
        (page.name, inline)
        for page in PAGES
        for inline in re.findall(r"`(pi-gguf [^`]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))
    ]
    assert len(found) >= 8
    for page, inline in found:
        command, words = resolve(word for word in inline.split()[1:] if not re.match(r"[A-Z.]+$", word))
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            assert not word.startswith("--") or word in {*options, "--help"}, f"{page}: {inline}"


def test_the_tables_are_the_recorded_ones():
    assert {ROOT / "README.md", ROOT / "docs" / "results.md"} < set(write_tables.PAGES)
    marks = 0
    for page in write_tables.PAGES:
        text = page.read_text()
        marks += text.count("<!-- table ")
        assert write_tables.with_tables(text) == text, page
    assert marks >= 12


def test_the_pages_of_models_and_files_are_those_of_the_code():
    assert write_pages.MODELS.read_text() == write_pages.models()
    page = write_pages.RUN.read_text()
    assert page == write_pages.fits(page) and "| Llama 3.1 8B | 4.6 | 4.0 |" in page
    page = write_pages.ARCHITECTURE.read_text()
    assert page == write_pages.architecture(page)
    for path in (ROOT / "pi_gguf").rglob("*.py"):
        assert path.name == "__init__.py" or f"| `{path.name}` | " in page, path
    assert "|  |" not in page, "a file without a docstring"


# The site


@pytest.fixture
def copy(tmp_path):
    """What the pages are made from, for a test to damage."""
    pytest.importorskip("mkdocs", reason="needs pip install pi-gguf[docs]")
    for name in ("benchmarks", "docs", "pi_gguf", "recipes", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "mkdocs.yml"):
        shutil.copy(path, tmp_path)
    return tmp_path


def build(folder):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "mkdocs", "build"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_site_needs_no_network_and_has_every_public_name(copy):
    import pi_gguf

    done = build(copy)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in (copy / "out" / "site").glob("*.html")}
    assert {"index.html", "python.html", "options.html", "results.html", "log.html"} <= set(pages)
    for name, page in pages.items():
        assert not re.search(r'<(?:link|script|img)[^>]+(?:src|href)="(?:https?:)?//', page), name
    for name in pi_gguf.__all__:
        assert f'id="pi_gguf.{name}"' in pages["python.html"], name
    assert "optimizer steps; 0 applies the scaling without training." in pages["python.html"], "options are not there"
    assert (copy / "out" / "site" / "recipes" / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("docs/run.md", "(evaluate.md)", "(evaluat.md)", "docs/run.md: evaluat.md leads to no file"),
        ("docs/start.md", "results.md#the-demo", "results.md#a-demo", "does not contain an anchor"),
        (
            "pi_gguf/measure/language_model.py",
            '"""Tell whether each',
            '_ = """Tell whether each',
            "predicts has no docstring",
        ),
    ],
)
def test_a_dead_link_or_a_public_name_without_a_docstring_ends_the_build(copy, file, before, after, said):
    text = (copy / file).read_text()
    assert before in text
    (copy / file).write_text(text.replace(before, after))
    done = build(copy)
    assert done.returncode != 0
    assert said in done.stderr + done.stdout

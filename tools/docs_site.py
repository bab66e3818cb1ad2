"""What MkDocs needs beside mkdocs.yml: README.md as the first page, files that pages link to, the API as it is called.

In: README.md and docs/*.md, whose links lead to files of the repository, as in a checkout. Out: those files are part of
the site, and links lead to them there. One that leads nowhere ends the build, and so does a public name without a
docstring.

Example:
    mkdocs build
"""

from __future__ import annotations

import inspect
import posixpath
import pydoc
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import pi_gguf

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add README.md, and whatever it and the pages link to."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    waiting = [_source(file.src_uri) for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        for link in _LINK.findall((ROOT / page).read_text()):
            target = _target(page, link)
            if files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
                waiting += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links lead to the places of their files on the site."""
    source = _source(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(lambda link: posixpath.relpath(_place(_target(source, link[1])), here or "."), markdown)


def _target(page: str, link: str) -> str:
    """Return the file, by its path in the repository, that a page links to."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / target).is_dir():
        target = posixpath.join(target, "README.md")
    if not (ROOT / target).is_file():
        raise PluginError(f"{page}: {link} leads to no file")
    return target


def _place(source: str) -> str:
    """Return where a file of the repository lies on the site."""
    return "index.md" if source == "README.md" else source.removeprefix("docs/")


def _source(place: str) -> str:
    """Return what lies at a place of the site, by its path in the repository."""
    if place == "index.md":
        return "README.md"
    return f"docs/{place}" if (ROOT / "docs" / place).exists() else place


class AsCalled(griffe.Extension):
    """What docs/python.md names, as callers see it: signature and documentation with options, and what is inherited."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        pkg.docstring = None  # the page says it
        for name in pi_gguf.__all__:
            written, function = pkg[name].final_target, getattr(pi_gguf, name)
            written.parameters = griffe.Parameters(*map(_parameter, inspect.signature(function).parameters.values()))
            _document(written, function)
        for path in re.findall(r"^::: pi_gguf\.(\S+)$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE):
            _document(pkg[path], pydoc.locate(f"pi_gguf.{path}"))


def _document(written: Any, public: Any) -> None:
    """Give what was read of the source, and what is public in it, its documentation."""
    if not (text := inspect.getdoc(public)):
        raise PluginError(f"{written.path} has no docstring")
    written.docstring = griffe.Docstring(text, parent=written, parser="google")
    if not (written.is_module or written.is_class):
        return
    for name, member in written.all_members.items():
        imported = member.is_alias and not member.inherited
        if name[0] != "_" and not imported and (not member.is_attribute or "property" in member.labels):
            _document(member.final_target if member.is_alias else member, getattr(public, name))


def _parameter(known: inspect.Parameter) -> griffe.Parameter:
    kind = getattr(griffe.ParameterKind, known.kind.name.lower())
    default = None if known.default is known.empty else repr(known.default)
    hint = known.annotation if isinstance(known.annotation, str) else inspect.formatannotation(known.annotation)
    return griffe.Parameter(known.name, annotation=hint, kind=kind, default=default)

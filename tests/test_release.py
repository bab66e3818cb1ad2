"""A release: wheel and sdist hold all that is needed, and install where nothing of the repository is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
MADE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "*.egg-info", "*.gguf")


def test_the_changelog_begins_with_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## ([\d.]+) \(\d{4}-\d\d-\d\d\)$", text, re.MULTILINE)[0] == VERSION


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of an sdist and the wheel that is built from it."""
    source = shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "pi-gguf", ignore=MADE)
    shutil.copytree(ROOT / ".ci", source / ".ci")
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


def run(*command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_repository(*folders):
    """Return the files of folders of the repository, without what Python makes."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_sdist_is_the_repository(dist):
    with tarfile.open(dist / f"pi_gguf-{VERSION}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = in_repository("benchmarks", "docs", "pi_gguf", "recipes", "tests", "tools")
    wanted |= {"README.md", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml", ".ci/run"}
    assert len(wanted) > 200 and wanted <= held, sorted(wanted - held)


@pytest.mark.slow
def test_the_wheel_installs_where_nothing_else_of_it_is(dist, tmp_path):
    wheel = dist / f"pi_gguf-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == in_repository("pi_gguf")
    place = tmp_path / "place"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, wheel, cwd=tmp_path)
    program = (
        "import pi_gguf\n"
        "from pi_gguf import bundled\n"
        "from importlib.metadata import version\n"
        "print(pi_gguf.__file__, version('pi-gguf'), len(bundled.novels('heldout')))\n"
        "for name in pi_gguf.__all__: getattr(pi_gguf, name)\n"
    )
    told = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(place))
    assert told.split() == [str(place / "pi_gguf" / "__init__.py"), VERSION, "4"]
    command = (sys.executable, place / "bin" / "pi-gguf")
    assert "26 families" in run(*command, "models", cwd=tmp_path, PYTHONPATH=str(place))
    plan = run(*command, "plan", "bundled:tiny", "--context", "4096", cwd=tmp_path, PYTHONPATH=str(place))
    assert "2.6 M parameters" in plan

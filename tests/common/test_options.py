"""Options are defined once: command line, signature, documentation and keywords of the functions follow the fields."""

from __future__ import annotations

import inspect
import sys
import typing
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.cli import app as command_line
from pi_gguf.common import options
from pi_gguf.common.options import flat, hints, option, take
from pi_gguf.errors import OptionError
from pi_gguf.evaluate.options import SuiteOptions
from pi_gguf.models.options import CACHES, ServerOptions, TargetKeywords, TargetOptions
from pi_gguf.pipeline.options import ConvertKeywords
from pi_gguf.prove.options import ProofOptions
from pi_gguf.tune.extend import record_of_scaling
from pi_gguf.tune.options import ExtendKeywords, SpreadOptions, TuneKeywords, TuneOptions
from pi_gguf.write.options import WriteOptions

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import write_options


@pytest.mark.parametrize(
    ("keywords", "groups"),
    [
        (TuneKeywords, (TuneOptions,)),
        (ExtendKeywords, (TuneOptions, SpreadOptions)),
        (ConvertKeywords, (TuneOptions, WriteOptions, ProofOptions)),
        (TargetKeywords, (TargetOptions,)),
    ],
)
def test_the_keywords_for_editors_are_the_fields(keywords, groups):
    mirror = typing.get_type_hints(keywords)
    assert mirror == {name: kind for group in groups for name, kind in hints(group).items()}


@pytest.mark.parametrize("suite", ["compare", *(name for name in pi_gguf.__all__ if name.startswith("evaluate_"))])
def test_a_suite_takes_the_shared_options_that_its_keywords_name(suite):
    function = getattr(pi_gguf, suite)
    written = inspect.unwrap(function)
    (keywords,) = typing.get_args(typing.get_type_hints(written)["options"])
    own = inspect.signature(written).parameters.keys() - {"options"}
    mirror, parameters = typing.get_type_hints(keywords), inspect.signature(function).parameters
    assert mirror and parameters.keys() == own | mirror.keys() and not own & mirror.keys()
    every = {one.name: (group, one) for group in (ServerOptions, SuiteOptions) for one in fields(group)}
    for name, kind in mirror.items():
        group, one = every[name]
        assert kind == hints(group)[name] == parameters[name].annotation, name
        assert parameters[name].default == one.default and f"    {name}: {one.metadata['help']}" in function.__doc__
    needed = {"against": "x"} if "against" in parameters else {}
    for name in every.keys() - parameters.keys():
        with pytest.raises(TypeError, match=name):
            function("bundled:tiny", **needed, **{name: None})


def test_an_evaluation_explains_each_option_under_its_concern(cli):
    code, out, _ = cli("eval", "passkey", "--help")
    text = " ".join(out.split())
    assert code == 0 and "--help-all" not in out
    places = [text.index(part) for part in ("--windows N,N,... lengths", "Model: --context", "Measurement: --keep")]
    assert places == sorted(places) and "--type-k TEXT K cache of GGUF files" in text
    for suite in ("perplexity", "kl", "matrix", "short", "summarize"):
        code, _, err = cli("eval", suite, "bundled:tiny", "--seed", "1")
        assert code == 2 and "No such option" in err and "--seed" in err, suite


def test_types_of_a_cache_are_those_of_the_runtime():
    from pi_gguf.llamacpp.cache import CACHE_TYPES

    assert tuple(CACHE_TYPES) == CACHES


def test_a_new_option_is_one_field(llama, monkeypatch, capfd):
    """It is in the signature, the documentation, the object, the command line, its help, the page and the record."""

    @dataclass(frozen=True, kw_only=True)
    class More(TuneOptions):
        wish: float | None = option("how much of it, in percent, e.g. 7.", default=None)

    taken = []

    @flat(More)
    def try_it(model: str, *, device: str = "auto", **given) -> None:
        """Try it.

        Args:
            model: what.
            device: where.

        Example:
            pi-gguf try-it x
        """
        taken.append(take(More, given))

    monkeypatch.setattr(options, "try_it", try_it, raising=False)
    made = command_line.command("common.options:try_it", str, reports=False)
    made.main(["x", "--wish", "7", "--mix", "0.5"], standalone_mode=False)
    assert (taken[0].wish, taken[0].mix, taken[0].steps) == (7.0, 0.5, 1000)
    parameter = inspect.signature(try_it).parameters["wish"]
    assert (parameter.default, parameter.annotation) == (None, float | None)
    assert "    wish: how much of it, in percent, e.g. 7." in try_it.__doc__
    assert try_it.__doc__.index("wish:") < try_it.__doc__.index("Example:")
    for help_flag, said in (("--help", "--seed --wish"), ("--help-all", "how much of it, in percent")):
        made.main([help_flag], standalone_mode=False)
        assert said in " ".join(capfd.readouterr().out.split()), help_flag
    checkpoint = load_checkpoint(str(llama)).extended(256, "linear")
    recorded, plain = (record_of_scaling(checkpoint, one) for one in (taken[0], TuneOptions(mix=0.5)))
    assert recorded.to_json()["options"] == {"wish": 7.0} and "options" not in plain.to_json()
    assert plain.difference(recorded) == "options"
    monkeypatch.setattr(write_options, "GROUPS", (More,))
    assert "`--wish` (float): how much of it" in write_options.page()


def test_a_keyword_that_is_no_option_is_refused():
    for function in (pi_gguf.extend, pi_gguf.convert, pi_gguf.plan):
        with pytest.raises(TypeError, match="mixx"):
            function("bundled:tiny", *["out"][: function is not pi_gguf.plan], context=4096, mixx=1)


@pytest.mark.parametrize(
    ("group", "wrong", "said"),
    [
        (TuneOptions, {"schedule": "linear"}, "schedule must be constant or decay, got linear"),
        (TuneOptions, {"packing": "tight"}, "packing must be isolate or join, got tight"),
        (TuneOptions, {"mix": 1.0}, "mix must be from 0 to below 1, got 1.0"),
        (TuneOptions, {"steps": -1}, "steps must not be negative, got -1"),
        (TuneOptions, {"learning_rate": 2.0}, "learning-rate must be between 0 and 1, got 2.0"),
        (TuneOptions, {"batch_tokens": 0}, "batch-tokens must be at least 1, got 0"),
        (ProofOptions, {"check": "all"}, "check must be one of quick, full, none, got all"),
        (TargetOptions, {"type_k": "q3"}, "type-k must be one of f32, f16, q8_0, q4_0, got q3"),
    ],
)
def test_a_wrong_value_names_its_option(group, wrong, said):
    with pytest.raises(OptionError, match=said):
        group(**wrong)


def test_a_repeatable_option_is_kept_as_it_was_given():
    given = ["a", "b"]
    tune = TuneOptions(data=given)
    given.append("c")
    assert tune.data == ("a", "b")


def test_convert_takes_what_extend_does():
    names = {one.name for one in fields(TuneOptions)}
    for function in (pi_gguf.extend, pi_gguf.convert, pi_gguf.plan):
        assert names <= set(inspect.signature(function).parameters), function


def test_the_help_of_convert_fits_a_screen(cli):
    code, out, _ = cli("convert", "--help")
    assert code == 0 and len(out.splitlines()) <= 50
    code, whole, _ = cli("convert", "--help-all")
    assert code == 0 and "SuperHOT" in whole and "SuperHOT" not in out
    groups = (TuneOptions, WriteOptions, ProofOptions)
    every = {f"--{name.replace('_', '-')}" for group in groups for name in hints(group)}
    assert all(name in whole and name in out for name in every)


def test_the_page_of_options_is_made_from_them():
    assert write_options.PAGE.read_text() == write_options.page()

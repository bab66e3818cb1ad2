"""The record of a fine-tune: read, written, and what makes two runs two."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers import WINDOW

import pi_gguf
from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.checkpoint.record import RECORD_FILE, Record
from pi_gguf.errors import CheckpointError, OptionError
from pi_gguf.tune.plan import TrainingPlan

TOLD = {
    "source", "reason", "train_reason", "loss", "steps_done", "seconds", "device", "peak_memory_bytes",
    "predicted_memory_bytes", "validations", "price", "pi_gguf", "libraries", "others",
}  # fmt: skip
FIELDS = [one.name for one in dataclasses.fields(Record)]


def test_every_field_but_what_is_told_makes_another_run():
    assert len(FIELDS) == 52 and set(FIELDS) > TOLD
    assert {one.name for one in dataclasses.fields(TrainingPlan)} <= set(FIELDS)
    for name in FIELDS:
        changed = dataclasses.replace(Record(sharded=False), **{name: "another"})
        assert changed.difference(Record(sharded=False)) == ("" if name in TOLD else name)
        assert Record(sharded=False).difference(changed) == ("" if name in TOLD else name)
    assert not Record().difference(Record(sharded=True)), "a finished run has no shards"


def test_a_record_is_read_as_it_was_written_and_unknown_fields_stay(tmp_path):
    path = tmp_path / RECORD_FILE
    assert Record.read(path) is None
    record = Record(steps=3, tokens=9, data=["a.txt"], factor=4.0, mix=0.0, others={"of_later": [1]})
    record.write(path)
    stated = json.loads(path.read_text())
    assert stated == {"steps": 3, "tokens": 9, "data": ["a.txt"], "factor": 4.0, "mix": 0.0, "of_later": [1]}
    assert Record.read(path) == record


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("steps", "many", "a whole number"),
        ("steps", None, "a whole number"),
        ("tokens", True, "a whole number"),
        ("tokens", -1, "a whole number"),
        ("context", 0, "a positive integer"),
        ("factor", "4", "a number"),
        ("early_stop", 1, "true or false"),
        ("data", {}, "a text or a list"),
        ("data_weights", 0.5, "a list"),
        ("counted", ["all"], "a text"),
        ("validations", {}, "a list"),
        ("price", [], "an object"),
    ],
)
def test_a_field_of_another_type_is_named_with_its_file(tmp_path, name, value, said):
    path = tmp_path / RECORD_FILE
    path.write_text(json.dumps({name: value}))
    with pytest.raises(CheckpointError, match=f"{RECORD_FILE}: {name} must be {said}, got "):
        Record.read(path)


def test_a_folder_of_an_older_version_opens_and_is_used(llama, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("The captain went on board. " * 300)
    options = {"context": 4 * WINDOW, "data": [str(text)], "steps": 1, "batch_tokens": 64, "device": "cpu"}
    out = pi_gguf.extend(str(llama), tmp_path / "out", **options)
    stated = json.loads((out / RECORD_FILE).read_text())
    assert set(stated) <= set(FIELDS) and "eval_text" not in stated
    (out / RECORD_FILE).write_text(json.dumps({**stated, "price": None, "of_another": 1}))
    capfd.readouterr()
    assert pi_gguf.extend(str(llama), out, **options) == out
    assert "holds this fine-tune already" in capfd.readouterr().err
    for wrong in ({"seed": 1}, {"eval_text": [str(text)]}):
        with pytest.raises(OptionError, match="exists"):
            pi_gguf.extend(str(llama), out, **options, **wrong)
    (out / RECORD_FILE).write_text('{"rope_type": "linear", "context": 256}')
    record = load_checkpoint(str(out)).record
    assert (record.steps, record.tokens, record.price, record.context) == (0, 0, None, 256)
    assert pi_gguf.convert(str(out), tmp_path / "out.gguf", check="none", quant="F32").files

import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetool import records
from prunetool.errors import RecordError, StepFailed

STEP = {"command": "calibrate", "version": "0.1.0", "options": {"samples": 8}}
HEADER = records.Header("/m", "m", "f" * 64, "/w", 2, [STEP])
STATS = "stats/layer-{:05d}.stats.safetensors"
LAYERS = [
    records.LayerRecord(0, {"stats": STATS.format(0)}, {"attention": {"held_out": 0.5}}),
    records.LayerRecord(1, {"stats": STATS.format(1)}, {"name": "Ωé\n"}),
]


def written(header=HEADER, layers=LAYERS):
    sink = io.StringIO()
    records.write(sink, header, layers, copy := io.StringIO())
    assert copy.getvalue() == sink.getvalue()
    return sink.getvalue()


def read_all(text):
    header, layers = records.read(io.StringIO(text))
    return header, list(layers)


def test_write_then_read_is_the_identity():
    assert read_all(written()) == (HEADER, LAYERS)


def test_records_are_written_the_moment_they_are_there():
    sink = io.StringIO()

    def layers():
        assert len(sink.getvalue().splitlines()) == 1
        yield LAYERS[0]
        assert len(sink.getvalue().splitlines()) == 2
        yield LAYERS[1]

    records.write(sink, HEADER, layers(), io.StringIO())
    assert len(sink.getvalue().splitlines()) == 4


@given(st.integers(0, len(written()) - 2))
def test_a_cut_stream_never_reads_as_whole(cut):
    with pytest.raises(RecordError):
        read_all(written()[:cut])


@given(st.text())
def test_any_text_gives_a_record_error(text):
    with pytest.raises(RecordError):
        read_all(text)


keys = st.sampled_from(["record", "format", "index", "layers", "files", "values", "history"])
values = st.one_of(
    st.integers(-1, 3),
    st.sampled_from(["header", "layer", "end", None]),
    st.builds(list),
    st.builds(dict),
)


@given(st.lists(st.dictionaries(keys, values), max_size=5))
def test_any_objects_give_records_or_a_record_error(objects):
    text = "".join(json.dumps(o) + "\n" for o in objects)
    with pytest.raises(RecordError):
        read_all(written().splitlines()[0] + "\n" + text)


def changed(which, **fields):
    lines = [json.loads(line) for line in written().splitlines()]
    lines[which].update(fields)
    return "".join(json.dumps(value) + "\n" for value in lines)


MASK = {"method": "wanda", "pattern": "2:4", "damping": 0.01, "removed": 0.5, "loss": None}
VALUES = {
    "kept": {"heads": 4, "kv_heads": 2, "channels": 32},
    "loss": {"o_proj": 0.1, "down_proj": 0},
    "energy": {"o_proj": 1e300, "down_proj": 3},
    "nats": {"down_proj": 0.01},
    "scores": {"heads": {"least": [0, 1]}, "channels": {"-12": [30, 2], "4": [0, 0]}},
    "masks": {"q": MASK, "down": {**MASK, "loss": 0.1}},
    "hidden": {"kept": 48, "of": 64, "share": {"attention": 0.9, "mlp": 1}},
    "attention": {"calibration": 0.1},
    "refit": {
        "o_proj": dict.fromkeys(records.REFIT, 0.5),
        "q_proj.masked": dict.fromkeys(records.REFIT),
    },
    "recover": {"kl_before": 0.2, "kl_after": 0.1, "steps": 64},
    "seconds": {"score": {"mask": 0.5}},
}


def test_the_values_that_the_steps_write_are_read():
    assert VALUES.keys() == records.VALUES.keys()
    _, (first, _) = read_all(changed(1, values=VALUES))
    assert first.values == VALUES


def test_records_are_ascii_whatever_a_path_holds():
    text = written(records.Header("/模型\udcff", "é", "f" * 64, "/w", 2, [STEP]))
    assert text.isascii()
    assert read_all(text)[0].model == "/模型\udcff"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the stream is empty"),
        ("hello\n", "line 1: not a record"),
        ("[1]\n", "line 1: not a record (not an object)"),
        (changed(0, record="layer"), "line 1: no header record"),
        (changed(0, format=2), "line 1: format 2, but this prunetool reads 1"),
        (changed(0, layers="2"), "layers is missing or not of type int"),
        (changed(0, work="/w\0"), "work is not a path"),
        (changed(0, history=[1]), "history is [1], which is malformed"),
        (changed(0, history=[{"command": "calibrate"}]), "which is malformed"),
        (changed(0, history=[{**STEP, "options": None}]), "which is malformed"),
        (changed(0, history=[]), "history is empty"),
        (changed(1, index=1), "line 2: layer 1 after 0 of 2 layers"),
        (changed(1, files={"stats": "../../x"}), "file '../../x' of stats is not one that a step"),
        (changed(1, files={"stats": "/etc/x"}), "file '/etc/x' of stats is not one that a step"),
        (changed(1, files={"stats": STATS.format(1)}), "file 'stats/layer-00001.stats.safetensors"),
        (changed(1, files={"a": STATS.format(0)}), "of a is not one that a step makes"),
        (
            changed(1, files={"held_out": STATS.format(0)}),
            "of held_out is not one that a step makes",
        ),
        (
            changed(1, files={"stats": STATS.format(0).replace(".", "/")}),
            "not one that a step makes",
        ),
        (
            changed(1, files={"refit": "score-0123456789ab/layer-00000.safetensors"}),
            "not one that a",
        ),
        (
            changed(1, files={"refit": "compensate-0123456789ab/layer-00000.safetensors"}),
            "has a file of refit but no values for it",
        ),
        (changed(1, values={"loss": [0.5]}), "loss is [0.5], which is malformed"),
        (changed(1, values={"loss": {"o_proj": 1}}), "loss is {'o_proj': 1}, which is malformed"),
        (changed(1, values={"energy": {"o_proj": 1, "down_proj": "1"}}), "energy is"),
        (changed(1, values={"nats": {"q_proj": 1}}), "nats is {'q_proj': 1}, which is malformed"),
        (changed(1, values={"scores": {"heads": {"0": [1]}}}), "scores is {'heads': {'0': [1]}}"),
        (changed(1, values={"scores": {"heads": {"x": [1, 2]}}}), "which is malformed"),
        (changed(1, values={"scores": {"heads": {"1": [1, -2]}}}), "which is malformed"),
        (changed(1, values={"energy": {"o_proj": 1, "down_proj": 10**400}}), "energy is"),
        (changed(1, values={"kept": {"heads": -1, "kv_heads": 1, "channels": 1}}), "kept is"),
        (changed(1, values={"kept": {"heads": True, "kv_heads": 1, "channels": 1}}), "kept is"),
        (changed(1, values={"masks": {"q": {}}}), "masks is {'q': {}}, which is malformed"),
        (changed(1, values={"masks": {"x": MASK}}), "masks is"),
        (changed(1, values={"refit": {"o_proj": None}}), "refit is"),
        (changed(1, values={"seconds": {"score": 1}}), "seconds is"),
        (changed(1, values={"attention": {"held_out": None}}), "attention is"),
        (changed(2, record="end"), "line 3: ends after 1 of 2 layers"),
        (changed(2, record="what"), "line 3: record 'what' is unknown"),
        (changed(3, record="layer", index=2, files={}, values={}), "layer 2 after 2 of 2 layers"),
        (written() + written(), "records follow the end record"),
        ("".join(written().splitlines(True)[:3]), "cut off after 2 of 2 layers"),
    ],
)
def test_every_fault_is_named(text, says):
    with pytest.raises(RecordError) as caught:
        read_all(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lines", [0, 1, 3], ids=["empty", "header", "layers"])
def test_a_failed_step_tells_the_next_one_through_a_pipe(tmp_path, lines):
    begun = "".join(written().splitlines(True)[:lines])
    read_end, write_end = os.pipe()
    with open(read_end) as source, open(write_end, "w") as sink:
        sink.write(begun)
        records.tell_failed(sink)
        sink.close()
        with pytest.raises(
            StepFailed, match=f"line {lines + 1}: its step failed; run the previous step"
        ):
            list(records.read(source)[1])
    # What came into a file is an error in words.
    (tmp_path / "file").write_text(begun + '{"record": "failed"}\n')
    with (tmp_path / "file").open() as source, pytest.raises(RecordError) as caught:
        list(records.read(source)[1])
    assert type(caught.value) is RecordError
    assert str(caught.value).startswith(f"{tmp_path}/file: line {lines + 1}: its step failed; ")


def test_a_failed_step_writes_nothing_to_a_file_or_to_nobody(tmp_path):
    with (tmp_path / "file").open("w") as sink:
        records.tell_failed(sink)
    assert (tmp_path / "file").read_text() == ""
    records.tell_failed(io.StringIO())
    records.tell_failed(None)
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as sink:
        records.tell_failed(sink)
        with pytest.raises(BrokenPipeError):
            sink.close()

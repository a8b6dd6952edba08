import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetool import records
from prunetool.errors import RecordError

HEADER = records.Header("/m", "m", "f" * 64, "/w", 2, [{"command": "calibrate"}])
LAYERS = [
    records.LayerRecord(0, {"stats": "stats/0"}, {"loss": 0.5}),
    records.LayerRecord(1, {"stats": "stats/1"}, {"name": "Ωé\n"}),
]


def written(header=HEADER, layers=LAYERS):
    sink = io.StringIO()
    records.write(sink, header, layers)
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

    records.write(sink, HEADER, layers())
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
    st.integers(-1, 3), st.sampled_from(["header", "layer", "end", None]), st.builds(list),
    st.builds(dict),
)  # fmt: skip


@given(st.lists(st.dictionaries(keys, values), max_size=5))
def test_any_objects_give_records_or_a_record_error(objects):
    text = "".join(json.dumps(o) + "\n" for o in objects)
    with pytest.raises(RecordError):
        read_all(written().splitlines()[0] + "\n" + text)


def changed(which, **fields):
    lines = [json.loads(line) for line in written().splitlines()]
    lines[which].update(fields)
    return "".join(json.dumps(value) + "\n" for value in lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the stream is empty"),
        ("hello\n", "line 1: not a record"),
        ("[1]\n", "line 1: not a record (not an object)"),
        (changed(0, record="layer"), "line 1: no header record"),
        (changed(0, format=2), "line 1: format 2, and this prunetool reads 1"),
        (changed(0, layers="2"), "layers is missing or no int"),
        (changed(0, history=[1]), "history is not a list of steps"),
        (changed(1, index=1), "line 2: layer 1 where 0 was due"),
        (changed(1, files={"a": "../../x"}), "file '../../x' is outside the work directory"),
        (changed(1, files={"a": "/etc/x"}), "file '/etc/x' is outside the work directory"),
        (changed(2, record="end"), "line 3: ends after 1 of 2 layers"),
        (changed(2, record="what"), "line 3: record 'what' is unknown"),
        (changed(3, record="layer", index=2, files={}, values={}), "layer 2 where 2 was due"),
        (written() + written(), "more follows the end record"),
        ("".join(written().splitlines(True)[:3]), "cut off after 2 of 2 layers"),
    ],
)
def test_every_fault_is_named(text, says):
    with pytest.raises(RecordError) as caught:
        read_all(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

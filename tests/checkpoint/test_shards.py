"""Tensors in shards: which go together, that a file is as its library writes it, and kills."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from prunetool.checkpoint import writer
from prunetool.checkpoint.shards import CODES, TensorSpec, split
from prunetool.errors import WorkError
from tests.conftest import DTYPES, specs_of

CHUNKS = [{f"layer.{n}.a": np.arange(6 + n, dtype=np.float32),
           f"layer.{n}.b": np.full((2, 3), n, DTYPES["bfloat16"])} for n in range(5)]  # fmt: skip
LIMITS = {"a chunk": 1, "two or three": 100, "all": 10**9}


def spec(size):
    return {"a": TensorSpec("float16", (size,))}


@given(st.lists(st.integers(1, 20), min_size=1), st.integers(1, 60))
def test_a_shard_holds_as_many_chunks_as_fit_and_a_larger_one_is_alone(sizes, limit):
    shards = split([spec(size) for size in sizes], limit)
    assert [number for shard in shards for number in shard] == list(range(len(sizes)))
    assert all(shards), "none is empty"
    filled = [sum(2 * sizes[number] for number in shard) for shard in shards]
    for shard, following, size in zip(shards, [*shards[1:], None], filled, strict=True):
        assert size <= limit or len(shard) == 1
        assert following is None or size + 2 * sizes[following[0]] > limit


@given(st.data())
def test_a_shard_is_what_safetensors_writes_to_the_byte(tmp_path_factory, data):
    """Also where dtypes of several sizes, and names in no order, would leave items unaligned."""
    dtypes = st.sampled_from([np.float64, *DTYPES.values()])
    shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
    names = data.draw(st.lists(st.text('äb.1"', min_size=1, max_size=9), unique=True, min_size=1))
    arrays = {name: np.zeros(data.draw(shapes), data.draw(dtypes)) for name in names}
    for number, array in enumerate(arrays.values()):
        array.reshape(-1)[:] = np.arange(array.size) + number
    chunks = [{name: array} for name, array in arrays.items()]
    made = tmp_path_factory.mktemp("made")
    list(writer.CheckpointWriter(made / "out").write(specs_of(chunks), chunks.__getitem__, 10**9))
    save_file(arrays, made / "expected", metadata={"format": "pt"})
    written = (made / "out/model-00001-of-00001.safetensors").read_bytes()
    assert written == (made / "expected").read_bytes()


def test_every_dtype_that_is_read_can_be_written():
    assert {code: np.dtype(name).itemsize for name, code in CODES.items()} == {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2
    }  # fmt: skip


def write(out, limit, make=CHUNKS.__getitem__):
    made = writer.CheckpointWriter(out, run="one", files=["config.json"])
    given = list(made.write(specs_of(CHUNKS), make, limit))
    made.put("config.json", b"{}")
    made.close()
    return given


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("stop", range(len(CHUNKS)))
def test_stopped_at_any_chunk_and_run_again_it_redoes_only_the_shard_under_way(
    tmp_path, limit, stop
):
    out, asked = tmp_path / "out", []
    write(tmp_path / "whole", limit)

    def fail(number):
        if number == stop:
            raise KeyboardInterrupt
        return CHUNKS[number]

    def note(number):
        asked.append(number)
        return CHUNKS[number]

    with pytest.raises(KeyboardInterrupt):
        write(out, limit, fail)
    (under_way,) = (shard for shard in split(specs_of(CHUNKS), limit) if stop in shard)
    whole = files(out)
    shards = [name for name in whole if name.endswith(".safetensors")]
    assert sorted(whole) == [".unfinished", *sorted(shards)], "nothing half is left"
    given = write(out, limit, note)
    assert asked == list(range(under_way.start, len(CHUNKS)))
    assert files(out) == files(tmp_path / "whole")
    for chunk, tensors in zip(CHUNKS, given, strict=True):
        assert tensors.keys() == chunk.keys()
        assert all(np.array_equal(tensors[name], array) for name, array in chunk.items())


def test_a_checkpoint_of_more_shards_leaves_none_behind(tmp_path):
    write(tmp_path / "clean", 10**9)
    write(tmp_path / "out", 1)
    assert len(list(tmp_path.glob("out/*.safetensors"))) == len(CHUNKS)
    made = writer.CheckpointWriter(
        tmp_path / "out", run="two", files=["config.json"], overwrite=True
    )
    list(made.write(specs_of(CHUNKS), CHUNKS.__getitem__, 10**9))
    (shard,) = tmp_path.glob("out/*.safetensors")
    assert shard.read_bytes() == (tmp_path / "clean" / shard.name).read_bytes()


def test_a_shard_of_the_user_is_not_replaced_whatever_its_number(tmp_path):
    write(tmp_path / "out", 10**9)
    mine = tmp_path / "out/model-00007-of-00009.safetensors"
    mine.write_text("mine")
    with pytest.raises(WorkError, match=rf"{mine.name}: would be replaced or out of place"):
        writer.CheckpointWriter(tmp_path / "out", run="two", overwrite=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "made", [{"a": np.zeros(3)}, {"b": np.zeros(2)}, {"a": np.zeros(2, np.float32)}, {}]
)
def test_a_tensor_that_is_not_as_it_was_said_to_be_is_not_written(tmp_path, made):
    out = writer.CheckpointWriter(tmp_path / "out")
    with pytest.raises(AssertionError, match="was made, not"):
        list(out.write([{"a": TensorSpec("float64", (2,))}], lambda _: made, 1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".unfinished"]


def test_views_are_written_as_they_read(tmp_path):
    chunk = {"transposed": np.arange(6.0).reshape(2, 3).T, "every other": np.arange(6.0)[::2]}
    list(writer.CheckpointWriter(tmp_path).write(specs_of([chunk]), lambda _: chunk, 1))
    (path,) = tmp_path.glob("*.safetensors")
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, chunk[name])

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from prunetool.checkpoint import index, writer
from prunetool.checkpoint.reader import read_tensor
from prunetool.errors import CheckpointError, PrunetoolError, WorkError
from prunetool.model import open_model
from tests.conftest import specs_of, tiny_config, write_chunks


def says(model, text):
    with pytest.raises(PrunetoolError) as caught:
        open_model(str(model))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def rewrite(path, **changes):
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_shards_and_dtypes(checkpoint, dtype, shards):
    model = open_model(str(checkpoint(dtype=dtype, shards=shards)))
    assert model.dtype == dtype
    assert model.layer(2).down.shape == (64, 96)
    assert model.layer(2).down.dtype.name == dtype


def test_a_directory_without_safetensors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    says(tmp_path, "holds neither model.safetensors.index.json nor model.safetensors")


def test_no_config(checkpoint):
    model = checkpoint()
    (model / "config.json").unlink()
    says(model, "config.json: no such file")
    (model / "config.json").write_text("{")
    says(model, "config.json: cannot be read as JSON")
    (model / "config.json").write_text("[]")
    says(model, "config.json: is not a JSON object")


def test_another_model_type(checkpoint):
    model = checkpoint()
    (model / "config.json").write_text(json.dumps(tiny_config(model_type="gpt_neox")))
    says(model, "config.json: model_type 'gpt_neox'; prunetool reads llama, mistral, qwen2, qwen3")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_shard(checkpoint, keep):
    model = checkpoint()
    shard = model / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * keep)])
    says(model, "model.safetensors: truncated or not safetensors")


def test_a_missing_shard(checkpoint):
    model = checkpoint(shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()
    says(model, "model-00002-of-00002.safetensors: no such shard")


def test_a_tensor_missing(checkpoint):
    model = checkpoint()
    rewrite(model / "model.safetensors", **{"model.layers.1.mlp.up_proj.weight": None})
    says(model, "no tensor model.layers.1.mlp.up_proj.weight")


def test_a_tensor_not_where_the_index_lists_it(checkpoint):
    model = checkpoint(shards=2)
    index = model / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    here = value["weight_map"][name]
    value["weight_map"][name] = next(s for s in value["weight_map"].values() if s != here)
    index.write_text(json.dumps(value))
    says(model, f"no tensor {name}, which the index lists here; download the shard again")


NAME = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def loaded_by_transformers(model):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in loaded.state_dict().items()}


def same_as_transformers(model):
    """Hold every tensor that is used against what transformers loads, and give them."""
    ours, theirs = open_model(str(model)), loaded_by_transformers(model)
    for name in theirs.keys() - ours.index.keys():
        assert (name, ours.config.tied) == ("lm_head.weight", True)
    for name in ours.index:
        np.testing.assert_array_equal(ours.read(name), theirs[name], err_msg=name)
    return theirs


def unlisted(model, *names):
    value = json.loads((model / INDEX).read_text())
    for name in names:
        del value["weight_map"][name]
    (model / INDEX).write_text(json.dumps(value))


def test_a_single_file_is_taken_before_an_index_that_lies_beside_it(checkpoint):
    model = checkpoint(shards=2, seed=1)
    checkpoint(seed=2)
    assert (model / INDEX).exists()
    expected = load_file(model / "model.safetensors")
    np.testing.assert_array_equal(same_as_transformers(model)[NAME], expected[NAME])


def test_an_index_that_is_damaged_does_not_matter_beside_a_single_file(checkpoint):
    model = checkpoint()
    (model / INDEX).write_text("{")
    same_as_transformers(model)


def test_a_single_file_that_is_gone_leaves_the_index(checkpoint):
    model = checkpoint(shards=2)
    (model / "model.safetensors").symlink_to("gone")
    same_as_transformers(model)


def test_a_tensor_that_the_index_does_not_list_is_taken_from_its_shard(checkpoint):
    model = checkpoint(shards=2)
    stored = {n: a for file in model.glob("*.safetensors") for n, a in load_file(file).items()}
    unlisted(model, NAME, "model.norm.weight")
    np.testing.assert_array_equal(same_as_transformers(model)[NAME], stored[NAME])


def test_a_head_that_the_index_does_not_list_is_the_own_head_of_a_tied_model(checkpoint):
    model = checkpoint(shards=2)
    unlisted(model, "lm_head.weight")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    theirs = same_as_transformers(model)
    assert (theirs["lm_head.weight"] != theirs["model.embed_tokens.weight"]).any()
    assert open_model(str(model)).config.tied is False
    np.testing.assert_array_equal(open_model(str(model)).head(), theirs["lm_head.weight"])


def test_a_head_that_a_tied_model_lists_and_does_not_store_is_the_embedding(checkpoint):
    model = checkpoint(shards=2)
    for shard in model.glob("*.safetensors"):
        rewrite(shard, **{"lm_head.weight": None})
    says(model, "no tensor lm_head.weight, which the index lists here; download the shard again")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    theirs = same_as_transformers(model)
    np.testing.assert_array_equal(open_model(str(model)).head(), theirs["lm_head.weight"])


def test_a_shard_that_the_index_does_not_name_is_not_read(checkpoint):
    model = checkpoint(shards=2)
    save_file({NAME: np.zeros((96, 64), np.float32)}, model / "model-00003-of-00003.safetensors")
    assert same_as_transformers(model)[NAME].any()


@pytest.mark.parametrize("listed", [True, False])
def test_of_a_tensor_in_two_shards_it_is_that_in_the_last(checkpoint, listed):
    model = checkpoint(shards=2)
    one, two = sorted(model.glob("*.safetensors"))
    first, last = (np.full((96, 64), value, np.float32) for value in (1, 2))
    rewrite(one, **{NAME: first})
    rewrite(two, **{NAME: last})
    value = json.loads((model / INDEX).read_text())
    value["weight_map"][NAME] = one.name
    (model / INDEX).write_text(json.dumps(value))
    if not listed:
        unlisted(model, NAME)
    np.testing.assert_array_equal(same_as_transformers(model)[NAME], last)


def test_a_fingerprint_is_of_the_files_read_and_maps_none_of_them(checkpoint, monkeypatch):
    mapped = []

    @contextmanager
    def watched(*args, **options):
        with safe_open(*args, **options) as file:
            yield file
            mapped.append("safetensors\n" in Path("/proc/self/maps").read_text())

    model = checkpoint(shards=2)
    found = index.read_index(model)
    total = found.fingerprint()
    monkeypatch.setattr(index, "safe_open", watched)
    assert found.fingerprint() == total
    assert mapped == [False, False]
    rewrite(found[NAME].shard, **{NAME: read_tensor(found, NAME) + 1})
    assert index.read_index(model).fingerprint() != total


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_an_index_that_leaves_the_directory(checkpoint, name):
    model = checkpoint(shards=2)
    index = model / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(value))
    says(model, f"index.json: names {name!r}, outside the directory")


def test_an_index_without_a_map(checkpoint):
    model = checkpoint(shards=2)
    (model / "model.safetensors.index.json").write_text("{}")
    says(model, "has no weight_map")


def test_a_shape_wrong(checkpoint):
    model = checkpoint()
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(model / "model.safetensors", **{name: np.zeros((16, 64), np.float32)})
    says(model, f"{name} is (16, 64), but config.json requires (32, 64)")


def test_a_dtype_not_read(checkpoint):
    model = checkpoint()
    rewrite(model / "model.safetensors", **{"model.norm.weight": np.zeros(64, np.int8)})
    says(model, "stores the dtype I8; give an unquantised checkpoint")


def test_a_tensor_too_many(checkpoint):
    model = checkpoint()
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(model / "model.safetensors", **{name: np.zeros(64, np.float32)})
    says(model, f"{name} has no place in this architecture")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite(checkpoint, dtype, value):
    directory = checkpoint(dtype=dtype)
    name = "model.layers.2.mlp.gate_proj.weight"
    array = load_file(directory / "model.safetensors")[name]
    array[3, 4] = value
    rewrite(directory / "model.safetensors", **{name: array})
    model = open_model(str(directory))
    model.layer(1)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        model.layer(2)


def test_no_directory_and_no_hub_id(tmp_path):
    says(tmp_path / "absent" / "deeper", "is neither a directory nor a Hub id")


A, B = {"a": np.zeros((2, 3), np.float32)}, {"b": np.zeros(3, np.float32)}


class TestWriter:
    def test_a_checkpoint_counts_only_when_it_is_closed(self, tmp_path):
        out = tmp_path / "out"
        made = writer.CheckpointWriter(out)
        write_chunks(made, [A, B])
        assert not (out / "model.safetensors.index.json").exists()
        made.close()
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 36, "total_parameters": 9}
        assert index["weight_map"]["b"] == "model-00002-of-00002.safetensors"

    def test_the_same_run_goes_on_and_another_does_not(self, tmp_path):
        out = tmp_path / "out"
        write_chunks(writer.CheckpointWriter(out, run="one"), [A, B], whole=1)
        with pytest.raises(WorkError, match="is not empty"):
            writer.CheckpointWriter(out, run="two")
        with pytest.raises(WorkError, match="is not empty"):
            writer.CheckpointWriter(out)
        again = writer.CheckpointWriter(out, run="one")
        made = []
        for _ in again.write(specs_of([A, B]), lambda n: made.append(n) or (A, B)[n], 1):
            pass
        again.close()
        assert made == [1], "the first shard was there"
        assert (again.parameters, again.size_bytes) == (9, 36)
        assert sorted(path.name for path in out.iterdir()) == [
            ".prunetool.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ]
        (out / ".prunetool.json").unlink()
        over = writer.CheckpointWriter(out, run="one", overwrite=True)
        write_chunks(over, [{"a": np.ones((2, 3), np.float32)}, B])
        assert load_file(out / "model-00001-of-00002.safetensors")["a"].all()

    def test_a_transposed_view_is_written_as_it_reads(self, tmp_path):
        array = np.arange(6.0).reshape(2, 3)
        writer.write_tensors(tmp_path / "x.safetensors", {"a": array.T})
        np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["a"], array.T)

    def test_what_fails_leaves_nothing(self, tmp_path):
        def half():
            with writer.atomic(tmp_path / "x") as partial:
                partial.write_text("half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            half()
        assert not list(tmp_path.iterdir())

    def test_what_is_there_is_kept_without_overwrite(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(WorkError, match="is not empty; name another directory or give"):
            writer.CheckpointWriter(tmp_path)
        with pytest.raises(WorkError, match="is not empty and holds no checkpoint"):
            writer.CheckpointWriter(tmp_path, overwrite=True)
        with pytest.raises(WorkError, match="is a file"):
            writer.CheckpointWriter(tmp_path / "thesis.tex")

    def test_a_full_disk_is_seen_before_the_work(self, tmp_path):
        with pytest.raises(WorkError, match=r"needs 1000000000.00 GB of disk and .* GB are free"):
            writer.need_room(tmp_path / "not" / "there", 10**18)

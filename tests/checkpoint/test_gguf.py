import json
import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from prunetool.checkpoint.gguf import GGUFModel
from prunetool.errors import LONGEST, ConfigError
from prunetool.llama.config import parse_config
from prunetool.llama.weights import tensor_shapes
from prunetool.steps.convert import convert_gguf
from tests.conftest import error_of, tiny_config

OURS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "then", "sleeps",
    "in", "warm", "sun",
]  # fmt: skip


def letters(count):
    return [*(chr(0x4E00 + i) for i in range(count - 1)), "\u4e00\u4e01"]


def interleave(array, heads):
    """As llama.cpp's converter stores q and k."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def gguf_of(config, *, values=(), tensors=(), tokenizer=None):
    """Metadata, GGUF tensors, and the checkpoint's tensors they must become."""
    random = np.random.default_rng(0)
    keys = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
    }
    if tokenizer is None:
        keys |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": letters(config["vocab_size"]),
            "tokenizer.ggml.merges": ["\u4e00 \u4e01"],
        }
    architecture = config["model_type"]
    keys = {key.replace("llama.", f"{architecture}.", 1): value for key, value in keys.items()}
    keys |= dict(values)  # None: left out
    stored, made = {}, {}
    for name, shape in tensor_shapes(parse_config(config, "")).items():
        array = made[name] = random.standard_normal(shape).astype(np.float32)
        if name in GLOBAL:
            stored[GLOBAL[name]] = array
            continue
        _, _, layer, part = name.split(".", 3)
        part, kind = part.rsplit(".", 1)
        if part.endswith(("q_proj", "k_proj")) and architecture == "llama":
            heads = "num_attention_heads" if "q_proj" in part else "num_key_value_heads"
            array = interleave(array, config[heads])
        stored[f"blk.{layer}.{OURS[part]}.{kind}"] = array
    return keys, {**stored, **dict(tensors)}, made


def write_file(path, keys, tensors, *, architecture="llama", tokenizer=None, **options):
    """A GGUF of these; a tensor may be (bytes of blocks, its type), and None is left out."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in keys.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if tokenizer is not None:
        tokenizer(writer)
    for name, array in tensors.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        elif array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf(path, config, *, values=(), tensors=(), tokenizer=None, **options):
    keys, stored, made = gguf_of(config, values=values, tensors=tensors, tokenizer=tokenizer)
    write_file(path, keys, stored, tokenizer=tokenizer, **options)
    return made


def converted(path, out, dtype="float32"):
    convert_gguf(path, out, dtype, max_shard_bytes=10**9, overwrite=False)
    return out


def refusal(path, dtype="float32"):
    """What is said of a file of which nothing may be written."""
    out = path.parent / "refused"
    with pytest.raises(ConfigError) as caught:
        convert_gguf(path, out, dtype, max_shard_bytes=10**9, overwrite=False)
    assert not out.exists()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) <= LONGEST
    return line


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_the_tensors_come_back_in_order(tmp_path, run, changes):
    config = tiny_config(**changes)
    made = write_gguf(tmp_path / "a.gguf", config)
    run("convert", tmp_path / "a.gguf", tmp_path / "out", "--dtype", "float32")
    back = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        back |= load_file(path)
    assert back.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(back[name], array)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings",
                "attention_bias", "vocab_size", "intermediate_size"):  # fmt: skip
        assert written[key] == config[key]


QWEN = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},  # transformers' reader knows no other
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
}


@pytest.mark.parametrize("changes", QWEN.values(), ids=QWEN)
def test_a_qwen_comes_back_as_it_was_and_as_transformers_reads_it(tmp_path, changes):
    config = tiny_config(**changes)
    architecture = config["model_type"]
    length = (f"{architecture}.attention.value_length", config["head_dim"])
    made = write_gguf(tmp_path / "a.gguf", config, values=[length], architecture=architecture)
    out = converted(tmp_path / "a.gguf", tmp_path / "out")
    back = {}
    for path in out.glob("*.safetensors"):
        back |= load_file(path)
    assert back.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(back[name], array)
    written = json.loads((out / "config.json").read_text())
    assert parse_config(written, "").identity() == parse_config(config, "").identity()
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(ours).__name__ == f"{architecture.title()}ForCausalLM"
    if not config["attention_bias"]:  # which its reader does not know either
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="a.gguf", dtype=torch.float32
        )
        tokens = torch.arange(20)[None]
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_rope_scaling_comes_back(tmp_path):
    inverse = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    turns = 8192 * inverse / (2 * np.pi)
    blend = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - blend) / 32 + blend)).astype(np.float32)
    config = tiny_config(rope_theta=500000.0)
    write_gguf(tmp_path / "3.gguf", config, tensors=[("rope_freqs.weight", divisors)])
    scaling = GGUFModel(tmp_path / "3.gguf").config("float32")["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    write_gguf(tmp_path / "x.gguf", config, tensors=[("rope_freqs.weight", divisors[::-1].copy())])
    with pytest.raises(ConfigError, match="is not Llama 3's scaling"):
        GGUFModel(tmp_path / "x.gguf").config("float32")
    linear = [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0)]
    write_gguf(tmp_path / "l.gguf", config, values=linear)
    scaling = GGUFModel(tmp_path / "l.gguf").config("float32")["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 4.0}


def test_what_is_not_converted_is_refused_by_name(tmp_path, run):
    write_gguf(tmp_path / "q.gguf", tiny_config(), architecture="gpt2")
    line = error_of(run("convert", tmp_path / "q.gguf", tmp_path / "out", ok=False))
    assert "architecture 'gpt2'; supported: llama, qwen2, qwen3" in line
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 9)
    line = error_of(run("convert", tmp_path / "junk.gguf", tmp_path / "out", ok=False))
    assert "junk.gguf: cannot be read as GGUF" in line
    line = error_of(run("convert", tmp_path / "absent.gguf", tmp_path / "out", ok=False))
    assert "absent.gguf: no such file" in line

    def unknown(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("unheard-of")
        writer.add_token_list(letters(260))
        writer.add_token_merges(["\u4e00 \u4e01"])

    write_gguf(tmp_path / "t.gguf", tiny_config(), tokenizer=unknown)
    line = error_of(run("convert", tmp_path / "t.gguf", tmp_path / "out", ok=False))
    assert "pre-tokenizer 'unheard-of'; supported: gpt-2, llama-bpe" in line

    def torn(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(letters(260))
        writer.add_token_merges(["\u4e00 \u4e05"])

    write_gguf(tmp_path / "m.gguf", tiny_config(), tokenizer=torn)
    line = error_of(run("convert", tmp_path / "m.gguf", tmp_path / "out", ok=False))
    assert "is not in its vocabulary" in line
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids(tmp_path, run):
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, 8)) for _ in range(300)]
    text = "\n".join(lines)
    (tmp_path / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=340,
        model_type="bpe", byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    judge = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    count = judge.get_piece_size()

    def add(writer):
        kinds = [
            2 if judge.is_unknown(i) else 3 if judge.is_control(i) else 6 if judge.is_byte(i) else 1
            for i in range(count)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([judge.id_to_piece(i) for i in range(count)])
        writer.add_token_scores([judge.get_score(i) for i in range(count)])
        writer.add_token_types(kinds)

    write_gguf(tmp_path / "sp.gguf", tiny_config(vocab_size=count), tokenizer=add)
    run("convert", tmp_path / "sp.gguf", tmp_path / "out")
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for line in (text[:2000], "unseen wörds, 123  two spaces", "ünïcode 漢字 🙂", "a"):
        encoded = ours.encode(line, add_special_tokens=False)
        assert encoded.ids == judge.encode(line)
        assert ours.decode(encoded.ids) == line


# --- split files


def write_parts(directory, count=3, change=lambda part, keys, tensors: None):
    """A model split in files; ``change`` may spoil a part, by its number from 0."""
    keys, stored, made = gguf_of(tiny_config(num_hidden_layers=count))
    for part in range(count):
        mine = {
            name: array
            for name, array in stored.items()
            if name.startswith(f"blk.{part}.") or (part == 0 and not name.startswith("blk."))
        }
        own = {
            **(keys if part == 0 else {}),
            "split.no": part,
            "split.count": count,
            "split.tensors.count": len(stored),
        }
        change(part, own, mine)
        write_file(directory / f"m-{part + 1:05d}-of-{count:05d}.gguf", own, mine)
    return made


@pytest.mark.parametrize("given", [1, 2, 3])
def test_a_split_model_is_read_whole_from_any_part(tmp_path, given):
    made = write_parts(tmp_path)
    converted(tmp_path / f"m-0000{given}-of-00003.gguf", tmp_path / "out")
    back = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        back |= load_file(path)
    assert back.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(back[name], array)


def test_parts_that_do_not_make_one_model_are_refused_by_file(tmp_path):
    first, second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))

    def line(**spoiled):
        def change(part, keys, tensors):
            if part == 1:
                keys.update(spoiled.get("keys", {}))
                tensors.update(spoiled.get("tensors", {}))

        write_parts(tmp_path, change=change)
        return refusal(first)

    assert f"{second}: says that it is part 3 of 3; download all 3 parts" in line(
        keys={"split.no": 2}
    )
    assert f"{second}: says that it is part 2 of 4" in line(keys={"split.count": 4})
    assert f"{second}: says that the parts hold 9 tensors, but they hold 30" in line(
        keys={"split.tensors.count": 9}
    )
    assert f"{first}: says that the parts hold 30 tensors, but they hold 29" in line(
        keys={"split.tensors.count": 29}, tensors={"blk.1.ffn_norm.weight": None}
    )
    assert f"{second}: is of another model: general.name is not that of {first.name}" in line(
        keys={"general.name": "another"}
    )
    write_parts(tmp_path)
    third.rename(tmp_path / "third.gguf")
    assert f"{third}: no such file; download all 3 parts" in refusal(first)
    assert "third.gguf: is one of 3 parts, but its name does not say which" in refusal(
        tmp_path / "third.gguf"
    )


def test_a_tensor_that_two_parts_hold_is_refused(tmp_path):
    def change(part, keys, tensors):
        keys["split.tensors.count"] = None
        if part == 2:
            tensors["output_norm.weight"] = np.ones(64, np.float32)

    write_parts(tmp_path, change=change)
    line = refusal(tmp_path / "m-00002-of-00003.gguf")
    assert (
        "m-00003-of-00003.gguf: tensor output_norm.weight is also in m-00001-of-00003.gguf" in line
    )


# --- tensors


def test_what_a_model_needs_is_there_in_its_shape_before_anything_is_written(tmp_path):
    path = tmp_path / "a.gguf"

    def line(values=(), tensors=(), **changes):
        write_gguf(path, tiny_config(**changes), values=values, tensors=tensors)
        return refusal(path)

    ones = np.ones((96, 64), np.float32)
    assert "has no tensor blk.2.ffn_up.weight" in line(tensors=[("blk.2.ffn_up.weight", None)])
    assert "has no token_embd.weight" in line(tensors=[("token_embd.weight", None)])
    assert "tensor blk.1.ffn_extra.weight is unknown" in line(
        tensors=[("blk.1.ffn_extra.weight", ones)]
    )
    assert "tensor blk.01.ffn_up.weight is unknown" in line(
        tensors=[("blk.01.ffn_up.weight", ones)]
    )
    assert "blk.1.ffn_down.weight is of shape (96, 64), but its header requires (64, 96)" in line(
        tensors=[("blk.1.ffn_down.weight", ones)]
    )
    assert "blk.0.ffn_up.weight is of shape (0, 64)" in line(
        tensors=[("blk.0.ffn_up.weight", ones[:0])]
    )
    assert "has no tensor blk.0.attn_k.bias" in line(
        tensors=[("blk.0.attn_q.bias", np.ones(64, np.float32))]
    )
    for claimed in (2, 4, 4_000_000, 0):
        assert f"llama.block_count = {claimed}, but there are tensors for 3 blocks" in line(
            values=[("llama.block_count", claimed)]
        )
    assert "4 heads over 3 KV heads" in line(values=[("llama.attention.head_count_kv", 3)])
    assert "llama.attention.head_count = 0" in line(values=[("llama.attention.head_count", 0)])
    assert "llama.vocab_size = 259, but token_embd.weight has 260 rows" in line(
        values=[("llama.vocab_size", 259)]
    )


def test_rotary_frequencies_that_llama_cpp_makes_itself_are_left_out(tmp_path):
    unused = [(f"blk.{i}.attn_rot_embd.weight", np.ones(8, np.float32)) for i in range(3)]
    ones = [("rope_freqs.weight", np.ones(8, np.float32))]
    made = write_gguf(tmp_path / "a.gguf", tiny_config(), tensors=unused + ones)
    out = converted(tmp_path / "a.gguf", tmp_path / "out")
    names = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert names == made.keys()
    assert json.loads((out / "config.json").read_text())["rope_scaling"] is None


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.2.ffn_norm.weight"])
def test_float_tensors_that_are_not_finite_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, kind, bad, name
):
    monkeypatch.setattr("prunetool.checkpoint.gguf.CHECKED_VALUES", 64 * 100)  # not in one piece
    array = np.ones((260, 64) if name.startswith("token") else (64,), np.float32)
    array.reshape(-1)[-1] = bad
    type_ = gguf.GGMLQuantizationType[kind]
    stored = (gguf.quants.quantize(array, type_), type_)
    if kind == "F16":
        stored = array.astype(np.float16)
    write_gguf(tmp_path / "a.gguf", tiny_config(), tensors=[(name, stored)])
    assert f"tensor {name} holds NaN or infinity; download it again" in refusal(tmp_path / "a.gguf")


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    array = np.ones((260, 64), np.float32)
    array[259, 63] = 70000.0
    write_gguf(tmp_path / "a.gguf", tiny_config(), tensors=[("output.weight", array)])
    line = refusal(tmp_path / "a.gguf", "float16")
    assert "tensor output.weight holds a value beyond float16; give another --dtype" in line
    converted(tmp_path / "a.gguf", tmp_path / "out", "bfloat16")
    array[259, 63] = 3.4e38
    write_gguf(tmp_path / "a.gguf", tiny_config(), tensors=[("output.weight", array)])
    assert "a value beyond bfloat16" in refusal(tmp_path / "a.gguf", "bfloat16")


def test_a_quantised_tensor_that_is_not_finite_never_becomes_a_checkpoint(tmp_path):
    random = np.random.default_rng(0)
    type_ = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(random.standard_normal((96, 64)).astype(np.float32), type_)
    blocks[95, 0:2] = np.array([np.nan], np.float16).view(np.uint8)  # the scale of a block
    for name in ("blk.2.ffn_up.weight", "blk.0.ffn_up.weight"):
        write_gguf(tmp_path / "a.gguf", tiny_config(), tensors=[(name, (blocks, type_))])
        with pytest.raises(ConfigError, match=f"tensor {name} holds NaN or infinity"):
            convert_gguf(
                tmp_path / "a.gguf",
                tmp_path / name,
                "float32",
                max_shard_bytes=130_000,
                overwrite=False,
            )
        assert not (tmp_path / name / "model.safetensors.index.json").exists()
        shards = list((tmp_path / name).glob("*.safetensors"))
        assert len(shards) == 1 + int(name[4]), "the embedding and the layers before"


def test_a_kind_of_tensor_that_is_not_read_is_refused_before_anything_is_written(tmp_path):
    array = np.ones((260, 64))  # float64
    write_gguf(tmp_path / "a.gguf", tiny_config(), tensors=[("output.weight", array)])
    assert "output.weight is F64; convert from another quantisation" in refusal(tmp_path / "a.gguf")


def test_a_bias_that_no_layer_has_is_refused_by_name(tmp_path):
    bias = np.ones(64, np.float32)
    write_gguf(tmp_path / "a.gguf", tiny_config(), tensors=[("output_norm.bias", bias)])
    assert "output_norm.bias" in refusal(tmp_path / "a.gguf")


# --- keys

SCALED = [("llama.rope.scaling.factor", 4.0)]
YARN = [("llama.rope.scaling.type", "yarn"), ("llama.rope.scaling.factor", 4.0)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], {"rope_scaling": None, "rope_theta": 10000}),
        ([("llama.rope.freq_base", None)], {"rope_theta": 10000}),
        ([("llama.rope.freq_base", 500000.1)], {"rope_theta": 500000.1}),
        ([("llama.attention.head_count_kv", None)], {"num_key_value_heads": 4}),
        ([("llama.attention.head_count_kv", [4, 4, 4])], {"num_key_value_heads": 4}),
        ([("llama.attention.head_count", [4, 4, 4])], {"num_attention_heads": 4}),
        ([("llama.feed_forward_length", [96, 96, 96])], {"intermediate_size": 96}),
        ([("llama.attention.key_length", None)], {"head_dim": 16}),
        ([("llama.rope.dimension_count", None)], {"head_dim": 16}),
        ([("llama.attention.value_length", 16)], {"head_dim": 16}),
        (SCALED, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (
            [("llama.rope.scale_linear", 2.5)],
            {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        ),
        (
            [("llama.rope.scale_linear", 2.0), *SCALED],
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ([("llama.rope.scale_linear", 2.0), ("llama.rope.scaling.factor", 0.0)],
         {"rope_scaling": None}),
        ([("llama.rope.scaling.type", "none"), *SCALED], {"rope_scaling": None}),
        ([("llama.rope.scale_linear", 1.0)], {"rope_scaling": None}),
        (
            YARN,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 128}},
        ),
        (
            [*YARN, ("llama.rope.scaling.original_context_length", 32),
             ("llama.rope.scaling.yarn_beta_fast", 16.0),
             ("llama.rope.scaling.yarn_beta_slow", 2.0)],
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0,
                              "beta_slow": 2.0, "original_max_position_embeddings": 32}},
        ),
        (
            [*YARN, ("llama.rope.scaling.attn_factor", 0.5)],
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 128,
                              "attention_factor": 0.5 * (1 + 0.1 * np.log(4))}},
        ),
        ([("tokenizer.ggml.bos_token_id", 3), ("tokenizer.ggml.padding_token_id", 0)],
         {"bos_token_id": 3, "eos_token_id": None, "pad_token_id": 0}),
        ([("llama.vocab_size", 260), ("llama.attention.causal", True), ("llama.logit_scale", 0.0),
          ("llama.tensor_data_layout", "Meta AI original pth"), ("llama.expert_count", 0)], {}),
    ],
)  # fmt: skip
def test_keys_and_their_defaults_are_read_as_llama_cpp_reads_them(tmp_path, values, said):
    heads = 4 if any("head_count" in key and value != 2 for key, value in values) else 2
    write_gguf(tmp_path / "a.gguf", tiny_config(num_key_value_heads=heads), values=values)
    config = GGUFModel(tmp_path / "a.gguf").config("float32")
    assert {key: config[key] for key in said} == said
    parse_config(config, "")
    converted(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([("llama.attention.value_length", 8)], "llama.attention.value_length = 8 with heads of"),
        ([("llama.attention.key_length", 32)], "llama.attention.value_length = 16 with heads of"),
        ([("llama.rope.dimension_count", 8)], "llama.rope.dimension_count = 8 with heads of 16"),
        ([("llama.attention.head_count", [4, 4, 2])], "head_count is not the same number in every"),
        ([("llama.attention.head_count", [4, 4])], "head_count is not the same number in every"),
        ([("llama.feed_forward_length", [96, 96, 32])], "feed_forward_length is not the same"),
        ([("llama.attention.head_count_kv", [2, 1, 2])], "head_count_kv is not the same number"),
        ([("llama.expert_count", 8)], "llama.expert_count = 8 is not supported; supported: 0"),
        ([("llama.attention.causal", False)], "llama.attention.causal = False is not supported"),
        ([("llama.attention.clamp_kqv", 8.0)], "llama.attention.clamp_kqv = 8.0 is not supported"),
        ([("llama.logit_scale", 0.5)], "llama.logit_scale = 0.5 is not supported; supported: 0.0"),
        ([("llama.embedding_scale", 12.0)], "llama.embedding_scale = 12.0 is not supported"),
        ([("llama.residual_scale", 0.5)], "llama.residual_scale = 0.5 is not supported"),
        ([("llama.attention.scale", 0.5)], "llama.attention.scale = 0.5 is not supported"),
        ([("llama.attention.sliding_window", 64)], "llama.attention.sliding_window = 64 is not"),
        ([("llama.of_the_future", 1)], "llama.of_the_future = 1 is not supported; unknown key"),
        ([("llama.rope.scaling.type", "longrope")], "rope scaling 'longrope'"),
        ([("llama.rope.scaling.attn_factor", 0.5)], "attn_factor = 0.5 with rope scaling 'linear'"),
        ([*YARN, ("llama.rope.scaling.yarn_ext_factor", 0.5)], "yarn_ext_factor = 0.5"),
        ([*YARN, ("llama.rope.scaling.yarn_attn_factor", 0.5)], "yarn_attn_factor = 0.5 is not"),
        ([*YARN, ("llama.rope.scaling.yarn_log_multiplier", 0.1)], "yarn_log_multiplier = 0.1"),
        ([*YARN, ("llama.rope.scaling.yarn_beta_fast", 0.0)], "yarn_beta_fast = 0.0; it must be"),
        ([("llama.rope.scaling.factor", float("inf"))], "rope.scaling.factor = inf"),
        ([("llama.rope.scale_linear", -2.0)], "rope.scale_linear = -2.0; it must be positive"),
        ([("llama.rope.freq_base", 0.0)], "llama.rope.freq_base = 0.0; it must be positive"),
        ([("llama.rope.freq_base", float("nan"))], "llama.rope.freq_base = nan"),
        ([("llama.rope.freq_base", "many")], "freq_base = 'many'; it must be of type float"),
        ([("llama.block_count", 3.0)], "llama.block_count = 3.0; it must be of type integer"),
        ([("llama.block_count", [3])], "llama.block_count = [3]; it must be of type integer"),
        ([("llama.block_count", None)], "has no llama.block_count"),
        ([("llama.embedding_length", True)], "embedding_length = True; it must be of type integer"),
        ([("llama.context_length", None)], "has no llama.context_length"),
        ([("llama.context_length", -1)], "context_length = -1; it must be from 1 to 2**31 - 1"),
        ([("llama.attention.layer_norm_rms_epsilon", None)], "has no llama.attention.layer_norm"),
        ([("llama.rope.scaling.type", b"\xff")], "rope.scaling.type cannot be read"),
        ([("general.architecture", 7)], "general.architecture = 7; it must be of type string"),
    ],
)
def test_a_key_that_makes_another_model_is_refused_by_name(tmp_path, values, says):
    write_gguf(tmp_path / "a.gguf", tiny_config(), values=values)
    assert says in refusal(tmp_path / "a.gguf")


def test_two_rotary_scalings_at_once_are_refused(tmp_path):
    turns = 8192 * 500000.0 ** -(np.arange(0, 16, 2) / 16) / (2 * np.pi)
    blend = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - blend) / 8 + blend)).astype(np.float32)
    config = tiny_config(rope_theta=500000.0)
    llama3 = [("rope_freqs.weight", divisors)]
    write_gguf(tmp_path / "a.gguf", config, values=SCALED, tensors=llama3)
    assert "has both rope_freqs.weight and rope scaling 'linear'" in refusal(tmp_path / "a.gguf")
    write_gguf(tmp_path / "a.gguf", config, tensors=[("rope_freqs.weight", divisors[:4])])
    assert "rope_freqs.weight is not Llama 3's scaling" in refusal(tmp_path / "a.gguf")
    write_gguf(tmp_path / "a.gguf", config, tensors=[("rope_freqs.weight", 0 * divisors)])
    assert "rope_freqs.weight is not Llama 3's scaling" in refusal(tmp_path / "a.gguf")


@pytest.mark.parametrize(("values", "type_"), [([], "default"), (SCALED, "linear"), (YARN, "yarn")])
def test_transformers_reads_the_rotary_embedding_that_was_written(tmp_path, values, type_):
    from transformers import AutoConfig

    values = [*values, ("llama.rope.freq_base", 25000.0)]
    write_gguf(tmp_path / "a.gguf", tiny_config(), values=values)
    out = converted(tmp_path / "a.gguf", tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert "rope_parameters" not in written
    read = AutoConfig.from_pretrained(out).rope_parameters
    expected = {"rope_type": type_, "rope_theta": 25000, **(written["rope_scaling"] or {})}
    assert {key: read[key] for key in expected} == expected


# --- damage


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", tiny_config())
    whole = (tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        assert "cut.gguf: cannot be read as GGUF" in refusal(cut)


@pytest.mark.parametrize("last", [7, "sixteen letters.", [1, 2, 3, 4]])
def test_a_last_value_that_is_cut_off_is_not_taken_for_a_shorter_one(tmp_path, last):
    keys = {"llama.block_count": 0, "general.last": last}
    whole = write_file(tmp_path / "a.gguf", keys, {}).read_bytes().rstrip(b"\0")
    end = whole.index(b"general.last") + 12 + 4 + (12 if last == [1, 2, 3, 4] else 8)
    cut = tmp_path / "cut.gguf"
    for length in range(end - 8, len(whole) - 1, 4):
        cut.write_bytes(whole[:length])
        assert "cut.gguf: cannot be read as GGUF" in refusal(cut)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0),  # tensors without a name
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60),  # values without a key
        struct.pack("<4sIQQQcIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**60),  # empty texts
        struct.pack("<4sIQQQcIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 0, 2**60),  # numbers of a byte
        struct.pack("<4sIQQQcI", b"GGUF", 3, 0, 1, 1, b"k", 9) + 9000 * struct.pack("<IQ", 9, 1),
    ],
)
def test_a_forged_count_takes_no_memory_for_what_zeros_can_be_read_as(tmp_path, header):
    (tmp_path / "a.gguf").write_bytes(header + bytes(1 << 22))
    tracemalloc.start()
    line = refusal(tmp_path / "a.gguf")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "a.gguf: cannot be read as GGUF" in line
    assert peak_bytes < 10e6


def damaged(path, changes):
    """Write the file with other bytes at some places."""
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place : place + len(value)] = value
    (path.parent / "damaged.gguf").write_bytes(data)
    return path.parent / "damaged.gguf"


def test_forged_headers_are_refused_and_take_no_memory(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, tiny_config(num_hidden_layers=1), values=[("llama.of", [1, 2, 3])])
    data = path.read_bytes()
    many = struct.pack("<Q", 2**60)
    reader = gguf.GGUFReader(path)
    tensor = reader.tensors[2]
    at = tensor.field.offset + 8 + len(tensor.name)  # its dimensions, type and offset
    texts = reader.fields["tokenizer.ggml.tokens"]
    numbers = reader.fields["llama.of"]

    def length_of(field):
        return field.offset + 8 + len(field.name) + 4 + 4

    forged = {
        "wrong magic": [(0, b"GGML")],
        "version 1": [(4, struct.pack("<I", 1))],
        "big-endian": [(4, struct.pack(">I", 3))],
        "tensors": [(8, many)],
        "values": [(16, many)],
        "first key": [(24, many)],
        "array": [(length_of(numbers), many)],
        "texts": [(length_of(texts), many)],
        "array of arrays": [(length_of(numbers) - 4, struct.pack("<I", 9))],
        "type of array": [(length_of(numbers) - 4, struct.pack("<I", 99))],
        "dimensions": [(at, struct.pack("<I", 2**31))],
        "extent": [(at + 4, many)],
        "extents": [(at + 4, 2 * struct.pack("<Q", 2**32))],
        "tensor type": [(at + 20, struct.pack("<I", 999))],
        "offset beyond": [(at + 24, many)],
        "offset that wraps": [(at + 24, struct.pack("<Q", 2**64 - 4096))],
        "offset of another": [(at + 24, struct.pack("<Q", 0))],
    }
    assert len(reader.tensors[2].shape) == 2
    tail = bytes(1 << 23)  # zeros may be read as empty strings, numbers and tensors
    (tmp_path / "long.gguf").write_bytes(data + tail)
    for what, changes in forged.items():
        for base in (path, tmp_path / "long.gguf"):
            tracemalloc.start()
            line = refusal(damaged(base, changes))
            _, peak_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert "damaged.gguf: cannot be read as GGUF" in line, what
            assert peak_bytes < 30e6, what


def test_a_big_endian_file_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", tiny_config(), endianess=gguf.GGUFEndian.BIG)
    assert "cannot be read as GGUF (it is big-endian)" in refusal(tmp_path / "a.gguf")


def test_flipped_bytes_of_a_header_give_one_line_or_a_checkpoint(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, tiny_config(num_hidden_layers=1))
    end = int(gguf.GGUFReader(path).data_offset)
    random = np.random.default_rng(0)
    said = []
    for number in range(120):
        place = int(random.integers(end))
        with path.open("rb") as file:
            old = file.read()[place]
        broken = damaged(path, [(place, bytes([old ^ int(random.integers(1, 256))]))])
        try:
            convert_gguf(
                broken, tmp_path / f"out{number}", "float32", max_shard_bytes=10**9, overwrite=False
            )
        except ConfigError as error:
            said.append(str(error))
    assert len(said) > 20
    assert not any("\n" in line for line in said)


def test_what_is_not_a_regular_file_is_refused_and_not_waited_for(tmp_path, run):
    os.mkfifo(tmp_path / "fifo.gguf")
    for path, what in (tmp_path / "fifo.gguf", "not a regular file"), (tmp_path, "a directory"):
        line = error_of(run("convert", path, tmp_path / "out", ok=False))
        assert f"{path}: is {what}" in line


# --- tokenizers


def byte_level(**values):
    """Metadata of a byte-level tokenizer of 260 tokens: letters, four merged ones, two controls."""
    texts = sorted(pre_tokenizers.ByteLevel.alphabet())[:252]
    texts += ["he", "ll", "hell", "hello", "user>", "Ġh", "<bos>", "<eos>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1] * 256 + [4, 1, 3, 3],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "Ġ h"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
    }


TRAINED = {}


def sentencepiece_model(directory):
    """A SentencePiece model of 340 pieces, and its metadata as llama.cpp's converter writes it."""
    if not TRAINED:
        random = np.random.default_rng(0)
        lines = [" ".join(random.choice(WORDS, 8)) for _ in range(300)]
        (directory / "text.txt").write_text("\n".join(lines))
        sentencepiece.SentencePieceTrainer.train(
            input=str(directory / "text.txt"), model_prefix=str(directory / "sp"), vocab_size=340,
            model_type="bpe", byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
        TRAINED["model"] = (directory / "sp.model").read_bytes()
    judge = sentencepiece.SentencePieceProcessor(model_proto=TRAINED["model"])
    count = range(judge.get_piece_size())
    return judge, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [judge.id_to_piece(i) for i in count],
        "tokenizer.ggml.scores": [judge.get_score(i) for i in count],
        "tokenizer.ggml.token_type": [
            2 if judge.is_unknown(i) else 3 if judge.is_control(i) else 6 if judge.is_byte(i) else 1
            for i in count
        ],
    }


def tokenizer_of(tmp_path, values, name="a", **changes):
    """The tokenizer of the converted checkpoint, and the directory."""
    write_gguf(tmp_path / f"{name}.gguf", tiny_config(**changes), values=values)
    out = converted(tmp_path / f"{name}.gguf", tmp_path / name)
    return Tokenizer.from_file(str(out / "tokenizer.json")), out


@pytest.mark.parametrize(
    ("pre", "flags", "first", "last"),
    [
        ("gpt-2", {}, [], []),
        ("gpt-2", {"add_bos_token": True}, [258], []),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [258], [259]),
        ("smollm", {}, [], []),
        ("smollm", {"add_eos_token": True}, [], [259]),
        ("qwen2", {}, [], []),
        ("llama-bpe", {}, [258], []),
        ("llama3", {"add_bos_token": True}, [258], []),
        ("llama-v3", {"add_bos_token": False}, [], []),
        ("llama-bpe", {"bos_token_id": None}, [], []),
    ],
)
def test_a_byte_level_tokenizer_adds_bos_and_eos_as_its_header_says(
    tmp_path, pre, flags, first, last
):
    from transformers import AutoTokenizer

    values = byte_level(pre=pre, **flags)
    ours, out = tokenizer_of(tmp_path, values)
    middle = ours.encode("hell on", add_special_tokens=False).ids
    assert ours.encode("hell on").ids == [*first, *middle, *last]
    assert ours.encode("he", "ll").ids == [*first, 252, *last, *first, 253, *last]
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("hell on").input_ids == [*first, *middle, *last]
    said = json.loads((out / "tokenizer_config.json").read_text())
    assert (said["add_bos_token"], said["add_eos_token"]) == (bool(first), bool(last))
    if pre != "smollm" and "add_bos_token" in flags:  # without the flag it adds none, ever
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
        assert theirs("hell on").input_ids == [*first, *middle, *last]


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"bos_token_id": 1}, [1], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"bos_token_id": 2, "eos_token_id": 1, "add_eos_token": True}, [2], [1]),
    ],
)
def test_a_sentencepiece_tokenizer_adds_bos_and_eos_as_its_header_says(
    tmp_path, flags, first, last
):
    from transformers import AutoTokenizer

    judge, values = sentencepiece_model(tmp_path)
    values |= {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    ours, out = tokenizer_of(tmp_path, values, vocab_size=340)
    loaded = AutoTokenizer.from_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("the quick brown foxes", "unseen wörds, 123", "a"):
        expected = [*first, *judge.encode(text), *last]
        assert ours.encode(text).ids == expected
        assert loaded(text).input_ids == expected
        if "bos_token_id" in flags or not first:  # transformers has no default ids
            assert theirs(text).input_ids == expected
    said = json.loads((out / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == ((2, 1) if 2 in first else (1, 2))


def test_a_control_token_is_special_and_a_users_is_not(tmp_path):
    ours, _ = tokenizer_of(tmp_path, byte_level())
    special = {t.content: t.special for t in ours.get_added_tokens_decoder().values()}
    assert special == {"<bos>": True, "<eos>": True, "user>": False}
    ids = ours.encode("user><eos>", add_special_tokens=False).ids
    assert ids == [256, 259]
    assert ours.decode(ids) == "user>"
    assert ours.decode(ids, skip_special_tokens=False) == "user><eos>"


def test_llama_3_takes_a_word_that_is_a_token_as_it_is(tmp_path):
    values = byte_level(add_bos_token=False)  # no merge makes "hello"
    plain, _ = tokenizer_of(tmp_path, values, "plain")
    values["tokenizer.ggml.pre"] = "llama-bpe"
    llama3, _ = tokenizer_of(tmp_path, values, "llama3")
    assert llama3.encode("hello").ids == [255]
    assert plain.encode("hello").tokens == ["hell", "o"]


def test_qwen2_splits_a_text_as_transformers_does(tmp_path):
    ours, _ = tokenizer_of(tmp_path, byte_level(pre="qwen2"))
    theirs = Qwen2Tokenizer().backend_tokenizer
    text = "It's 12345 cafe\u0301s,\n\n  we'LL see 5 1/2\tways  "
    plain = ours.normalizer.normalize_str(text)
    assert plain == theirs.normalizer.normalize_str(text) != text
    split = ours.pre_tokenizer.pre_tokenize_str(plain)
    assert split == theirs.pre_tokenizer.pre_tokenize_str(plain)
    assert ("3", (7, 8)) in split


def test_of_merges_with_equal_scores_the_lower_id_goes_first(tmp_path):
    texts = ["<unk>", "<s>", "</s>", *"abcd", "ab", "bc", "cd", "\u2581"]
    ids = {text: number for number, text in enumerate(texts)}
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 8,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }

    def pieces(name, text, scores):
        values["tokenizer.ggml.scores"] = [0.0] * 7 + scores + [0.0]
        return tokenizer_of(tmp_path, values, name, vocab_size=len(texts))[0].encode(text).tokens

    assert ids["ab"] < ids["bc"] < ids["cd"]
    assert pieces("tie", "abcd", [-1.0, -1.0, -1.0]) == ["ab", "cd"]
    assert pieces("tie2", "bcd", [-1.0, -1.0, -1.0]) == ["bc", "d"]
    assert pieces("best", "abcd", [-2.0, -1.0, -3.0]) == ["a", "bc", "d"]
    merges = json.loads((tmp_path / "tie" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == [["a", "b"], ["b", "c"], ["c", "d"]]


def test_no_merge_makes_an_unused_piece(tmp_path):
    texts = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581"]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * 7,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    for type_, pieces in ((1, ["ab"]), (4, ["ab"]), (5, ["a", "b"])):
        values["tokenizer.ggml.token_type"] = [2, 3, 3, 1, 1, type_, 1]
        ours, _ = tokenizer_of(tmp_path, values, f"type{type_}", vocab_size=len(texts))
        assert ours.encode("ab").tokens == pieces


def test_of_two_ways_to_make_a_piece_the_one_with_the_lower_ids_goes_first(tmp_path):
    texts = ["<unk>", "<s>", "</s>", "bc", "c", "a", "ab", "b", "abc", "\u2581"]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 7,
        "tokenizer.ggml.scores": [0.0] * 3 + [-2.0, 0.0, 0.0, -1.0, 0.0, -3.0, 0.0],
    }
    _, out = tokenizer_of(tmp_path, values, vocab_size=len(texts))
    merges = json.loads((out / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]


def test_an_empty_token_gets_the_name_that_llama_cpp_gives_it(tmp_path):
    values = byte_level()
    values["tokenizer.ggml.tokens"][7:9] = ["", ""]
    ours, _ = tokenizer_of(tmp_path, values)
    assert [ours.id_to_token(i) for i in (7, 8)] == ["[EMPTY_7]", "[EMPTY_8]"]


def test_of_a_merge_said_twice_the_first_counts(tmp_path):
    values = byte_level(merges=["h e", "e l", "l l", "h e"])
    values["tokenizer.ggml.tokens"][255] = "el"
    ours, _ = tokenizer_of(tmp_path, values)
    assert ours.encode("hel").tokens == ["he", "l"]


TEXTS = byte_level()["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tokens", None, "has no tokenizer.ggml.tokens"),
        ("tokens", TEXTS[:-1], "has 259 tokens but 260 rows of token_embd.weight"),
        ("tokens", ["a", *TEXTS[1:]], "token 'a' has the ids 0 and"),
        ("tokens", [b"\xff\xfe", *TEXTS[1:]], "tokenizer.ggml.tokens cannot be read"),
        ("tokens", list(range(260)), "tokenizer.ggml.tokens is not an array of type string"),
        ("tokens", "abc", "tokenizer.ggml.tokens is not an array of type string"),
        ("token_type", [1] * 259, "tokenizer.ggml.token_type has 259 values for 260 tokens"),
        ("token_type", [1.0] * 260, "tokenizer.ggml.token_type is not an array of type integer"),
        ("merges", None, "has no tokenizer.ggml.merges"),
        ("merges", ["h e", "h zz"], "merge 'h zz' is not in its vocabulary"),
        ("merges", ["he"], "merge 'he' is not in its vocabulary"),
        ("merges", ["l h"], "merge 'l h' is not in its vocabulary"),
        ("merges", [b"h \xff"], "tokenizer.ggml.merges cannot be read"),
        ("model", None, "has no tokenizer.ggml.model"),
        ("model", "bert", "tokenizer 'bert'; supported: gpt2, llama"),
        ("model", 5, "tokenizer.ggml.model = 5; it must be of type string"),
        ("pre", 5, "tokenizer.ggml.pre = 5; it must be of type string"),
        ("bos_token_id", 260, "tokenizer.ggml.bos_token_id = 260, outside the vocabulary of 260"),
        ("eos_token_id", -1, "tokenizer.ggml.eos_token_id = -1, outside the vocabulary of 260"),
        (
            "unknown_token_id",
            1000,
            "tokenizer.ggml.unknown_token_id = 1000, outside the vocabulary of 260",
        ),
        ("padding_token_id", 1.5, "padding_token_id = 1.5; it must be of type integer"),
        ("add_bos_token", 1, "add_bos_token = 1; it must be of type boolean"),
    ],
)
def test_a_tokenizer_that_does_not_fit_together_is_refused(tmp_path, key, value, says):
    values = byte_level(**{key: value})
    write_gguf(tmp_path / "a.gguf", tiny_config(), values=values)
    assert says in refusal(tmp_path / "a.gguf")


def test_bos_that_is_to_be_added_must_be_named(tmp_path):
    values = byte_level(add_bos_token=True, bos_token_id=None)
    write_gguf(tmp_path / "a.gguf", tiny_config(), values=values)
    line = refusal(tmp_path / "a.gguf")
    assert "adds BOS, but has no tokenizer.ggml.bos_token_id" in line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda scores: scores[:-1], "tokenizer.ggml.scores has 339 values for 340 tokens"),
        (lambda scores: None, "has no tokenizer.ggml.scores"),
        (lambda scores: [*scores[:-1], float("nan")], "has the score nan"),
        (lambda scores: [*scores[:-1], float("-inf")], "has the score -inf"),
        (lambda scores: ["x"] * 340, "tokenizer.ggml.scores is not an array of type float"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path, change, says):
    _, values = sentencepiece_model(tmp_path)
    values["tokenizer.ggml.scores"] = change(values["tokenizer.ggml.scores"])
    write_gguf(tmp_path / "a.gguf", tiny_config(vocab_size=340), values=values)
    assert says in refusal(tmp_path / "a.gguf")


def test_what_the_tokenizers_library_refuses_is_one_line(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    write_gguf(tmp_path / "a.gguf", tiny_config())
    for error in (PanicException("called unwrap"), Exception("called unwrap")):

        def bpe(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr("prunetool.checkpoint.gguf_tokenizer.models.BPE", bpe)
        line = refusal(tmp_path / "a.gguf")
        assert "its tokenizer cannot be built (called unwrap)" in line

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("prunetool.checkpoint.gguf_tokenizer.models.BPE", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(
            tmp_path / "a.gguf", tmp_path / "out", "float32", max_shard_bytes=10**9, overwrite=False
        )

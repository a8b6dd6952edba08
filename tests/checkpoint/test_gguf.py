import json

import gguf
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from prunetool.checkpoint.gguf import GGUFModel
from prunetool.errors import ConfigError
from prunetool.llama.config import parse_config
from prunetool.llama.weights import tensor_shapes
from tests.conftest import error_of, tiny_config

OURS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip


def letters(count):
    return [*(chr(0x4E00 + i) for i in range(count - 1)), "\u4e00\u4e01"]


def interleave(array, heads):
    """As llama.cpp's converter stores q and k."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, config, *, architecture="llama", values=(), tensors=(), tokenizer=None):
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for key, value in values:
        (writer.add_float32 if isinstance(value, float) else writer.add_string)(key, value)
    if tokenizer is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(letters(config["vocab_size"]))
        writer.add_token_merges(["\u4e00 \u4e01"])
    else:
        tokenizer(writer)
    made = {}
    for name, shape in tensor_shapes(parse_config(config, "")).items():
        array = made[name] = random.standard_normal(shape).astype(np.float32)
        if name in GLOBAL:
            writer.add_tensor(GLOBAL[name], array)
            continue
        _, _, layer, part = name.split(".", 3)
        part, kind = part.rsplit(".", 1)
        if part.endswith(("q_proj", "k_proj")):
            heads = "num_attention_heads" if "q_proj" in part else "num_key_value_heads"
            array = interleave(array, config[heads])
        writer.add_tensor(f"blk.{layer}.{OURS[part]}.{kind}", array)
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


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


def test_rope_scaling_comes_back(tmp_path):
    inverse = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    turns = 8192 * inverse / (2 * np.pi)
    blend = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - blend) / 32 + blend)).astype(np.float32)
    config = tiny_config(rope_theta=500000.0)
    write_gguf(tmp_path / "3.gguf", config, tensors=[("rope_freqs.weight", divisors)])
    scaling = GGUFModel(tmp_path / "3.gguf").config("float32")["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", config, tensors=[("rope_freqs.weight", divisors[::-1].copy())])
    with pytest.raises(ConfigError, match="is not Llama 3's scaling"):
        GGUFModel(tmp_path / "x.gguf").config("float32")
    linear = [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0)]
    write_gguf(tmp_path / "l.gguf", config, values=linear)
    scaling = GGUFModel(tmp_path / "l.gguf").config("float32")["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 4.0}


def test_what_is_not_converted_is_refused_by_name(tmp_path, run):
    write_gguf(tmp_path / "q.gguf", tiny_config(), architecture="qwen2")
    line = error_of(run("convert", tmp_path / "q.gguf", tmp_path / "out", ok=False))
    assert "architecture 'qwen2'; only llama is converted" in line
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
    assert "pre-tokenizer 'unheard-of'; known: gpt-2, llama-bpe" in line

    def torn(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(letters(260))
        writer.add_token_merges(["\u4e00 \u4e05"])

    write_gguf(tmp_path / "m.gguf", tiny_config(), tokenizer=torn)
    line = error_of(run("convert", tmp_path / "m.gguf", tmp_path / "out", ok=False))
    assert "is not of its vocabulary" in line
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids(tmp_path, run):
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dogs",
        "and",
        "then",
        "sleeps",
        "in",
        "warm",
        "sun",
    ]
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(words, 8)) for _ in range(300)]
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

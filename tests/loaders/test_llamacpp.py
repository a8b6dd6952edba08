"""llama.cpp computes from a GGUF what is computed here from the checkpoint, and reads its text."""

import json
import signal
from dataclasses import replace

import gguf
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from prunetool.chat import chat_templates
from prunetool.checkpoint.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT
from prunetool.checkpoint.gguf_vocabulary import Ends, vocabulary_fields
from prunetool.checkpoint.gguf_writer import KINDS
from prunetool.checkpoint.reader import read_tensor
from prunetool.commands.convert import convert
from prunetool.errors import ConfigError
from prunetool.model import open_model
from prunetool.tokenizer import load_tokenizer
from tests.conftest import DIE, byte_tokenizer, error_of, tiny_config, write_checkpoint
from tests.llama.test_forward import logits
from tests.loaders.conftest import LLAMA3
from tests.test_families import load

llama = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama is not here")

IDS = np.random.default_rng(3).integers(0, 250, 48)


class Model(llama.LlamaModel):
    """The wheel's own `LlamaContext` asks for this."""

    n_vocab = property(lambda self: self.get_vocab().n_vocab)


class Judge:
    """A GGUF file in llama.cpp."""

    def __init__(self, path, length=512):
        llama.disable_logging()
        how = llama.LlamaModelParams()
        how.n_gpu_layers = 0
        self.model = Model(str(path), how)
        self.vocab = self.model.get_vocab()
        self._how = llama.LlamaContextParams()
        self._how.n_threads = self._how.n_threads_batch = 2
        self._how.n_ctx = self._how.n_batch = self._how.n_ubatch = length
        self._how.flash_attn_type = 0  # with it, logits differ by up to 7e-2
        self._how.type_k = self._how.type_v = 0  # float32
        self._length = length

    def logits(self, ids):
        """Logits after each token, (n, V)."""
        context = llama.LlamaContext(self.model, self._how)
        batch = llama.LlamaBatch(n_tokens=self._length, embd=0, n_seq_max=1)
        for place, number in enumerate(ids):
            batch.add(int(number), place, [0], True)
        context.decode(batch)
        return np.array([context.get_logits_ith(place) for place in range(len(ids))])

    def continued(self, ids, count):
        """The ids and the likeliest ``count`` that follow them, with a cache."""
        context, ids = llama.LlamaContext(self.model, self._how), list(map(int, ids))
        done = 0
        for _ in range(count):
            batch = llama.LlamaBatch(n_tokens=self._length, embd=0, n_seq_max=1)
            for place in range(done, len(ids)):
                batch.add(ids[place], place, [0], True)
            context.decode(batch)
            scores = context.get_logits_ith(len(ids) - 1 - done)
            done = len(ids)
            ids.append(int(np.argmax(scores)))
        return np.array(ids)

    def ids(self, text, special=False):
        """Ids of a text, with BOS and EOS if ``special``."""
        return self.vocab.tokenize(text, add_special=special, parse_special=True)


def with_merges(directory):
    """A tokenizer of some merges: llama.cpp reads no byte-level one without."""
    tokenizer = byte_tokenizer()
    document = json.loads(tokenizer.to_str())
    document["model"]["vocab"] |= {"he": 256, "th": 257}
    for number, token in enumerate(document["added_tokens"]):
        token["id"] = 258 + number
    document["model"]["merges"] = [["h", "e"], ["t", "h"]]
    Tokenizer.from_str(json.dumps(document)).save(str(directory / "tokenizer.json"))
    return directory


def worst(directory, judge, ids=IDS):
    """The largest difference of a logit, and the largest logit."""
    ours = logits(open_model(str(directory)), ids[None])[0]
    return np.abs(judge.logits(ids) - ours).max(), np.abs(ours).max()


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 8192},  # as published
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, factor of its own": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "attention_factor": 1.3, "beta_fast": 16.0,
    },
}  # fmt: skip
MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, fewer heads": {"model_type": "qwen2", "num_attention_heads": 2},
    "qwen2, llama3": {"model_type": "qwen2", "rope_scaling": LLAMA3},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    **{name: {"rope_scaling": rope} for name, rope in ROPES.items()},
}


def build(tmp_path, changes):
    plain = {"attention_bias": "absent", "mlp_bias": "absent"} if "model_type" in changes else {}
    return with_merges(write_checkpoint(tmp_path / "dense", tiny_config(**plain, **changes)))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_dense_model_is_the_same_in_llama_cpp_and_comes_back(tmp_path, call, changes):
    directory = build(tmp_path, changes)
    call("convert", "dense", "dense.gguf", "--type", "f32")
    difference, size = worst(directory, Judge(tmp_path / "dense.gguf"))
    assert difference < 2e-5 * size
    if changes == MODELS["qwen2, llama3"]:  # of other numbers than convert knows
        return
    call("convert", "dense.gguf", "back", "--dtype", "float32")
    there, back = (open_model(str(path)) for path in (directory, tmp_path / "back"))
    for name in there.index:
        assert (read_tensor(there.index, name) == read_tensor(back.index, name)).all()
    assert worst(tmp_path / "back", Judge(tmp_path / "dense.gguf"))[0] < 2e-5 * size


def test_named_chat_templates_come_back(tmp_path, call):
    directory = build(tmp_path, {})
    named = [{"name": n, "template": f"{n} {{{{ x }}}}"} for n in ("default", "rag")]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    call("convert", "dense", "dense.gguf")
    call("convert", "dense.gguf", "back")
    assert chat_templates(tmp_path / "back") == chat_templates(directory)
    assert len(chat_templates(directory)) == 2


def test_unequal_layers_are_the_same_in_llama_cpp(unequal, request, run, tmp_path):
    with_merges(unequal)
    done = run("convert", unequal, "out.gguf", "--type", "f32", ok=False)
    if "qwen3" in request.node.callspec.id:
        assert "no architecture with norms of the heads and layers of unequal sizes" in error_of(
            done
        )
        return
    assert done.returncode == 0, done.stderr
    judge = Judge(tmp_path / "out.gguf")
    ids = IDS[:16]  # in a window, of which llama.cpp knows nothing
    assert ("computes no window" in done.stderr) == ("window" in request.node.callspec.id)
    difference, size = worst(unequal, judge, ids)
    assert difference < 2e-5 * size
    done = run("convert", "out.gguf", "back", "--dtype", "float32", ok=False)
    if "llama3" in request.node.callspec.id:  # with other numbers than the published models'
        assert "rope_freqs.weight is not Llama 3's scaling" in error_of(done)
        return
    assert done.returncode == 0, done.stderr
    there, back = (open_model(str(path)) for path in (unequal, tmp_path / "back"))
    assert back.config.with_shapes(()) == replace(
        there.config.with_shapes(()), raw=back.config.raw, window=None, rope=back.config.rope
    )
    assert back.config.layer_shapes == there.config.layer_shapes
    for name in there.index:
        assert (read_tensor(there.index, name) == read_tensor(back.index, name)).all()
    assert type(load(tmp_path / "back")).__name__ == "PrunedLlamaForCausalLM"


def test_convert_offers_the_types_that_are_written():
    (option,) = [option for option in convert.params if option.name == "kind"]
    assert list(option.type.choices) == list(KINDS), "without importing them at every start"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32"])
def test_other_types_are_read_alike(tmp_path, call, kind):
    directory = build(tmp_path, {})
    call("convert", "dense", "out.gguf", "--type", kind)
    call("convert", "out.gguf", "back", "--dtype", "float32")
    judge = Judge(tmp_path / "out.gguf")
    difference, size = worst(tmp_path / "back", judge)  # llama.cpp rounds the inputs as well
    assert difference < {"f16": 5e-3, "bf16": 0.02}.get(kind, 0.08) * size
    assert worst(directory, judge)[0] > difference, (
        "the weights are rounded, and most comes of that"
    )


def test_a_split_model_is_the_same(tmp_path, call):
    directory = build(tmp_path, {})
    call("convert", "dense", "out.gguf", "--type", "f32", "--max-shard-size", "200KB")
    first, *others = sorted(tmp_path.glob("*.gguf"))
    assert first.name == f"out-00001-of-{1 + len(others):05d}.gguf"
    assert others
    difference, size = worst(directory, Judge(first))
    assert difference < 2e-5 * size


def test_no_file_of_another_number_of_parts_stays(tmp_path, call, run):
    build(tmp_path, {})
    (tmp_path / "out-final-of-tests.gguf").write_text("mine")
    left = []
    for size in ("5GB", "200KB", "100KB", "5GB"):
        words = ["convert", "dense", "out.gguf", "--max-shard-size", size]
        if left:
            assert "exists; give --overwrite" in error_of(run(*words, ok=False))
        call(*words, "--overwrite")
        assert (tmp_path / "out-final-of-tests.gguf").read_text() == "mine"
        made = (path.name for path in tmp_path.glob("*.gguf") if "final" not in path.name)
        old, left = left, sorted(made)
        assert not {*old} & {*left}
        assert len({name.partition("-of-")[2] for name in left}) == 1


def byte_level(lines, pre):
    """A byte-level BPE tokenizer trained on some lines, as published ones of this splitting are."""
    rules = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
    }
    if pre in ("llama-bpe", "qwen2"):
        split = Regex(LLAMA3_SPLIT if pre == "llama-bpe" else QWEN2_SPLIT)
        rules[pre] = [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules[pre])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<bos>", "<eos>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 0)]
        )
    return tokenizer


def lines_of(wikitext, count):
    """Lines of real text, and some that are unlike it."""
    found = (wikitext / "wiki.test.raw").read_text("utf-8").splitlines()
    odd = [
        "  two  spaces ",
        "12345 1,234.5",
        "\ttab\n\nlines\r\n",
        "ünïcode 漢字 🙂",
        "I'm, WE'LL",
        "<bos>",
    ]
    return [*odd, *[line for line in found if line.strip()][: count - len(odd)]]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_gives_the_same_ids(tmp_path, call, wikitext, pre):
    lines = lines_of(wikitext, 2000)
    tokenizer = byte_level(lines[:1000], pre)
    config = tiny_config(vocab_size=2048, bos_token_id=0, eos_token_id=[1, 0])  # more than tokens
    directory = write_checkpoint(tmp_path / "dense", config)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>",
                    "chat_template": template})
    )  # fmt: skip
    call("convert", "dense", "out.gguf")
    judge = Judge(tmp_path / "out.gguf")
    for line in lines:
        assert judge.ids(line) == tokenizer.encode(line, add_special_tokens=False).ids, line
    assert judge.ids("a", special=True) == tokenizer.encode("a").ids
    assert (judge.vocab.token_bos(), judge.vocab.token_eos()) == (0, 1)
    assert judge.model.get_default_chat_template() == template
    call("convert", "out.gguf", "back")
    again = Tokenizer.from_file(str(tmp_path / "back/tokenizer.json"))
    assert [again.encode(line).ids for line in lines[:50]] == [
        tokenizer.encode(line).ids for line in lines[:50]
    ]


@pytest.mark.parametrize("source", ["tokenizer.json", "tokenizer.model"])
def test_a_sentencepiece_tokenizer_gives_the_same_ids(tmp_path, call, wikitext, source):
    lines = lines_of(wikitext, 2000)
    (tmp_path / "text.txt").write_text("\n".join(lines[:1000]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=1000,
        model_type="bpe", byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    directory = write_checkpoint(tmp_path / "dense", tiny_config(vocab_size=1000, bos_token_id=1))
    (directory / "tokenizer.json").unlink()
    (tmp_path / "sp.model").rename(directory / "tokenizer.model")
    tokenizer = load_tokenizer(directory)
    if source == "tokenizer.json":
        (directory / "tokenizer.model").unlink()
        tokenizer.save(str(directory / "tokenizer.json"))
    call("convert", "dense", "out.gguf")
    judge = Judge(tmp_path / "out.gguf")
    for line in lines:
        assert judge.ids(line) == tokenizer.encode(line, add_special_tokens=False).ids, line
    assert judge.ids("a", special=True) == tokenizer.encode("a").ids


def test_smollm2_and_what_is_left_of_it(smollm2, wikitext, call, tmp_path):
    """Logits, 64 greedy tokens and the ids of 2,000 lines, of the real model and a pruned one."""
    text, lines = (wikitext / "wiki.valid.raw").resolve(), lines_of(wikitext, 2000)
    words = ["--samples", 4, "--sequence-length", 128, "--gradients", 0, "--work", "w"]
    call("calibrate", smollm2, "--text", text, *words, "-o", "stats.jsonl")
    how = ["--sparsity", 0.2, "--method", "wanda-sp", "--allocation", "global",
           "--multiple-of", 512, "--min-channels", 512]  # few shapes to compile  # fmt: skip
    call("score", "stats.jsonl", *how, "-o", "kept.jsonl")
    call("export", "pruned", "kept.jsonl")
    tokenizer = load_tokenizer(smollm2)
    prompt = np.array(tokenizer.encode("The castle was built in the 12th century, and").ids)
    for directory, architecture in ((smollm2, "llama"), (tmp_path / "pruned", "deci")):
        call("convert", directory, "real.gguf", "--type", "f32", "--overwrite")
        judge = Judge(tmp_path / "real.gguf")
        assert judge.model.meta_val_str("general.architecture") == architecture
        difference, size = worst(directory, judge, prompt)
        assert difference < 2e-4 * size
        ids = judge.continued(prompt, 64)
        ours = logits(open_model(str(directory)), ids[None, :-1])[0].argmax(1)
        assert (ours[len(prompt) - 1 :] == ids[len(prompt) :]).all()
    for line in lines:
        assert judge.ids(line) == tokenizer.encode(line, add_special_tokens=False).ids, line


def test_what_cannot_be_written_is_one_line_and_writes_nothing(tmp_path, run):
    def refused(*words, why):
        line = error_of(run("convert", *words, ok=False))
        assert why in line
        assert not list(tmp_path.glob("*.gguf"))
        assert not list(tmp_path.glob(".*"))

    directory = build(tmp_path, {})
    assert "OUT ends in .gguf" in error_of(run("convert", "dense", "out", ok=False))
    done = run("convert", "dense", "a.gguf", "--dtype", "float32", ok=False)
    assert "--dtype is for a checkpoint only" in done.stderr
    document = json.loads((directory / "tokenizer.json").read_text())

    def changed(**changes):
        (directory / "tokenizer.json").write_text(json.dumps(document | changes))

    changed(pre_tokenizer={"type": "Whitespace"})
    refused("dense", "a.gguf", why="splits text in a way that has no name here (known: gpt-2,")
    changed(normalizer={"type": "Lowercase"})
    refused("dense", "a.gguf", why="splits text in a way that has no name here")
    changed(model=document["model"] | {"ignore_merges": True})
    refused("dense", "a.gguf", why="splits text in a way that has no name here")
    changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
    refused("dense", "a.gguf", why="is a tokenizer of type WordLevel")
    changed(model=document["model"] | {"vocab": document["model"]["vocab"] | {"zz": 300}})
    refused("dense", "a.gguf", why="outside the vocabulary of 260")
    changed()
    (directory / "tokenizer.json").rename(tmp_path / "aside")
    refused("dense", "a.gguf", why="tokenizer.json: no such file; copy the tokenizer of")
    (tmp_path / "aside").rename(directory / "tokenizer.json")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, directory / "model.safetensors")
    refused("dense", "a.gguf", why="blk.1.ffn_up.weight: has a value too large for F16; give")
    refused("dense", "a.gguf", "--type", "q8_0", why="too large for Q8_0")
    run("convert", "dense", "a.gguf", "--type", "bf16")
    assert "a.gguf: exists; give --overwrite" in error_of(
        run("convert", "dense", "a.gguf", ok=False)
    )


def test_a_killed_run_leaves_no_file(tmp_path, start):
    build(tmp_path, {})
    first = "import os, signal, prunetool.checkpoint.gguf_writer as w\n" + (
        "made = w._stored\n"
        "def stored(array, tensor):\n"
        "    if tensor.name.startswith('blk.2'): " + DIE + "\n"
        "    return made(array, tensor)\n"
        "w._stored = stored"
    )
    for size in ("5GB", "100KB"):
        words = ["convert", "dense", "a.gguf", "--max-shard-size", size, "--overwrite"]
        before = set(tmp_path.glob("*.gguf"))
        assert start(words, first=first).wait() == -signal.SIGKILL
        assert set(tmp_path.glob("*.gguf")) == before
        assert start(words).wait() == 0
        assert not list(tmp_path.glob(".*")), "nothing is left of the killed one"
    assert len(list(tmp_path.glob("a-0000?-of-*.gguf"))) > 2


def test_special_tokens_out_of_range_are_left_out(tmp_path, call):
    directory = build(tmp_path, {"pad_token_id": -1, "eos_token_id": 99999, "bos_token_id": True})
    half = {"chat_template": "a\ud800b", "bos_token": "<none>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(half))
    call("convert", "dense", "a.gguf")
    judge = Judge(tmp_path / "a.gguf")
    assert judge.model.get_default_chat_template() == "a?b"
    for key in ("padding", "eos", "bos"):
        assert f"tokenizer.ggml.{key}_token_id" not in gguf.GGUFReader(tmp_path / "a.gguf").fields


def test_a_template_of_two_tokens_before_a_text_is_refused(tmp_path, run):
    directory = build(tmp_path, {})
    document = json.loads((directory / "tokenizer.json").read_text())
    document["post_processor"] = json.loads(
        processors.TemplateProcessing(
            single="<eos> <bos> $A", special_tokens=[("<eos>", 259), ("<bos>", 258)]
        ).__getstate__()
    )
    (directory / "tokenizer.json").write_text(json.dumps(document))
    assert "puts 2 tokens before a text" in error_of(run("convert", "dense", "a.gguf", ok=False))


def test_merges_in_another_order_than_sentencepieces_are_refused():
    letters = ["<unk>", *"abcd", "bc", "abc", "bcd", "ab"]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>",
             "vocab": {text: i for i, text in enumerate(letters)}}  # fmt: skip
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    ends = Ends(None, None, None, None, adds_bos=False, adds_eos=False)

    def fields(*merges):
        document = {"model": model | {"merges": [m.split() for m in merges]}, "normalizer": spaces}
        return vocabulary_fields("t", document, len(letters), ends, {})

    good = ["b c", "bc d", "a bc", "ab c", "a b"]
    assert fields(*good)["tokenizer.ggml.scores"][5] == 0
    with pytest.raises(ConfigError, match="merges that are not those of SentencePiece"):
        fields("b c", "ab c", "bc d", "a bc", "a b")
    with pytest.raises(ConfigError, match="merges that are not those of SentencePiece"):
        fields(*good[:-1])

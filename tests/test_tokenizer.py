import base64
import io
import json
import os

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer

import prunetool.tokenizer
from prunetool.errors import CorpusError
from prunetool.model import open_model
from tests.conftest import byte_tokenizer, error_of, tiny_config


def tokenize(text, directory):
    return np.concatenate(list(prunetool.tokenizer.tokenize([text], directory)))


def test_a_tokenizer_that_is_none(tmp_path):
    with pytest.raises(CorpusError, match=r"tokenizer.json: no such file; give token ids"):
        tokenize("text", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="is not a tokenizer"):
        tokenize("text", tmp_path)


def save_tokenizer(directory, tokenizer=None, **changes):
    """Write tokenizer.json; ``changes`` are of its JSON, ``model`` updates that part."""
    document = json.loads((tokenizer or byte_tokenizer()).to_str())
    document["model"] |= changes.pop("model", {})
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(document | changes))
    return directory


def judge(directory, tokenizer_class="PreTrainedTokenizerFast", **config):
    """The tokenizer as transformers loads it from a checkpoint directory."""
    config = {"tokenizer_class": tokenizer_class, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps(tiny_config()))
    return AutoTokenizer.from_pretrained(directory)


def test_truncation_padding_and_dropout_in_the_file_change_nothing(tmp_path):
    tokenizer = byte_tokenizer()
    text = "ab" * 300
    expected = tokenizer.encode(text).ids
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=1000)
    save_tokenizer(tmp_path / "cut", tokenizer)
    assert tokenize(text, tmp_path / "cut").tolist() == expected
    assert judge(tmp_path / "cut")(text, add_special_tokens=False).input_ids == expected

    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    save_tokenizer(tmp_path / "random", merging, model={"dropout": 0.5})
    assert tokenize(text, tmp_path / "random").tolist() == [2] * 300


def test_padding_to_more_than_all_memory_is_never_done(tmp_path):
    padding = {
        "strategy": {"Fixed": 1 << 40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<bos>",
    }
    save_tokenizer(tmp_path, padding=padding)
    assert tokenize("ab", tmp_path).size == 2


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def chain(*rules):
    return {"type": "Sequence", "normalizers": list(rules)}


def test_rules_that_multiply_the_text_are_refused_before_they_run(tmp_path):
    steps = [replace("a", "b" * 10), replace("b", "a" * 10)] * 20
    for part in (
        {"normalizer": chain(*steps)},
        {"normalizer": chain(chain(chain(*steps)))},
        {"normalizer": chain(*(replace("x*", "xx", "Regex") for _ in range(8)))},
        {"normalizer": chain(*({"type": "Prepend", "prepend": "ab"} for _ in range(8)))},
        {"normalizer": chain(*[{"type": "NFKD"}, replace("ا", "ﷺ")] * 3)},
        {"normalizer": chain(*[{"type": "ByteLevel"}] * 40)},
        {"normalizer": chain(*[{k: v for k, v in step.items() if k != "type"} for step in steps])},
        {"decoder": {"type": "Sequence", "decoders": steps}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
                ]
                * 40,
            }
        },
    ):
        save_tokenizer(tmp_path, **part)
        with pytest.raises(CorpusError, match=r"turn one character into \S+; at most 100 are"):
            prunetool.tokenizer.load_tokenizer(tmp_path)


def test_growth_is_what_the_rules_can_make_of_one_character():
    def growth(*rules):
        return prunetool.tokenizer._growth(prunetool.tokenizer._rules([chain(*rules)]))

    assert growth() == 1
    assert growth(replace(" ", "▁")) == 1
    assert growth(replace("ab", "cdefgh")) == 3
    assert growth(replace("a", "bb"), replace("b", "ccc")) == 6
    assert growth(replace("b", "ccc"), replace("a", "bb")) == 3  # the second's b is never replaced
    assert growth(replace("a", "bb"), replace("c", "ddd")) == 3
    assert growth(replace("x*", "ab", "Regex")) == 3
    assert growth({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")) == 2
    assert growth({"type": "NFKC"}, {"type": "NFKD"}, {"type": "Lowercase"}) == 18


def test_the_usual_tokenizers_pass(tmp_path, request):
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of text", "and some more text"] * 20),
        model_writer=trained,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    proto = trained.getvalue()
    start = proto.index(b"nmt_nfkc") + len(b"nmt_nfkc") + 1  # field 2 of the normalizer: bytes
    size, shift = 0, 0
    while True:
        byte, start = proto[start], start + 1
        size, shift = size | (byte & 127) << shift, shift + 7
        if byte < 128:
            break
    table = base64.b64encode(proto[start : start + size]).decode()
    precompiled = {"type": "Precompiled", "precompiled_charsmap": table}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    quotes = [replace("``", '"'), replace("''", '"')]
    two_spaces = replace(" {2,}", " ", "Regex")
    for normalizer, pre_tokenizer in (
        (chain({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")), None),  # Llama 2
        (None, byte_level),  # Llama 3
        ({"type": "NFC"}, byte_level),  # Qwen
        (chain(precompiled, two_spaces), metaspace),  # T5
        (
            chain(
                *quotes,
                {"type": "NFKD"},
                {"type": "StripAccents"},
                {"type": "Lowercase"},
                precompiled,
                two_spaces,
            ),
            metaspace,
        ),  # ALBERT
        (
            chain({"type": "NFC"}, replace(r"\s+", " ", "Regex"), {"type": "Lowercase"}),
            byte_level,
        ),  # CLIP
    ):
        save_tokenizer(tmp_path, normalizer=normalizer, pre_tokenizer=pre_tokenizer)
        prunetool.tokenizer.load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_one_line(tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(CorpusError, match="is not a tokenizer"):
        prunetool.tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="is not a tokenizer"):
        prunetool.tokenizer.load_tokenizer(tmp_path)
    for table in (b"", b"\xff\xff\xff\xff", b"\x08\0\0\0a"):
        table = base64.b64encode(table).decode()
        save_tokenizer(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": table})
        with pytest.raises(CorpusError, match="precompiled_charsmap is cut or damaged"):
            prunetool.tokenizer.load_tokenizer(tmp_path)
    model = {"merges": [["a", "b"]], "continuing_subword_prefix": "####"}
    save_tokenizer(tmp_path, model=model)  # the library panics
    with pytest.raises(CorpusError, match=r"is not a tokenizer .*out of range"):
        prunetool.tokenizer.load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, pre_tokenizer={"type": "FixedLength", "length": 0})  # on a text
    with pytest.raises(CorpusError, match=r"cannot tokenise the text .*must be non-zero"):
        tokenize("ab", tmp_path)
    assert capfd.readouterr().err == ""


def test_a_tokenizer_json_that_is_not_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CorpusError, match="is not a regular file"):
        prunetool.tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorpusError, match="is 1,048,576 MiB, but at most 128 are read"):
        prunetool.tokenizer.load_tokenizer(tmp_path)


BOS, EOS = ("<bos>", 256), ("<eos>", 257)


def template(single):
    return processors.TemplateProcessing(single=single, special_tokens=[BOS, EOS])


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize(
    ("processor", "bos"),
    [
        (None, None),
        (processors.ByteLevel(), None),
        (template("<bos> $A"), 256),
        (template("<bos> $A <eos>"), 256),
        (template("$A <eos>"), None),
        (processors.Sequence([processors.ByteLevel(), template("<bos> $A")]), 256),
        (processors.RobertaProcessing(EOS, BOS), 256),
    ],
)
def test_auto_begins_as_the_tokenizer_does_in_transformers(
    tmp_path, processor, bos, tokenizer_class, add_bos_token
):
    tokenizer = byte_tokenizer()
    if processor:
        tokenizer.post_processor = processor
    save_tokenizer(tmp_path, tokenizer)
    more = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    theirs = judge(tmp_path, tokenizer_class, bos_token="<bos>", eos_token="<eos>", **more)
    ids = theirs("ab").input_ids
    assert (ids[0] == 256) == (bos == 256)
    assert prunetool.tokenizer.bos_id(tmp_path, 260, "auto") == bos
    assert prunetool.tokenizer.bos_id(tmp_path, 260, "never") is None
    assert prunetool.tokenizer.bos_id(tmp_path, 260, "always") == 256


def find(directory, how="always", **changes):
    return prunetool.tokenizer.bos_id(directory, tiny_config(**changes)["vocab_size"], how)


def write_configs(directory, bos_token, bos_token_id):
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos_token}))
    (directory / "config.json").write_text(json.dumps({"bos_token_id": bos_token_id}))


def test_token_files_get_a_bos_only_if_it_is_asked_for(tmp_path, checkpoint):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = template("<bos> $A")
    model = open_model(str(save_tokenizer(checkpoint(), tokenizer)))
    tokens = tmp_path / "ids.npy"
    assert prunetool.tokenizer.bos_id(model.directory, model.config.vocab_size, "auto") == 256
    assert (
        prunetool.tokenizer.bos_id(model.directory, model.config.vocab_size, "auto", tokens) is None
    )
    assert (
        prunetool.tokenizer.bos_id(model.directory, model.config.vocab_size, "always", tokens)
        == 256
    )


def test_smollm2_begins_without_a_bos(smollm2):
    assert prunetool.tokenizer.bos_id(smollm2, 49152, "auto") is None
    assert prunetool.tokenizer.bos_id(smollm2, 49152, "always") == 1
    theirs = AutoTokenizer.from_pretrained(smollm2)
    text = "A text of some words,  and 2 spaces.\n"
    assert tokenize(text, smollm2).tolist() == theirs(text).input_ids


def test_a_llama_2_tokenizer_gives_the_ids_and_the_bos_that_it_does_in_transformers(tmp_path):
    letters = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc"]
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ab", "▁ab"])}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [("a", "b"), ("▁", "ab")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    save_tokenizer(tmp_path, tokenizer)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    theirs = judge(tmp_path, "LlamaTokenizer", add_bos_token=False, **special)
    assert type(theirs).__name__ == "LlamaTokenizer"
    text = "ab c  abcé\nab " * 9
    ids = tokenize(text, tmp_path).tolist()
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert [1, *ids] == theirs(text).input_ids
    assert find(tmp_path, "auto", vocab_size=len(vocabulary)) == 1


def test_always_takes_the_template_then_tokenizer_config_then_config(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = template("<eos> $A")
    save_tokenizer(tmp_path, tokenizer)
    write_configs(tmp_path, "<bos>", 5)
    assert find(tmp_path) == 257
    save_tokenizer(tmp_path)
    assert find(tmp_path) == 256
    write_configs(tmp_path, {"content": "<eos>", "special": True}, 5)
    assert find(tmp_path) == 257
    for other in (None, "not in the vocabulary", 3):
        write_configs(tmp_path, other, 5)
        assert find(tmp_path) == 5
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert find(tmp_path) == 5
    for nothing in (None, True, [5], "5"):
        write_configs(tmp_path, None, nothing)
        with pytest.raises(CorpusError, match=r"names no BOS token .*; give --bos never"):
            find(tmp_path)
    for outside in (260, -1):
        write_configs(tmp_path, None, outside)
        with pytest.raises(
            CorpusError, match=f"has BOS token {outside}, outside the vocabulary of 260"
        ):
            find(tmp_path)


def test_a_template_with_two_tokens_before_the_text_leaves_the_choice_to_the_user(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = template("<eos> <bos> $A")
    save_tokenizer(tmp_path, tokenizer)
    write_configs(tmp_path, "<bos>", None)
    with pytest.raises(CorpusError, match="puts 2 tokens before a text; give --bos"):
        find(tmp_path, "auto")
    assert find(tmp_path) == 256


def test_evaluate_and_calibrate_say_which_bos_they_used(checkpoint, text, run, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = template("<bos> $A")
    model = save_tokenizer(checkpoint(), tokenizer)
    common = ["--text", text, "--samples", 4, "--sequence-length", 32]
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids[: 4 * 31]
    np.save(
        tmp_path / "a.npy", np.pad(np.reshape(ids, (4, 31)), ((0, 0), (1, 0)), constant_values=256)
    )
    results = {
        bos: json.loads(run("evaluate", model, *common, "--bos", bos).stdout)
        for bos in ("auto", "always", "never")
    }
    assert results["auto"] == results["always"]
    assert [results[bos]["bos"] for bos in ("auto", "never")] == [256, None]
    given = run("evaluate", model, "--tokens", tmp_path / "a.npy", "--sequence-length", 32).stdout
    assert results["auto"] | {"bos": None, "tokens_file": True} == json.loads(given)
    refused = run(
        "evaluate", model, "--tokens", tmp_path / "a.npy", "--sequence-length", 32,
        "--bos", "always", ok=False,
    )  # fmt: skip
    assert "holds whole sequences" in error_of(refused)

    for bos, used in (("auto", 256), ("never", None)):
        stats = run("calibrate", model, *common, "--bos", bos, "--overwrite").stdout
        assert json.loads(stats.splitlines()[0])["history"][-1]["options"]["bos"] == used

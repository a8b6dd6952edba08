"""tokenizer.model alone: SentencePiece's own ids, and LLaMA's BOS."""

import io
import json
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from prunetool import pieces, tokenizer
from prunetool.checkpoint.sentencepiece_model import read_sentencepiece
from prunetool.errors import ConfigError, CorpusError, PrunetoolError
from prunetool.model import open_model
from tests.conftest import byte_tokenizer, tiny_config

WORDS = ["some", "words", "of", "the", "text", "and", "ünïcode", "number", "12", "345", "other"]


@cache
def trained(**options):
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, 8)) for _ in range(300)]
    model = io.BytesIO()
    sizes = {"vocab_size": 330 if options.get("byte_fallback") else 60, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=9, **{**sizes, **options}
    )
    return model.getvalue(), "\n".join(lines)


LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "vocab_size": 340,
}


def ids_of(text, directory):
    return np.concatenate(list(tokenizer.tokenize([text], directory))).tolist()


def directory_of(path, model, **config):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps(tiny_config()))
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    ("rule", "remove"),
    [("identity", False), ("identity", True), ("nmt_nfkc", True), ("nfkc_cf", False)],
)
def test_ids_are_sentencepieces(tmp_path, kind, byte_fallback, prefix, rule, remove):
    model, text = trained(
        model_type=kind,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        normalization_rule_name=rule,
        remove_extra_whitespaces=remove,
    )
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    directory_of(tmp_path, model)
    for given_text in (
        text[:2000], text[:500].replace("\n", " "), "  two  spaces  ", "unseen wörds, 123 ﬁ Ⅻ",
        "漢字 🙂 a", "a", "", " ", "\t tab\u3000wide", "e\u0301 n\u0303 \u00a0x", "▁a ▁",
    ):  # fmt: skip
        assert ids_of(given_text, tmp_path) == judge.encode(given_text), given_text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_made_in_pieces_are_sentencepieces(tmp_path, monkeypatch, kind):
    model, text = trained(**{**LLAMA, "model_type": kind})
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    directory_of(tmp_path, model)
    text = text[:5000]
    for size in (37, 100, 1000):
        monkeypatch.setattr(pieces, "PIECE", size)
        monkeypatch.setattr(pieces, "OVERLAP", 30)
        assert ids_of(text, tmp_path) == judge.encode(text)


@pytest.mark.parametrize(
    ("config", "bos"),
    [
        ({}, 1),
        ({"add_bos_token": True}, 1),
        ({"add_bos_token": False}, None),
        ({"bos_token": "</s>"}, 2),
        ({"bos_token": {"content": "</s>"}, "add_bos_token": True}, 2),
        ({"bos_token": ""}, 1),
    ],
)
def test_bos_is_added_unless_the_config_denies_it(tmp_path, config, bos):
    directory = directory_of(tmp_path, trained(**LLAMA)[0], **config)
    assert tokenizer.bos_id(directory, 340, "auto") == bos
    assert tokenizer.bos_id(directory, 340, "never") is None
    assert ids_of("a<s>", directory)[-1] == 1  # a control piece in a text is one


def test_a_model_without_a_bos_adds_none(tmp_path):
    directory = directory_of(tmp_path, trained(**LLAMA, bos_id=-1)[0])
    assert tokenizer.bos_id(directory, 340, "auto") is None


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path):
    directory = directory_of(tmp_path, b"damaged")
    with pytest.raises(ConfigError, match=r"tokenizer.model: is not a SentencePiece model"):
        ids_of("ab", directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    assert len(ids_of("ab", directory)) == 2
    (directory / "tokenizer.model").unlink()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CorpusError, match=r"tokenizer.json: no such file; give token ids"):
        ids_of("ab", directory)


def test_a_checkpoint_with_tokenizer_model_alone_goes_through_all_steps(tmp_path, checkpoint, call):
    dense = checkpoint(vocab_size=340)
    (dense / "tokenizer.json").unlink()
    without = open_model(str(dense)).identity()
    model, text = trained(**LLAMA)
    (dense / "tokenizer.model").write_bytes(model)
    assert open_model(str(dense)).identity() != without
    (tmp_path / "a.txt").write_text(text)
    corpus = ["--text", "a.txt", "--samples", 4, "--sequence-length", 32]
    assert json.loads(call("evaluate", dense, *corpus))["bos"] == 1
    (tmp_path / "stats").write_text(call("calibrate", dense, *corpus))
    (tmp_path / "kept").write_text(call("score", "stats", "--sparsity", 0.3))
    call("export", "out", "kept")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model
    assert json.loads(call("evaluate", "--allow-calibrated", "out", *corpus))["bos"] == 1
    (dense / "tokenizer.model").write_bytes(model[:-1])
    with pytest.raises(PrunetoolError, match="tokenizer"):
        call("score", "stats", "--sparsity", 0.3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "word"}, "is of model type word; supported: BPE and unigram"),
        ({"model_type": "char"}, "is of model type char; supported: BPE and unigram"),
        ({"treat_whitespace_as_suffix": True}, "does not write a space as the beginning"),
    ],
)
def test_models_of_other_kinds_are_refused(tmp_path, options, says):
    directory = directory_of(tmp_path, trained(**options)[0])
    with pytest.raises(ConfigError, match=rf"tokenizer.model: {says}"):
        ids_of("ab", directory)


def field(number, value):
    return bytes([number << 3 | 2, len(value)]) + value


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (b"", "it has no pieces"),
        (b"\x0a", "it is cut off"),
        (b"\x0a\x05ab", "it is cut off"),
        (b"\xff" * 12, "no number at byte 0"),
        (b"\x0b", "no field at byte 1"),
        (field(1, field(1, b"\xff")), "can't decode byte"),
        (field(1, b"\x08\x01"), "a field has an invalid value"),
        (field(1, field(1, b"a")) * 2, "a piece appears twice"),
        (field(1, field(1, b"a") + b"\x15\0\0\xc0\x7f"), "piece 0 has the score nan"),
        (field(1, field(1, b"a")) + field(2, field(3, b"")), "its settings are invalid"),
        (b"\x08\x01", "a field has an invalid value"),
    ],
)
def test_a_damaged_model_is_one_line(tmp_path, model, says):
    directory = directory_of(tmp_path, model)
    with pytest.raises(ConfigError, match=f"is not a SentencePiece model .*{says}"):
        read_sentencepiece(directory / "tokenizer.model")


@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_a_flipped_or_cut_model_gives_a_refusal_or_ids(tmp_path_factory, at, byte, cut):
    model = bytearray(trained(model_type="unigram")[0])
    at %= 2000 if byte % 2 else len(model)
    model[at] = byte
    directory = directory_of(tmp_path_factory.mktemp("model"), model[:at] if cut else model)
    with suppress(PrunetoolError):  # nothing else, and one line by its making
        assert ids_of("some text", directory)

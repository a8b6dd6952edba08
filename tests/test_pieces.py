"""Ids made in pieces are those of the whole text, whatever the tokenizer and the text."""

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from prunetool import pieces
from prunetool.checkpoint.gguf_tokenizer import LLAMA3_SPLIT
from prunetool.tokenizer import load_tokenizer
from tests.conftest import byte_tokenizer

SPACE = "\u2581"
LETTERS = "abAé\u0301漢1 \n"  # \u0301 makes é of the e before it
MERGES = [("a", "b"), ("ab", "a"), ("b", "b"), ("1", "1"), ("a", "a"), ("ab", "ab"), ("bb", "a")]
FLAGS = [
    {},
    {"lstrip": True},
    {"rstrip": True},
    {"single_word": True},
    {"normalized": True},
    {"lstrip": True, "rstrip": True, "normalized": True},
]


def merging(space=" ", **options):
    """BPE over a few letters and bytes for the rest."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + [*"abAe1\n", space]
    merges = [*MERGES, (space, "a"), (space, space), (space + "a", "b"), ("\n", "\n")]
    texts = dict.fromkeys([*letters, *("".join(merge) for merge in merges)])
    vocabulary = {text: number for number, text in enumerate(texts)}
    return Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, **options))


def byte_level(split=None, **options):
    """Byte-level BPE, by GPT-2's splitting or another."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*MERGES, ("Ġ", "a"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("Ã", "©")]
    texts = [*alphabet, *("".join(merge) for merge in merges)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    before = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, plain])
    return tokenizer


def llama_2():
    tokenizer = merging(SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    return tokenizer


def one_word(scheme):
    tokenizer = merging(SPACE, fuse_unk=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    return tokenizer


def unigram(split):
    """Scores are sums of powers of two: no rounding, so that of equal paths one is always taken."""
    texts = ["<unk>", *"abAé1\n", SPACE, "ab", "aba", "bb", f"{SPACE}a", f"{SPACE}ab", "11"]
    scores = [0.0, *(-4.0 - number / 8 for number in range(len(texts) - 1))]
    tokenizer = Tokenizer(models.Unigram(list(zip(texts, scores, strict=True)), 0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always", split=split)
    return tokenizer


def word_piece():
    texts = ["[UNK]", *"abA1", "##a", "##b", "##1", "ab", "##ab"]
    tokenizer = Tokenizer(
        models.WordPiece(
            {text: number for number, text in enumerate(texts)},
            unk_token="[UNK]",
            max_input_chars_per_word=6,
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def normalised(*rules):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(list(rules))
    return tokenizer


RIGHT_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\s+(?!\S)|\s?[^\s\p{N}]+|\s+"
TOKENIZERS = {
    "every byte": byte_tokenizer,
    "GPT-2": byte_level,
    "Llama 3": lambda: byte_level(LLAMA3_SPLIT, ignore_merges=True),
    "digits from the right": lambda: byte_level(RIGHT_DIGITS),
    "lines": lambda: byte_level(r"\n", ignore_merges=True),
    "Llama 2": llama_2,
    "Metaspace, first": lambda: one_word("first"),
    "Metaspace, always": lambda: one_word("always"),
    "Unigram": lambda: unigram(split=True),
    "Unigram of one word": lambda: unigram(split=False),
    "WordPiece": word_piece,
    "NFC": lambda: normalised(normalizers.NFC()),
    "spaces made one": lambda: normalised(
        normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()
    ),
    "accents away": lambda: normalised(normalizers.NFD(), normalizers.StripAccents()),
    "fixed length": lambda: fixed_length(),  # and nothing to join by
}


def fixed_length():
    """Words that nothing but the text's beginning decides."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.FixedLength(3), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


@contextmanager
def pieces_of(piece, overlap):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        patch.setattr(pieces, "OVERLAP", overlap)
        yield


def in_pieces(tokenizer, parts):
    def encode(texts):
        return tokenizer.encode_batch(texts, add_special_tokens=False)

    return [int(token) for ids in pieces.token_ids(parts, tokenizer, encode) for token in ids]


def whole(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


CHOICES = st.lists(
    st.one_of(
        st.sampled_from(["ab", "a", " ", "b b", "\n", "1", "aba bb", "é", "e\u0301", "漢", "x"]),
        st.sampled_from(["<x>", "<xx>", " <x> ", "a b a", "   ", "111", "\n\n", "Ab", SPACE]),
        st.text(LETTERS + "<x>" + SPACE, max_size=6),
    ),
    min_size=6,
    max_size=60,
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    words=CHOICES,
    added=st.lists(
        st.tuples(
            st.sampled_from(["<x>", "<xx>", "a b a", "Ab", "11", " "]), st.sampled_from(FLAGS)
        ),
        max_size=3,
    ),
    piece=st.integers(1, 40),
    overlap=st.sampled_from([6, 12, 24]),
    part=st.integers(1, 30),
)
@settings(max_examples=60)
def test_pieces_give_the_ids_of_the_whole_text(name, words, added, piece, overlap, part):
    text = "".join(words)
    tokenizer = TOKENIZERS[name]()
    for content, flags in added:
        tokenizer.add_tokens([AddedToken(content, **{"normalized": False, **flags})])
    parts = [text[at : at + part] for at in range(0, len(text), part)]
    with pieces_of(piece, overlap):
        assert in_pieces(tokenizer, parts) == whole(tokenizer, text)


def same(tokenizer, text, piece=24, overlap=24):
    with pieces_of(piece, overlap):
        return in_pieces(tokenizer, [text]) == whole(tokenizer, text)


@pytest.mark.parametrize("digits", range(90, 96))
def test_a_run_that_is_counted_from_its_end_is_not_cut(digits):
    tokenizer = byte_level(RIGHT_DIGITS)
    assert same(tokenizer, "ab a " + "1" * digits + " ab a")
    assert tokenizer.pre_tokenizer.pre_tokenize_str("1111")[0][0] == "1"


@pytest.mark.parametrize("spaces", [90, 95, 100])
def test_spaces_that_a_token_far_behind_takes_are_not_cut(spaces):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
    assert same(tokenizer, "ab a b" + " " * spaces + "<x> ab a")


@pytest.mark.parametrize("before", range(30))
def test_an_added_token_longer_than_a_piece_is_not_cut(before):
    tokenizer = byte_level()
    tokenizer.add_tokens(["<a b a b a b a b a b a b a b a b>"])
    text = "ab " * 10 + "b" * before + "<a b a b a b a b a b a b a b a b> ab a b"
    assert same(tokenizer, text, piece=1, overlap=9)


def test_words_that_begin_elsewhere_are_not_joined_though_their_tokens_are_the_same():
    text = "x y " * 30 + "abab" * 30
    for piece in (25, 26, 27):
        assert same(fixed_length(), text, piece)


def test_a_text_without_white_space_is_cut_where_the_pieces_agree(monkeypatch):
    asked = []

    def encode(texts):
        asked.extend(map(len, texts))
        return tokenizer.encode_batch(texts, add_special_tokens=False)

    tokenizer, text = llama_2(), "abbaba11" * 2000
    monkeypatch.setattr(pieces, "LONG", 500)
    with pieces_of(100, 40):
        ids = np.concatenate(list(pieces.token_ids([text], tokenizer, encode)))
    assert ids.tolist() == whole(tokenizer, text)
    assert max(asked) < 2000


def test_what_cannot_be_cut_is_one_piece_in_linear_time():
    asked = []

    def encode(texts):
        asked.extend(map(len, texts))
        return tokenizer.encode_batch(texts, add_special_tokens=False)

    tokenizer, text = llama_2(), "ab" * 5000
    with pieces_of(10, 10):
        ids = np.concatenate(list(pieces.token_ids([text], tokenizer, encode)))
    assert ids.tolist() == whole(tokenizer, text)
    assert max(asked) == len(text)
    assert sum(asked) < 8 * len(text)


def test_no_more_of_a_text_is_read_than_its_ids_need():
    def parts():
        for number in range(100):
            taken.append(number)
            yield "some words of text, and some more of them "

    tokenizer, taken = byte_tokenizer(), []
    with pieces_of(100, 50):
        ids = pieces.token_ids(parts(), tokenizer, tokenizer.encode_batch)
        assert next(ids).size > 50
        assert len(taken) < 20
        assert sum(map(len, ids)) > 4000
    assert len(taken) == 100


@pytest.mark.parametrize("piece", [300, 5000, pieces.PIECE])
def test_smollm2s_ids_of_wikitext(smollm2, wikitext, piece):
    tokenizer = load_tokenizer(smollm2)
    text = (wikitext / "wiki.test.raw").read_text()[:300_000]
    assert same(tokenizer, text, piece, min(piece, pieces.OVERLAP))

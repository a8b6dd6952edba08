import bz2
import gzip
import json
import lzma
import os
import random
import threading
import time
import tracemalloc

import numpy as np
import pytest
import zstandard
from safetensors.numpy import save_file

from prunetool import corpus, pieces, text
from prunetool.errors import CorpusError
from tests.conftest import byte_tokenizer


def read_text(paths, field):
    return "".join(text.read_text(paths, text.Column(field)))


def cut(ids, samples, length, **more):
    return corpus.sequences(np.asarray(ids), samples, length, 100, "here", **more)


def test_windows_are_consecutive_from_the_start():
    assert cut(range(10), 2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut(range(10), None, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut(range(10), 2, 3).dtype == np.int32


def test_too_little_text_says_how_much_is_missing():
    with pytest.raises(
        CorpusError, match="3 of 5 sequences of 3 tokens, 6 tokens short; give --samples 3, "
    ):
        cut(range(10), 5, 3)
    with pytest.raises(CorpusError, match=r"0 of 1 sequences of 30 tokens, .*; give more text or"):
        cut(range(10), None, 30)


def test_shuffled_windows_follow_the_seed():
    one, same, other = (cut(range(90), 6, 9, shuffle=seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    assert (np.diff(one, axis=1) == 1).all()


def test_whole_sequences_are_taken_as_they_are():
    assert cut([[1, 2], [3, 4]], 1, 2).tolist() == [[1, 2]]
    with pytest.raises(CorpusError, match="has sequences of 2 tokens; give --sequence-length 2"):
        cut([[1, 2], [3, 4]], 1, 3)


def test_ids_beyond_the_vocabulary():
    with pytest.raises(CorpusError, match="token ids up to 100, outside the vocabulary of 100"):
        cut([1, 100], 1, 2)


def test_text_files_are_joined_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    (tmp_path / "b.txt").write_bytes("zwei ü".encode())
    assert read_text([tmp_path / "a.txt", tmp_path / "b.txt"], "text") == "one\r\nzwei ü"


def test_fields_of_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": word}) for word in ("one", "two")) + "\n\n")
    assert read_text([path], "body") == "one\n\ntwo"
    with pytest.raises(CorpusError, match=r"a.jsonl: line 1: has no text field 'text'"):
        read_text([path], "text")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "holds no text"), (b" \n\t\n", "holds no text"), (b"\xff\xfe", "is not UTF-8")],
)
def test_text_that_is_none(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=says):
        read_text([tmp_path / "a.txt"], "text")


def test_a_text_file_that_is_not_there(tmp_path):
    with pytest.raises(CorpusError, match=r"a.txt: cannot be read \(No such file"):
        read_text([tmp_path / "a.txt"], "text")


def test_token_files(tmp_path):
    ids = np.arange(6, dtype=np.uint16).reshape(2, 3)
    np.save(tmp_path / "a.npy", ids)
    save_file({"ids": ids}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        assert corpus.read_tokens(tmp_path / name).tolist() == ids.tolist()
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "floats.npy", np.ones(3))
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-2])
    for name in ("pickle", "floats", "text", "cut", "absent"):
        with pytest.raises(CorpusError):
            corpus.read_tokens(tmp_path / f"{name}.npy")


JSON_LINES = '{"text": "one\u2028two\x85"}\n\n{"text": "drei"}\r\n'.encode()
FROM_JSON_LINES = "one\u2028two\x85\n\ndrei"


def read(path, content, field="text"):
    path.write_bytes(content)
    return read_text([path], field)


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.NDJSON", "c4-train.00000-of-01024.json", "a.txt", "a"]
)
def test_json_lines_are_known_by_their_content_and_end_at_newlines_alone(tmp_path, name):
    assert read(tmp_path / name, JSON_LINES) == FROM_JSON_LINES


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        zstandard.compress,
        lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:]),
        lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
        lambda data: bz2.compress(data[:9]) + bz2.compress(data[9:]),
        lambda data: lzma.compress(data[:9]) + lzma.compress(data[9:]),
    ],
)
@pytest.mark.parametrize("name", ["a.JSON.gz", "a.txt", "a.jsonl.zst"])
def test_compression_is_known_by_its_content_and_a_cut_file_is_refused(tmp_path, compress, name):
    data = compress(JSON_LINES)
    assert read(tmp_path / name, data) == FROM_JSON_LINES
    with pytest.raises(CorpusError, match=r"is damaged (gzip|bzip2|xz|Zstandard)"):
        read(tmp_path / name, data[:-6])


COMPRESSORS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "Zstandard": zstandard.compress,
}


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("more", [b"garbage", b"\n", b"\x1f\x8b", b"BZh9"])
def test_what_follows_compressed_data_is_refused_and_not_left_out(tmp_path, name, more):
    data = COMPRESSORS[name](JSON_LINES)
    says = rf"is damaged {name} \(other data follows at byte {len(data)}\)"
    with pytest.raises(CorpusError, match=says):
        read(tmp_path / "a.txt", data + more)


@pytest.mark.parametrize("name", ["gzip", "xz"])
def test_streams_may_be_padded_with_zeros(tmp_path, name):
    one, two = (COMPRESSORS[name](part) for part in (JSON_LINES[:9], JSON_LINES[9:]))
    assert read(tmp_path / "a.txt", one + bytes(8) + two + bytes(512)) == FROM_JSON_LINES


@pytest.mark.parametrize("name", ["bzip2", "Zstandard"])
def test_zeros_in_place_of_the_rest_are_damage(tmp_path, name):
    with pytest.raises(CorpusError, match=f"is damaged {name}"):
        read(tmp_path / "a.txt", COMPRESSORS[name](JSON_LINES) + bytes(512))


def test_a_frame_that_is_skipped_is_not_text(tmp_path):
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    data = skipped + zstandard.compress(JSON_LINES) + skipped
    assert read(tmp_path / "a.txt", data) == FROM_JSON_LINES
    with pytest.raises(CorpusError, match=r"is damaged Zstandard \(it ends too early\)"):
        read(tmp_path / "a.txt", data[:-1])


@pytest.mark.parametrize("name", COMPRESSORS)
def test_many_short_streams_take_no_longer_than_a_few_long_ones(tmp_path, name):
    parts = [random.randbytes(1500).hex() for _ in range(50)]
    streams = [COMPRESSORS[name](part.encode()) for part in parts]
    seconds = []
    for times in (20, 160):
        start = time.process_time()
        assert read(tmp_path / "a.txt", b"".join(streams) * times) == "".join(parts) * times
        seconds.append(time.process_time() - start)
    assert seconds[1] < 16 * seconds[0] + 0.2  # 8 times if linear, 64 if quadratic


def test_a_byte_order_mark_is_not_text_in_any_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone ")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + JSON_LINES)
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl")]
    assert read_text(paths, "text") == "one two" + FROM_JSON_LINES


def test_a_text_that_begins_with_a_brace_is_text(tmp_path):
    assert read(tmp_path / "a.txt", b"{not json}\nline") == "{not json}\nline"
    assert read(tmp_path / "a.txt", b"GGUF and PAR1") == "GGUF and PAR1"
    assert read(tmp_path / "a.txt", b'{"a":\n1}') == '{"a":\n1}'


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(JSON_LINES,))
    writer.start()
    assert read_text([tmp_path / "pipe"], "text") == FROM_JSON_LINES
    writer.join()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            '{"body": "x", "url": "y"}',
            r"has no text field 'text' \(its fields: body, url\); name it",
        ),
        ("{}", r"has no text field 'text' \(its fields: none\)"),
        ('{"text": null}', "has no text in field 'text': null"),
        ('{"text": "x"},', r"is not JSON \(Extra data.*; give JSON lines: one object per line"),
        ('["x"]', r'is JSON but not an object \(\["x"\]\)'),
        ("[" * 100_000, "is not JSON"),
        (r'{"text": "x \ud83d"}', r"has half of a surrogate pair \(\\ud83d\)"),
    ],
)
def test_a_line_that_gives_no_text_is_named_with_the_reason(tmp_path, line, says):
    with pytest.raises(CorpusError, match=f"a.jsonl: line 2: {says}"):
        read(tmp_path / "a.jsonl", f'{{"text": "x"}}\n{line}\n'.encode())


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    assert read(tmp_path / "a.jsonl", rb'{"text": "\ud83d\ude00"}') == "😀"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"text": "a"},\n{"text": "b"}]\n', r"is one JSON array, .* jq -c '\.\[\]' FILE"),
        ('["a", "b"]', "is one JSON array"),
        ('["a"]', r"is one JSON array, .* jq -c '\.\[\] \| \{text: \.\}' FILE"),
        ("[1, 2]", r'is one JSON array, not JSON lines; give JSON lines: \{"text": "…"\} in each'),
        ('[{"text": "a"}, "b"]', r'is one JSON array, not JSON lines; give JSON lines: \{"text"'),
        ("[]", r'is one JSON array, not JSON lines; give JSON lines: \{"text"'),
        ('{\n "text": "a"\n}\n', r"is JSON over several lines, .* jq -c \. FILE"),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', "is JSON over several lines"),
    ],
)
def test_a_json_document_is_refused_with_the_command_that_makes_lines_of_it(
    tmp_path, content, says
):
    for name in ("a.json", "a.JSON", "a.json.gz"):
        with pytest.raises(CorpusError, match=f"{name}: {says}"):
            read(tmp_path / name, content.encode())


@pytest.mark.parametrize("content", ['[{"text": "a"}]', '\n[\n {\n  "text": "a"\n },\n {}\n]\n'])
@pytest.mark.parametrize("name", ["a.txt", "a", "a.txt.gz"])
def test_an_array_of_objects_is_refused_whatever_its_name(tmp_path, name, content):
    data = gzip.compress(content.encode()) if name.endswith("gz") else content.encode()
    with pytest.raises(CorpusError, match=rf"{name}: is one JSON array, .* jq -c '\.\[\]' FILE"):
        read(tmp_path / name, data)


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}] and more', '[{"text": ', "[{in prose}]", '["a", "b"]', "[1]"]
)
def test_what_only_begins_as_an_array_of_objects_is_text(tmp_path, content):
    assert read(tmp_path / "a.txt", content.encode()) == content


def test_objects_with_commas_between_them_are_not_a_document(tmp_path):
    with pytest.raises(CorpusError, match=r"a.json: line 1: is not JSON"):
        read(tmp_path / "a.json", b'{"text": "a"},\n{"text": "b"},\n')


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PAR1\x15\x04\0\0PAR1", "is damaged Parquet .*download it again"),
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF, .*pdftotext"),
        ("text".encode("utf-16"), "UTF-16; convert it: iconv -f UTF-16"),
        ("text".encode("utf-32"), "UTF-32; convert it: iconv -f UTF-32"),
        ("text".encode("utf-16-le"), "has NUL bytes"),
        (b"text\0text", "has NUL bytes"),
        (b"PK\x03\x04\x14\0", "is a zip archive .*unpack it"),
        (b"\x93NUMPY\x01\0", "is a NumPy array, .*--tokens"),
        ((64).to_bytes(8, "little") + b'{"ids":{}}', "is a safetensors file, .*--tokens"),
        (b"GGUF\x03\0\0\0", "is a GGUF model"),
        (b"ARROW1\0\0", "is an Arrow file"),
        (b"\xff\xff\xff\xff\x10\x01\0\0", "is an Arrow file"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"SQLite format 3\0", "is an SQLite database"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive"),
        (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar  \0", mtime=0), "is a tar archive"),
        (b"{\\rtf1\\ansi text}", r"is rich text \(RTF\), not plain text; save it as plain text"),
        (b"%!PS-Adobe-3.0\n", "is PostScript, not text; .*ps2ascii"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a Git LFS pointer, not the file itself; fetch the file: git lfs pull",
        ),
        (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", r"is a web archive \(WARC\), not text"),
        (
            gzip.compress(b"WARC/1.1\r\n", mtime=0) + gzip.compress(b"x", mtime=0),
            r"is a web archive \(WARC\)",
        ),
        (b"Obj\x01\x04\x14avro.codec", "is an Avro file, not text; .*JSON lines"),
        (b"\x1f\x9d\x90te\xca", r"is compressed by compress \(.Z\); .* gzip -dc"),
        (
            lzma.compress(b"text", lzma.FORMAT_ALONE),
            r"is compressed by LZMA \(.lzma\); .* xz --format=lzma -dc",
        ),
        ("é".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_what_is_not_text_is_refused_by_what_it_is(tmp_path, content, says):
    with pytest.raises(CorpusError, match=f"a.txt: .*{says}"):
        read(tmp_path / "a.txt", content)


def test_data_that_is_not_text_and_named_as_brotli_is_so_called(tmp_path):
    with pytest.raises(CorpusError, match=r"a.jsonl.BR: is compressed by Brotli; .* brotli -dc"):
        read(tmp_path / "a.jsonl.BR", b"\x0b\x02\x80text\x03")
    assert read(tmp_path / "wiki.br", b"Demat d'an holl") == "Demat d'an holl"


def test_a_text_about_a_format_is_text(tmp_path):
    for about in ("WARC/1 is", "Obj 1", "{rtf}", "%! PS", "version https://git", "]"):
        assert read(tmp_path / "a.txt", about.encode()) == about


def test_a_directory_is_not_text(tmp_path):
    with pytest.raises(CorpusError, match=r"cannot be read .Is a directory"):
        read_text([tmp_path], "text")


def header(text):
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text.encode("latin-1")


@pytest.mark.parametrize(
    "content",
    [
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776,)}\n"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904,)}\n"),
        header(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({'9' * 30},)}}\n"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,)}\n"),
        header("{'descr': 'zz', 'fortran_order': False, 'shape': (1,)}\n"),
        header("(" * 5000), header("{'descr' '<i4'"), header("{'descr"), header(""),
        b"\x93NUMPY\x03\0\x02\0\0\0\xff\xfe", b"\x93NUMPY\x09\0", b"\x93NUMPY",
        b"PK\x03\x04", b"1 2 3", b"[1, 2, 3]", b"",
    ],
)  # fmt: skip
def test_a_damaged_token_file_is_one_line_that_says_what_to_give(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(CorpusError, match=r"cannot be read as token ids .*numpy.save\('ids.npy'"):
        corpus.read_tokens(tmp_path / "a.npy")


def test_a_shape_beyond_the_file_takes_no_memory(tmp_path):
    promised = header("{'descr': '<i4', 'fortran_order': False, 'shape': (100000000,)}\n")
    (tmp_path / "a.npy").write_bytes(promised)
    with pytest.raises(CorpusError, match="length is greater than file size"):
        corpus.read_tokens(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.array(3), r"is int64 of shape \(\)"),
        (np.zeros(0, int), r"is int64 of shape \(0,\)"),
        (np.zeros((5, 0), int), r"is int64 of shape \(5, 0\)"),
        (np.ones(3, bool), "is bool of shape"),
        (
            np.array([2**64 - 1, 1], np.uint64),
            f"token ids up to {2**64 - 1}, outside the vocabulary",
        ),
        (np.array([100, -3, 2]), "has the token id -3, outside the vocabulary of 100"),
    ],
)
def test_ids_that_are_none_are_refused_by_what_they_are(tmp_path, ids, says):
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(CorpusError, match=f"a.npy: .*{says}"):
        corpus.Text(tokens_path=tmp_path / "a.npy", length=2).load(tmp_path, 100, 1)


def test_token_files_of_other_kinds(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    save_file({"a": np.arange(3), "b": np.arange(3)}, tmp_path / "two.SAFETENSORS")
    for path, says in (
        (tmp_path / "a.npz", "neither .npy nor .safetensors"),
        (tmp_path / "two.SAFETENSORS", "2 tensors instead of one"),
        (tmp_path, "is not a regular file"),
    ):
        with pytest.raises(CorpusError, match=says):
            corpus.read_tokens(path)


def test_a_bos_begins_each_window_and_the_text_goes_on_without_gaps():
    assert cut(range(10), 3, 3, bos=99).tolist() == [[99, 0, 1], [99, 2, 3], [99, 4, 5]]
    assert cut(range(10), None, 3, bos=99).tolist()[-1] == [99, 8, 9]
    assert cut(range(3), None, 2, bos=0).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert cut(range(10), 3, 3, bos=99).dtype == np.int32
    with pytest.raises(CorpusError, match="gives 5 of 7 sequences of 3 tokens, 4 tokens short"):
        cut(range(10), 7, 3, bos=99)


def test_shuffled_windows_begin_anywhere_that_leaves_room():
    for more in ({"length": 9}, {"length": 10, "bos": 99}):
        starts = {cut(range(10), 1, shuffle=seed, **more)[0, -1] - 8 for seed in range(9)}
        assert starts == {0, 1}


def test_shuffled_windows_with_a_bos_are_those_of_one_token_fewer():
    with_bos = cut(range(90), 6, 9, shuffle=1, bos=99)
    assert (with_bos[:, 0] == 99).all()
    assert (with_bos[:, 1:] == cut(range(90), 6, 8, shuffle=1)).all()


def test_whole_sequences_take_no_bos():
    with pytest.raises(CorpusError, match="holds whole sequences, which a BOS would lengthen"):
        cut([[1, 2], [3, 4]], 1, 2, bos=99)


def shuffled(ids, samples, own, seed, part=10**9):
    ids = np.asarray(ids)
    parts = (ids[at : at + part] for at in range(0, len(ids), part))
    return corpus.sequences(parts, samples, own, 10**6, "here", shuffle=seed)


def test_shuffled_windows_do_not_depend_on_the_parts_that_ids_come_in():
    ids = np.random.default_rng(0).integers(0, 1000, 3000)
    expected = corpus.sequences(ids, 40, 7, 1000, "here", shuffle=3)
    for part in (1, 6, 7, 8, 100, 2999):
        assert (shuffled(ids, 40, 7, 3, part) == expected).all()


def test_shuffled_windows_are_spread_evenly_and_drawn_independently():
    starts = np.array([shuffled(range(103), 10, 4, seed)[:, 0] for seed in range(400)])
    counts = np.bincount(starts.ravel(), minlength=100)
    assert counts.size == 100  # every start that leaves room, and no other
    assert ((counts - 40) ** 2 / 40).sum() < 149  # chi-squared of 99 degrees: 1 in 1000 exceeds it
    pairs = np.bincount((starts[:, 0] // 10) * 10 + starts[:, 1] // 10, minlength=100)
    assert ((pairs - 4) ** 2 / 4).sum() < 149


def test_more_shuffled_windows_than_there_are_take_no_memory():
    with pytest.raises(CorpusError, match="gives 3 of 1000000000000 sequences"):
        shuffled(range(10), 10**12, 3, 0)


def test_a_file_is_read_only_as_far_as_its_text_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "HEAD", 1000)
    monkeypatch.setattr(text, "READ_BYTES", 1000)
    tail = {"a.txt": b"\xff\0", "a.jsonl": b"no JSON\n", "a.txt.gz": b"\xff"}
    for name, damage in tail.items():
        line = b'{"text": "a b"}\n' if "json" in name else b"some words "
        data = line * 1000 + damage
        (tmp_path / name).write_bytes(gzip.compress(data)[:-8] if "gz" in name else data)
        parts = text.read_text([tmp_path / name], text.Column())
        assert next(parts)
        with pytest.raises(CorpusError, match=r"is not (UTF-8|JSON) \("):
            list(parts)


def test_what_a_part_cuts_is_put_together_again(tmp_path, monkeypatch):
    content = "漢字 é 🙂\n" * 50 + '"\u2028'
    (tmp_path / "a.txt").write_text(content, newline="")
    lines = "".join(json.dumps({"text": line}) + "\n" for line in content.split("\n"))
    (tmp_path / "b.txt").write_text(lines)
    (tmp_path / "c.gz").write_bytes(gzip.compress(content.encode()))
    for size in (1, 2, 3, 7, 600):
        for name in ("HEAD", "READ_BYTES", "SLICE_BYTES"):
            monkeypatch.setattr(text, name, size)
        assert read_text([tmp_path / "a.txt"], "text") == content
        assert read_text([tmp_path / "b.txt"], "text") == content.replace("\n", "\n\n")
        assert read_text([tmp_path / "c.gz"], "text") == content


def test_where_utf_8_ends_is_said_in_bytes_of_the_file(tmp_path, monkeypatch):
    for size in (1, 10, 10**6):
        monkeypatch.setattr(text, "READ_BYTES", size)
        with pytest.raises(CorpusError, match=r"is not UTF-8 \(invalid start byte at byte 2,005\)"):
            read(tmp_path / "a.txt", "é".encode() * 1001 + b"\xef\xbb\xbf\xff")
        with pytest.raises(CorpusError, match=r"\(unexpected end of data at byte 2,002\)"):
            read(tmp_path / "a.txt", "é".encode() * 1001 + b"\xe6\xbc")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", '[{"text": "some words"},\n', r"is one JSON array, .* jq -c '\.\[\]' FILE"),
        ("a.json", '["some words",\n', r"is one JSON array, .* jq -c '\.\[\] \| \{text: \.\}'"),
        ("a.json", "[1,\n", r"is one JSON array, not JSON lines; give JSON lines"),
        ("a.json", '{\n"text": "some words",\n', r"is JSON over several lines, .* jq -c \. FILE"),
    ],
)
def test_a_long_json_document_is_known_by_its_beginning(tmp_path, monkeypatch, name, content, says):
    rest = content[content.startswith(("[", "{\n")) :] * 100
    for size in range(60, 90):
        monkeypatch.setattr(text, "HEAD", size)
        monkeypatch.setattr(text, "READ_BYTES", 1)
        with pytest.raises(CorpusError, match=f"{name}: {says}"):
            read(tmp_path / name, (content + rest).encode())


def test_a_long_text_that_only_begins_as_an_array_is_text(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "HEAD", 50)
    monkeypatch.setattr(text, "READ_BYTES", 1)
    for content in ("[{in prose}] and more " * 10, '[{"text": "a"}] and more ' * 10):
        assert read(tmp_path / "a.txt", content.encode()) == content


def test_a_first_line_longer_than_the_head_is_taken_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "HEAD", 50)
    monkeypatch.setattr(text, "READ_BYTES", 7)
    line = json.dumps({"text": "some words " * 100})
    assert read(tmp_path / "a.txt", f"\n{line}\n{line}".encode()) == "\n\n".join(
        ["some words " * 100] * 2
    )


@pytest.mark.parametrize("compress", [bytes, *COMPRESSORS.values()])
def test_memory_does_not_grow_with_the_file(tmp_path, compress):
    """Nor by how much little may become: many megabytes of one letter are a few bytes."""
    varied = random.Random(0).randbytes(30_000).hex().encode() * 50
    (tmp_path / "a.txt").write_bytes(compress(varied + b"a" * 60_000_000))
    tracemalloc.start()
    try:
        characters = sum(map(len, text.read_text([tmp_path / "a.txt"], text.Column())))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert characters == 63_000_000
    assert peak < 25e6


def test_memory_for_windows_does_not_grow_with_the_text(tmp_path, monkeypatch):
    for module, name, size in (
        (text, "HEAD", 4000),
        (text, "READ_BYTES", 4000),
        (pieces, "PIECE", 2000),
        (pieces, "OVERLAP", 200),
    ):
        monkeypatch.setattr(module, name, size)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    peaks = {}
    for lines in (2000, 8000):
        (tmp_path / "a.txt").write_bytes(b"some words of a text\n" * lines)
        for seed in (None, 0):
            tracemalloc.start()
            try:
                given = corpus.Text([tmp_path / "a.txt"], length=64)
                tokens, _ = given.load(tmp_path, 260, 4, seed)
                peaks[lines, seed] = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert tokens.shape == (4, 64)
    assert max(peaks.values()) < 1.5 * min(peaks.values()), peaks

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunetool import corpus
from prunetool.errors import CorpusError


def cut(ids, samples, length, **more):
    return corpus.sequences(np.asarray(ids), samples, length, 100, "here", **more)


def test_windows_are_consecutive_from_the_start():
    assert cut(range(10), 2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut(range(10), None, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut(range(10), 2, 3).dtype == np.int32


def test_too_little_text_says_how_much_is_missing():
    with pytest.raises(CorpusError, match="gives 3 of 5 sequences of 3 tokens, 6 tokens short"):
        cut(range(10), 5, 3)
    with pytest.raises(CorpusError, match="gives 0 of 1 sequences of 30 tokens"):
        cut(range(10), None, 30)


def test_shuffled_windows_follow_the_seed():
    one, same, other = (cut(range(90), 6, 9, shuffle=seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    assert (np.diff(one, axis=1) == 1).all()


def test_whole_sequences_are_taken_as_they_are():
    assert cut([[1, 2], [3, 4]], 1, 2).tolist() == [[1, 2]]
    with pytest.raises(CorpusError, match="has sequences of 2; give --sequence-length 2"):
        cut([[1, 2], [3, 4]], 1, 3)


def test_ids_beyond_the_vocabulary():
    with pytest.raises(CorpusError, match="token ids up to 100 for a vocabulary of 100"):
        cut([1, 100], 1, 2)


def test_text_files_are_joined_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    (tmp_path / "b.txt").write_bytes("zwei ü".encode())
    assert corpus.read_text([tmp_path / "a.txt", tmp_path / "b.txt"], "text") == "one\r\nzwei ü"


def test_fields_of_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": word}) for word in ("one", "two")) + "\n\n")
    assert corpus.read_text([path], "body") == "one\n\ntwo"
    with pytest.raises(CorpusError, match=r"a.jsonl: line 1: has no text field 'text'"):
        corpus.read_text([path], "text")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "holds no text"), (b" \n\t\n", "holds no text"), (b"\xff\xfe", "is not UTF-8")],
)
def test_text_that_is_none(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=says):
        corpus.read_text([tmp_path / "a.txt"], "text")


def test_a_text_file_that_is_not_there(tmp_path):
    with pytest.raises(CorpusError, match=r"a.txt: cannot be read \(No such file"):
        corpus.read_text([tmp_path / "a.txt"], "text")


def test_a_tokenizer_that_is_none(tmp_path):
    with pytest.raises(CorpusError, match=r"tokenizer.json: no such file; give token ids"):
        corpus.tokenize("text", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="is no tokenizer"):
        corpus.tokenize("text", tmp_path)


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

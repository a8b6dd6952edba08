"""Data sets by name, from a Hub on loopback, and Parquet files."""

import gzip
import json
from contextlib import suppress

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from prunetool import workdir
from prunetool.errors import CorpusError
from prunetool.text import Column, read_text
from tests import hub
from tests.conftest import error_of

WORDS = ["--samples", 2, "--sequence-length", 32, "--gradients", 0, "--work", "w"]


def table(texts, **columns):
    """A Parquet file of rows, in several groups."""
    sink = pyarrow.BufferOutputStream()
    made = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()), **columns})
    parquet.write_table(made, sink, row_group_size=300)
    return sink.getvalue().to_pybytes()


def lines(texts):
    return gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())


ROWS = [f"row {i} has some words, {'ab ' * (40 + i % 5)}.\n" for i in range(4000)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    made = hub.start()
    wiki = "wikitext-2-raw-v1"
    made.publish("Salesforce/wikitext", {
        f"{wiki}/train-00000-of-00002.parquet": table(ROWS[:3000]),
        f"{wiki}/train-00001-of-00002.parquet": table(ROWS[3000:]),
        f"{wiki}/test-00000-of-00001.parquet": table(ROWS[::-1]),
        "wikitext-103-raw-v1/train-00000-of-00001.parquet": table(["other"]),
        "README.md": b"",
    })  # fmt: skip
    made.publish("allenai/c4", {
        f"en/c4-{split}.{i:05d}-of-00002.json.gz": lines([f"{split} {i} " * 30])
        for split in ("train", "validation") for i in range(2)
    })  # fmt: skip
    made.publish("me/chat", {"data/train.jsonl": b'{"q": "abc"}\n' * 50, "x/y/train.jsonl": b""})
    hub.connect(made, tmp_path / "cache", monkeypatch)
    yield made
    made.shutdown()
    made.server_close()


def tokens(tmp_path):
    return workdir.TensorFile(tmp_path / "w", workdir.TOKENS_NAME)["tokens"]


def asked(server, name):
    return sum(name in path for path in server.asked)


def test_the_text_is_that_of_the_rows_joined_and_only_the_files_needed_come(
    checkpoint, call, tmp_path, server, monkeypatch
):
    (tmp_path / "joined.txt").write_text("\n\n".join(ROWS))
    call("calibrate", checkpoint(), "--text", "joined.txt", *WORDS[:-1], "v", "-o", "a")
    call("calibrate", "dense", "--dataset", "wikitext2", *WORDS, "-o", "b")
    same = workdir.TensorFile(tmp_path / "v", workdir.TOKENS_NAME)["tokens"]
    assert (tokens(tmp_path) == same).all()
    assert asked(server, "train-00000-of-00002.parquet")
    assert not asked(server, "train-00001-of-00002.parquet"), "the first one was enough"
    said = json.loads((tmp_path / "b").read_text().splitlines()[0])["history"][0]["options"]
    commit = server.repositories["Salesforce/wikitext"].branches["main"]
    assert (said["dataset"], said["split"]) == (f"wikitext2@{commit}", "train")
    words = ["--sparsity", ".3", "--allocation", "uniform", "--method", "wanda-sp"]
    call("score", "b", *words, "-o", "c")
    call("export", "out", "c")
    card = (tmp_path / "out/README.md").read_text()
    assert f"--dataset wikitext2@{commit} --split train" in card
    assert "--text TEXT" not in card
    found = json.loads(
        call("evaluate", "out", "--dataset", "wikitext2", *WORDS[:4], "--allow-calibrated")
    )
    assert (found["dataset"], found["split"]) == (f"wikitext2@{commit}", "test")
    # The commit is kept: new files on the branch change nothing.
    hub.point("http://127.0.0.1:9", monkeypatch)  # what is in the cache needs no Hub
    call("calibrate", "dense", "--dataset", f"wikitext2@{commit}", *WORDS[:-1], "z", "-o", "e")
    hub.point(server.address, monkeypatch)
    server.publish("Salesforce/wikitext", {"wikitext-2-raw-v1/train-0.parquet": table(["x"] * 99)})
    call("calibrate", "dense", "--dataset", f"wikitext2@{commit}", *WORDS[:-1], "u", "-o", "d")
    assert json.loads((tmp_path / "d").read_text().splitlines()[0])["history"][0]["options"] == said


def test_shuffling_uses_all_files_but_of_c4_one(checkpoint, call, tmp_path, server):
    call("calibrate", checkpoint(), "--dataset", "wikitext2", "--shuffle", 1, *WORDS, "-o", "a")
    assert asked(server, "train-00001-of-00002.parquet")
    call("calibrate", "dense", "--dataset", "c4", "--shuffle", 1, *WORDS[:-1], "v", "-o", "b")
    assert asked(server, "c4-train.00000")
    assert not asked(server, "c4-train.00001")
    call("evaluate", "dense", "--dataset", "c4", "--split", "validation", *WORDS[:4])
    assert asked(server, "c4-validation.00000")


def test_a_data_set_of_ones_own(checkpoint, call, tmp_path, server):
    words = ["--dataset", "me/chat:data", "--text-field", "q", *WORDS, "-o", "a"]
    call("calibrate", checkpoint(), *words)
    said = json.loads((tmp_path / "a").read_text().splitlines()[0])["history"][0]["options"]
    assert said["text_field"] == "q"
    (tmp_path / "joined.txt").write_text("\n\n".join(["abc"] * 50))
    call("calibrate", "dense", "--text", "joined.txt", *WORDS[:-1], "v", "-o", "b")
    same = workdir.TensorFile(tmp_path / "v", workdir.TOKENS_NAME)["tokens"]
    assert (tokens(tmp_path) == same).all()


def test_what_is_not_there_is_one_line(checkpoint, run, tmp_path, server, monkeypatch):
    def refused(*words):
        return error_of(run("calibrate", "dense", *words, *WORDS, ok=False))

    checkpoint()
    assert "--dataset pile: is neither wikitext2, c4, ptb, alpaca nor the id" in refused(
        "--dataset", "pile"
    )
    assert "me/none: no such data set on the Hub" in refused("--dataset", "me/none")
    line = refused("--dataset", "wikitext2", "--split", "dev")
    assert "split dev: has no Parquet or JSON-lines file of this split; name a --split" in line
    line = refused("--dataset", "me/chat")
    assert (
        "has files in several directories; name a --split and :CONFIG of these: data, x/y" in line
    )
    assert "no revision 'v9'" in refused("--dataset", "wikitext2@v9")
    assert "no text field 'text' (its fields: q)" in refused("--dataset", "me/chat:data")
    line = refused("--dataset", "wikitext2", "--text-field", "t")
    assert "has no column 't' (its columns: text)" in line
    assert "--split is for --dataset" in run("calibrate", "dense", "--text", "x", "--split", "test",
                                             ok=False).stderr  # fmt: skip
    both = run("calibrate", "dense", "--text", "x", "--dataset", "c4", ok=False).stderr
    assert "either --text or --tokens or --dataset" in both
    hub.point("http://127.0.0.1:9", monkeypatch)
    assert "no answer from http://127.0.0.1:9" in refused("--dataset", "alpaca")


def test_a_split_is_not_another_that_begins_with_its_name(checkpoint, call, run, server):
    server.publish("me/sft", {
        f"data/train_{what}-00000-of-00001.parquet": table([f"{what} " * 500])
        for what in ("gen", "sft")
    })  # fmt: skip
    checkpoint()
    words = ["calibrate", "dense", "--dataset", "me/sft", *WORDS, "-o", "a"]
    assert "has no Parquet or JSON-lines file of this split" in error_of(run(*words, ok=False))
    call(*words, "--split", "train_gen")
    assert not asked(server, "train_sft")


def test_a_parquet_file_is_text(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(table(["a", None, "b\n", "", "c"], n=pyarrow.array(range(5))))
    assert "".join(read_text([path], Column())) == "a\n\nb\n\n\n\n\nc"
    other = tmp_path / "b.parquet"
    other.write_bytes(table(["d"]))
    assert "".join(read_text([path, other], Column(), rows=True)).endswith("\n\nc\n\nd")
    assert "".join(read_text([path, other], Column())).endswith("\n\ncd"), "as files are joined"
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(twice, other)
    with pytest.raises(CorpusError, match="has 2 column 'text'"):
        list(read_text([other], Column()))
    for field, says in (("n", "has int64, not text, in column 'n'"), ("m", "has no column 'm'")):
        with pytest.raises(Exception, match=says):
            list(read_text([path], Column(field)))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):  # damage is one line, or goes unseen
        data = bytearray(whole)
        for place in random.integers(4, len(data), 8):
            data[place] = random.integers(256)
        path.write_bytes(data[: random.integers(8, len(data) + 1)])
        with suppress(CorpusError):
            list(read_text([path], Column()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"pyarrow is missing; pip install 'prunetool\[data\]'"):
        list(read_text([path], Column()))

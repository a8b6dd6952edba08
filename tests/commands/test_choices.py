"""Accuracy on items with choices is that of transformers' logits."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from prunetool.steps import evaluate
from prunetool.tokenizer import load_tokenizer
from tests.conftest import error_of
from tests.test_examples import EXAMPLES

WORDS = ["--samples", 2, "--sequence-length", 32]


def write_items(path, count=24):
    random = np.random.default_rng(5)

    def word():
        return "".join(random.choice(list("abcdefgh"), random.integers(2, 9)))

    lines = []
    for _ in range(count):
        choices = [f" {word()} {word()}"[: random.integers(2, 14)] for _ in range(3)]
        lines.append({"context": f"{word()} {word()}\u2028a", "choices": choices, "answer": 1})
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    return lines


def by_transformers(directory, items):
    """Fractions answered rightly by loss, and by loss for each byte."""
    judge = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer, right = load_tokenizer(directory), np.zeros(2)
    for item in items:
        context, losses = tokenizer.encode(item["context"]).ids, []
        for choice in item["choices"]:
            ids = tokenizer.encode(item["context"] + choice).ids
            with torch.no_grad():
                scores = judge(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
            places = range(len(context), len(ids))
            losses.append(-sum(scores[n - 1, ids[n]] for n in places))
        sizes = [len(choice.encode()) for choice in item["choices"]]
        found = [np.argmin(losses), np.argmin(np.array(losses) / sizes)]
        right += np.array(found) == item["answer"]
    return right / len(items)


def test_it_is_that_of_transformers_before_and_after(checkpoint, call, run, text, tmp_path):
    items = write_items(tmp_path / "items.jsonl")
    words = ["--text", text, *WORDS]
    call("calibrate", checkpoint(), *words, "--gradients", 0, "--work", "w", "-o", "a")
    how = ["--allocation", "uniform", "--method", "wanda-sp", "--multiple-of", 8]
    call("score", "a", "--sparsity", ".4", *how, "-o", "b")
    call("export", "out", "b")
    done = run(
        "evaluate",
        "--allow-calibrated",
        "out",
        "--against",
        "dense",
        *words,
        "--choices",
        "items.jsonl",
    )
    found = json.loads(done.stdout)
    for directory, said in (("out", found), ("dense", found["against"])):
        by_loss, by_bytes = by_transformers(tmp_path / directory, items)
        assert (said["items"], said["accuracy"]) == (24, pytest.approx(by_loss))
        assert said["accuracy_by_bytes"] == pytest.approx(by_bytes)
        p = by_loss
        assert said["standard_error"] == pytest.approx((p * (1 - p) / 24) ** 0.5)
    assert f"accuracy {found['accuracy']:.1%} ±" in " ".join(done.stderr.split())
    (tmp_path / "e.json").write_text(done.stdout)
    call("report", "b", "--evaluation", "e.json", "-o", "page.html")
    assert "accuracy before" in (tmp_path / "page.html").read_text()
    alone = json.loads(
        call(
            "evaluate",
            "--allow-calibrated",
            "out",
            *words,
            "--choices",
            "items.jsonl",
            "--bos",
            "always",
        )
    )
    assert alone["items"] == 24


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "holds no items"),
        ("{", "line 1: is not an item"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "two or more choices"),
        ('{"context": "a", "choices": ["b", 3], "answer": 0}', "all texts"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "all texts"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "one of them the answer"),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', "is not an item"),
        ('{"context": "", "choices": ["b", "c"], "answer": 0}', "a choice has no token before it"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "is not an item"),
        ('{"context": "a", "choices": ["\\ud800", "c"], "answer": 0}', "is not an item"),
        (None, "cannot be read (No such file or directory); check --choices"),
    ],
)
def test_what_is_no_item_is_one_line(checkpoint, run, text, tmp_path, monkeypatch, line, says):
    if line is not None:
        (tmp_path / "items.jsonl").write_text(line)
    words = ["evaluate", checkpoint(), "--text", text, *WORDS, "--choices", "items.jsonl"]
    monkeypatch.setattr(evaluate, "mean_loss", None)  # the items are read before it is called
    assert says in error_of(run(*words, ok=False))


def test_items_are_made_of_a_text(tmp_path):
    words = [f"w{i}" for i in range(50)]
    paragraphs = [" ".join([f"p{n}", *words]) for n in range(20)]
    (tmp_path / "t.txt").write_text("\n\n".join([*paragraphs, "too short"]))
    script = [sys.executable, EXAMPLES / "cloze.py", tmp_path / "t.txt", tmp_path / "c.jsonl"]
    subprocess.run([*map(str, script), "--items", "7"], check=True, capture_output=True)
    items = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(items) == 7
    for item in items:
        assert len(item["choices"]) == 4
        own = item["context"].split()[0]
        (paragraph,) = [p for p in paragraphs if p.startswith(own + " ")]
        assert item["context"] + item["choices"][item["answer"]] in paragraph

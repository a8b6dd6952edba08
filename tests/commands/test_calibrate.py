"""What calibrate fills in and checks for the steps behind it."""

import pytest

from prunetool import console, records


@pytest.mark.parametrize(("samples", "held_out"), [(1, 0), (2, 1), (7, 1), (8, 1), (16, 2)])
def test_two_samples_are_enough_to_hold_one_out(
    checkpoint, text, call, monkeypatch, samples, held_out
):
    said = []
    monkeypatch.setattr(console.log, "warning", lambda *words: said.append(words[0]))
    words = ["--samples", samples, "--sequence-length", 16, "-o", "a.jsonl"]
    call("calibrate", checkpoint(), "--text", text, *words)
    with open("a.jsonl", encoding="utf-8") as stream:
        header, _ = records.read(stream)
    assert header.calibration["held_out"] == held_out
    assert any("no sample is held out" in line for line in said) == (not held_out)
    call("score", "--sparsity", ".3", "a.jsonl", "-o", "b.jsonl")
    call("compensate", "b.jsonl", *([] if held_out else ["--damping", "0.01"]), "-o", "c.jsonl")


def test_compensate_refuses_before_it_writes_a_header(checkpoint, text, run, tmp_path):
    run("calibrate", checkpoint(), "--text", text, "--samples", 1, "--sequence-length", 32,
        "--work", "w", "-o", "c.jsonl")  # fmt: skip
    run("score", "c.jsonl", "--sparsity", ".2", "--multiple-of", 4, "-o", "k.jsonl")
    done = run("compensate", "k.jsonl", ok=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no tokens were held out" in done.stderr

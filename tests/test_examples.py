"""The scripts of examples/ that a user copies: they run, and give the same bytes."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prunetool.pruning import gram
from tests.commands.test_pipe import contents

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def shell(tmp_path):
    """Run a command with this environment's prunetool first on the path; gives its output."""

    def call(*words, **variables):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        given = {**os.environ, "PATH": path, **variables}
        done = subprocess.run(
            list(map(str, words)),
            cwd=tmp_path,
            env=given,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture
def other(tmp_path):
    """A text that is not the calibration's."""
    path = tmp_path / "other.txt"
    path.write_text("".join(chr(97 + n * n % 26) for n in range(999)))
    return path


def test_makefile_and_pipe_give_the_same_bytes_at_every_setting(checkpoint, text, shell, tmp_path):
    model = checkpoint()
    few = {"SAMPLES": "8", "LENGTH": "32"}

    def make(sparsity):
        given = {
            "MODEL": model,
            "TEXT": text,
            "OUT": tmp_path / "made",
            "SPARSITY": sparsity,
            **few,
        }
        return shell("make", "-C", EXAMPLES, *(f"{key}={value}" for key, value in given.items()))

    for sparsity in ("0.2", "0.5"):
        assert ("calibrate" in make(sparsity)) == (sparsity == "0.2"), "one calibration for both"
        shell(EXAMPLES / "pipe.sh", model, text, f"piped-{sparsity}", sparsity, **few)
    for sparsity in ("0.2", "0.5"):
        made = contents(tmp_path / f"made/dense-text.txt-8x32-{sparsity}")
        assert made == contents(tmp_path / f"piped-{sparsity}")
        assert "is up to date" in make(sparsity)
    assert contents(tmp_path / "piped-0.2") != contents(tmp_path / "piped-0.5")


def test_makefile_and_scripts_have_the_same_defaults():
    makefile = (EXAMPLES / "Makefile").read_text()
    for script in ("pipe.sh", "sweep.sh"):
        lines = (EXAMPLES / script).read_text()
        for name in ("SAMPLES", "LENGTH"):
            default = lines.split(f"${{{name}:-")[1].split("}")[0]
            assert f"{name} ?= {default}\n" in makefile
        for of in (lines, makefile):
            assert "prunetool score --sparsity" in of
            assert "--method" not in of
    assert "${4:-0.2}" in (EXAMPLES / "pipe.sh").read_text()
    assert "SPARSITY ?= 0.2\n" in makefile


def test_the_check_of_a_gpu_compares_every_step(checkpoint, text, call, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    gpu_check = importlib.import_module("gpu_check")
    monkeypatch.setattr(gpu_check, "prunetool", lambda *words: call(*words))
    monkeypatch.setattr(gpu_check, "LENGTH", 32)
    words = ["gpu_check.py", str(checkpoint()), str(text), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    lines = []
    monkeypatch.setattr(gpu_check, "print", lambda line, **_: lines.append(line), raising=False)
    gpu_check.main()
    rows = [line.split("|") for line in lines[2:]]
    compared = {row[1].strip(): row[5].strip() for row in rows}
    assert compared == {
        "calibrate": "0.0e+00", "score": "–", "compensate": "–", "recover": "0.0e+00",
        "evaluate": "0.0e+00",
    }  # fmt: skip
    near, far = (
        {"evaluate": (("inspect", checkpoint()), lambda _, x=x: [np.array(x)])} for x in (2.0, 3.0)
    )
    with pytest.raises(SystemExit, match=r"the results differ by up to 5.0e-01"):
        gpu_check.compare(near, far, "gpu")


def test_the_table_of_quality_is_made_once(checkpoint, text, other, call, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    quality = importlib.import_module("quality")
    said = []

    def prunetool(*words):
        said.append(words)
        return call(*words)

    monkeypatch.setattr(quality, "prunetool", prunetool)
    for name, value in {"SAMPLES": 10, "HELD_OUT": 2, "LENGTH": 32}.items():
        monkeypatch.setattr(quality, name, value)
    rows = ["pca", "taylor second, uniform", "flap, no refit", "refitted on 8 x 1024 tokens",
            "flap, its own bias", "pca, a basis for each norm"]  # fmt: skip
    words = ["quality.py", checkpoint(num_hidden_layers=9), text, other, other, tmp_path / "q.csv"]
    words += ["--seed", 1, "--sparsity", "0.2", "--windows", "2x32"]
    words += [word for row in rows for word in ("--setting", row)]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    quality.main()
    with (tmp_path / "q.csv").open(newline="") as file:
        made = list(csv.reader(file))
    assert len(made) == 2 + len(rows)
    assert sum(command[0] == "calibrate" for command in said) == 4
    assert sum(command[0] == "compensate" for command in said) == 3
    assert all(float(row[6]) >= 0 and float(row[7]) > 100 for row in made[2:])
    said.clear()
    quality.main()
    assert not said
    for table in quality.TABLES:
        quality.print_table(quality.read(tmp_path / "q.csv", keys=3), table)
    assert (
        quality.plot(quality.read(tmp_path / "q.csv", keys=3), "every method").count("<poly") == 5
    )


@pytest.fixture
def example(call, monkeypatch):
    """Import a script of examples/ with other constants; its commands run in this process.

    What it prints comes as a list of lines, its attribute ``said``.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name, **constants):
        module, said = importlib.import_module(name), []
        given = {"prunetool": lambda *words: call("-q", *words), "said": said, **constants}
        given["print"] = lambda *words, **_: said.append(" ".join(map(str, words)))
        for key, value in given.items():
            monkeypatch.setattr(module, key, value, raising=False)
        return module

    return load


def test_the_speed_of_every_step_is_measured(example, tmp_path):
    small = {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    }  # fmt: skip
    peaks = {name: lambda *_: 1e9 for name in ("bfloat16_peak", "float64_peak")}
    bench = example("bench_speed", LENGTH=64, SHAPES={"llama-2-7b": small}, **peaks)
    bench.achieved(tmp_path, tokens=512)
    said = [line.split() for line in bench.said if " TFLOP a layer in " in line]
    assert [words[0] for words in said] == ["calibrate", "score", "compensate"]
    assert all("% of 1" in " ".join(words) for words in said)


def test_precisions_are_compared(example, checkpoint, text, other, monkeypatch, request):
    request.addfinalizer(jax.clear_caches)  # compiled with other products
    monkeypatch.setattr(gram, "_product", gram._product)  # put back after the test
    rows = [("float32", "float32", "float32"), ("bfloat16", "bfloat16", "float32")]
    accuracy = example("accuracy", LENGTH=32, ROWS=rows)
    words = ["accuracy.py", checkpoint(), text, other, "--samples", 8]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    accuracy.main()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in accuracy.said[2:]]
    assert [tuple(row[:3]) for row in cells] == rows
    assert cells[0][3].startswith("0 of ")
    assert all(1 < float(row[5]) < 1e4 for row in cells)


def test_every_setting_of_the_table_without_gradients_can_be_made(
    example, checkpoint, text, other, monkeypatch, tmp_path
):
    methods = example("methods", SPARSITIES=("0.2",))
    real = methods.prunetool

    def short(*words):
        if words[0] == "calibrate":
            return real(*words[:-6], "--sequence-length", 32, *words[-6:], "--samples", 8)
        return real(*words, *(["--sequence-length", 32] if words[0] == "evaluate" else []))

    monkeypatch.setattr(methods, "prunetool", short)
    words = ["methods.py", checkpoint(), text, other, tmp_path / "made.csv"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    methods.main()
    assert len(methods.read(tmp_path / "made.csv")) == len(methods.SETTINGS) > 10


def test_items_with_choices_need_enough_paragraphs(example, text):
    cloze = example("cloze")
    paragraph = " ".join(map(str, range(50)))
    made = cloze.items("\n".join(f"{n} {paragraph}" for n in range(4)), 9, 0)
    assert len(made) == 4
    with pytest.raises(SystemExit, match=r"3 paragraphs of 40 words: too few"):
        cloze.items("\n".join([paragraph] * 3), 9, 0)


def test_no_paragraph_of_the_language_reference_is_in_both_halves(shell, tmp_path):
    shell(sys.executable, EXAMPLES / "topics.py", tmp_path)
    halves = [
        set(map(str.strip, (tmp_path / f"topics.{half}.txt").read_text().split("\n\n")))
        for half in ("calibrate", "measure")
    ]
    shared = halves[0] & halves[1]
    assert max(map(len, shared), default=0) < 60, "at most a heading of two topics"
    assert min(map(len, halves)) > 500


def test_first_tokens_whose_stream_stays_small_are_counted(example, checkpoint, monkeypatch):
    models = [checkpoint(), checkpoint("other")]
    weights = load_file(models[1] / "model.safetensors")
    weights["model.embed_tokens.weight"][[5, 9]] = 0  # and so each stream
    save_file(weights, models[1] / "model.safetensors")
    first_tokens = example("first_tokens", BATCH=100)
    monkeypatch.setattr(sys, "argv", ["first_tokens.py", *map(str, models)])
    first_tokens.main()
    shares = [line.split(": ")[1].split(" tokens")[0] for line in first_tokens.said]
    assert shares == ["0.000% of 260", "0.769% of 260"]

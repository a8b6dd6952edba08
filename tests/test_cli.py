import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import prunetool
from prunetool import cli, console, errors, options
from tests.conftest import error_of

PACKAGE = Path(prunetool.__file__).parent
COMMANDS = [cli.group.get_command(None, name) for name in cli.COMMANDS]


def test_help_is_quick_and_does_not_load_jax(run):
    best = 9.0
    for _ in range(3):
        started = time.monotonic()
        run("--help")
        best = min(best, time.monotonic() - started)
    assert best < 1.0  # the aim is 0.3 s; a test must not fail on a busy machine
    for name in cli.COMMANDS:
        script = (
            f"import sys; from prunetool.cli import group; "
            f"group(['{name}', '--help'], standalone_mode=False); "
            f"sys.exit(sorted({{'jax', 'numpy', 'scipy', 'torch'}} & set(sys.modules)) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)


@pytest.mark.parametrize("command", COMMANDS, ids=cli.COMMANDS)
def test_every_command_has_help_and_an_example(command):
    assert command.short_help or command.help
    assert f"prunetool {command.name}" in command.help
    assert "Example:" in command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command.name} {parameter.name}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["calibrate", "m"], "give either --text or --tokens"),
        (["calibrate", "m", "--text", "a", "--tokens", "b"], "give either --text or --tokens"),
        (["calibrate", "m", "--text", "a", "--samples", "2", "--held-out", "2"], "leave none"),
        (["evaluate", "m"], "give either --text or --tokens"),
        (["score"], "Missing option '--sparsity'"),
        (["score", "--sparsity", "1"], "not in the range"),
        (["score", "--sparsity", ".2", "--target", "layers"], "name some of heads, channels"),
        (["score", "--sparsity", ".2", "--target", "heads,q"], "name some of heads, channels"),
        (["score", "--sparsity", ".2", "--target", "qk"], "newton does not score q,k; give wanda"),
        (
            ["score", "--sparsity", ".2", "--target", "q", "--method", "attention-gd"],
            "attention-gd does not score q",
        ),
        (["score", "--sparsity", ".2", "--method", "wanda"], "wanda does not score heads"),
        (
            [
                "score",
                "--sparsity",
                ".2",
                "--target",
                "qk",
                "--method",
                "wanda",
                "--pattern",
                "2:4",
            ],
            "2:4 removes half: give --sparsity 0.5",
        ),
        (
            ["score", "--sparsity", ".2", "--target", "v", "--method", "wanda", "--refine", "3"],
            "--refine goes with --target qk",
        ),
        (
            [
                "score",
                "--sparsity",
                ".2",
                "--target",
                "qk",
                "--method",
                "attention-gd",
                "--published",
                "--lambda",
                "1",
            ],
            "--published goes with",
        ),
        (
            ["calibrate", "m", "--text", "a", "--samples", "8", "--attention-samples", "5"],
            "need --samples 10",
        ),
        (
            [
                "calibrate",
                "m",
                "--text",
                "a",
                "--sequence-length",
                "64",
                "--attention-samples",
                "2",
                "--attention-length",
                "128",
            ],
            "--attention-length 128 is beyond --sequence-length 64",
        ),
        (["calibrate", "m", "--text", "a", "--attention-length", "1"], "not in the range"),
        (["score", "--sparsity", ".2", "--newton-iterations", "3", "--lambda", "inf"], "finite"),
        (["compensate", "--damping", "much"], "give a number"),
        (["compensate", "--damping", "-1"], "a damping is 0 or more"),
        *(
            (["score", "--sparsity", ".2", option, value], f"{value} is not a finite number")
            for option, values in {
                "--lambda": ["nan"],
                "--damping": ["nan", "inf"],
                "--learning-rate": ["nan", "inf", "1e999"],
            }.items()
            for value in values
        ),
        (["score", "--sparsity", "nan"], "nan is not a finite number"),
        (["inspect", "m", "--sparsity", "NaN"], "NaN is not a finite number"),
        (["score", "--sparsity", ".2", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["score", "--sparsity", ".2", "--lambda", "-inf"], "-inf is not in the range x>0"),
        *(
            (["compensate", "--damping", value], "a damping is 0 or more, and finite")
            for value in ("nan", "inf", "0.1,nan")
        ),
        (["prune"], "No such command 'prune'"),
    ],
)
def test_a_wrong_command_line_exits_2(words, says):
    done = CliRunner().invoke(cli.group, words, input="")
    assert done.exit_code == 2
    assert says in done.output


def test_a_terminal_on_stdin_is_a_usage_error_at_once(monkeypatch):
    from prunetool import options

    monkeypatch.setattr(options.sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(click.UsageError, match="stdin is a terminal"):
        options._no_terminal(None, None, "-")
    assert options._no_terminal(None, None, "file") == "file"


def test_lambda_may_be_infinite():
    number = options.Finite(0, min_open=True, infinity=True)
    assert number.convert("inf", None, None) == float("inf")
    (lam,) = [p for p in cli.group.get_command(None, "score").params if p.name == "lam"]
    assert lam.type.infinity


ODD = "m[/x] [red]\x1b[31m\n模型\udcff"  # markup of rich's, a colour, a line, a byte of no text


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_any_name_in_any_encoding_is_shown_on_one_line_that_no_terminal_obeys(
    checkpoint, text, run, tmp_path, encoding
):
    model = tmp_path / ODD
    model.parent.mkdir()
    checkpoint().rename(model)
    words = {"PYTHONIOENCODING": encoding}
    done = run("inspect", ODD, **words)
    assert json.loads(done.stdout)["model"] == ODD
    assert done.stdout.isascii()
    assert done.stderr.startswith(r"m[/x] [red]\x1b[31m\n")
    found = run("calibrate", model, "--text", text, "--samples", 2, "--sequence-length", 32,
                "--work", tmp_path / f"{ODD}.w", **words)  # fmt: skip
    assert r"[/x] [red]\x1b[31m\n" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    for said in (done.stderr, found.stderr):
        assert "\x1b" not in said


def test_a_table_shows_foreign_cells_as_they_are_and_cut(capsys):
    console.setup_logging(0)
    console.table("t[/x]\x1b[2J", ["name"], [["[bold]b[/]\x07"], ["y" * 200]])
    title, *_ = (lines := capsys.readouterr().err.splitlines())
    assert title.strip() == r"t[/x]\x1b[2J"
    assert any(r"[bold]b[/]\x07" in line for line in lines)
    assert sum(line.count("y") for line in lines) == errors.SHOWN - 1


@pytest.mark.skipif(sys.platform != "linux", reason="a device that is always full")
def test_a_full_disk_names_what_could_not_be_written(calibrated, run):
    _, records = calibrated()
    score = ["score", "--method", "wanda-sp", "--sparsity", ".2", "--multiple-of", 8, records]
    line = error_of(run(*score, "-o", "/dev/full", ok=False))
    assert line == "Error: /dev/full: No space left on device; fix it and run again"
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "prunetool", *map(str, score)]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert error_of(done) == "Error: stdout: No space left on device; fix it and run again"


def test_an_empty_stream_exits_1_with_one_line(run):
    for words in (["score", "--sparsity", ".2"], ["compensate"], ["export", "out"]):
        done = run(*words, stdin="", ok=False)
        assert "<stdin>: the stream is empty; run the step before again" in error_of(done)


def test_a_traceback_is_shown_on_request(run):
    done = run("compensate", stdin="", ok=False, PRUNETOOL_DEBUG="1")
    assert "Traceback" in done.stderr


def test_a_message_is_one_line():
    error = errors.CheckpointError("a", "b\nc", "d")
    assert str(error) == r"a: b\nc; d"
    with (
        pytest.raises(errors.NumericalError, match="layer 1: A: is bad; do"),
        errors.naming("layer 1"),
    ):
        raise errors.NumericalError("A", "is bad", "do")


ALLOWED = {
    "cli": {"commands", "console", "signals", "errors"},
    "commands": {"options", "records", "console", "corpus", "checkpoint", "model", "steps",
                 "workdir", "plan", "devices", "profiling", "pruned", "streaming", "tokenizer",
                 "errors"},
    "options": {"checkpoint", "errors"},
    "steps": {"records", "console", "checkpoint", "llama", "pruning", "model", "pruned",
              "streaming", "workdir", "card", "devices", "profiling", "errors", "loaders"},
    "plan": {"llama", "model", "pruning"},
    "devices": {"errors"},
    "profiling": set(),
    "card": {"checkpoint", "errors", "llama", "model", "records"},
    "pruned": {"records", "workdir", "checkpoint", "console", "llama", "model", "errors"},
    "streaming": {"checkpoint", "llama", "model", "errors"},
    "workdir": {"checkpoint", "records", "console", "errors"},
    "model": {"checkpoint", "llama", "errors"},
    "records": {"errors"},
    "corpus": {"tokenizer", "errors"},
    "tokenizer": {"checkpoint", "errors"},
    "console": {"errors"},
    "signals": set(),
    "checkpoint": {"errors"},
    "llama": {"errors"},
    "pruning": {"errors"},
    "errors": set(),
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prunetool"):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]


def test_imports_point_down():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__", "loaders"):
            continue
        outside = set(imports(path)) - {part, "__version__"}
        assert outside <= ALLOWED[part], f"{path.name}: {outside - ALLOWED[part]}"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_it_starts_again_with_huge_pages_once(monkeypatch):
    started = []

    def execv(path, words):
        started.append([path, *words])
        raise OSError("no second start here")

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "prunetool", "-h"])
    for name in ("signal", "set_wakeup_fd"):  # this process's own stay
        monkeypatch.setattr(signal, name, lambda *_, **__: None)
    for program in ("/bin/prunetool", "/x/__main__.py", "notebook"):
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        monkeypatch.setattr(sys, "argv", [program, "-h"])
        with pytest.raises(SystemExit):
            cli.main()
        if program == "/bin/prunetool":
            assert "glibc.malloc.hugetlb=1" in os.environ["GLIBC_TUNABLES"]
    assert started == 2 * [[sys.executable, sys.executable, "-m", "prunetool", "-h"]]
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(sys, "argv", ["prunetool", "-h"])
    with pytest.raises(SystemExit):
        cli.main()
    assert len(started) == 2


def test_only_commands_know_click():
    for path in PACKAGE.rglob("*.py"):
        knows = "import click" in path.read_text()
        assert not knows or path.parent.name == "commands" or path.name in ("cli.py", "options.py")


def test_the_package_never_imports_torch():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "loaders":
            assert "torch" not in {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in [getattr(node, "module", None) or node.names[0].name]
            }


def test_every_module_imports():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "loaders" and path.name != "__main__.py":
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            importlib.import_module(name.removesuffix(".__init__"))

import ast
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import prunetool
from prunetool import cli, console, errors, options
from prunetool.steps import evaluate
from prunetool.steps.export import COMPANIONS
from tests import hub
from tests.conftest import error_of

PACKAGE = Path(prunetool.__file__).parent
COMMANDS = [cli.group.get_command(None, name) for name in cli.COMMANDS]


def test_help_is_quick_as_it_loads_nothing_large():
    script = (
        "import sys; from prunetool.cli import COMMANDS, group\n"
        "for words in ['--help'], *([name, '--help'] for name in COMMANDS):\n"
        "    group(words, standalone_mode=False)\n"
        "    loaded = {'jax', 'numpy', 'scipy', 'torch', 'safetensors', 'tokenizers', 'gguf',\n"
        "              'huggingface_hub', 'rich', 'tqdm'} & set(sys.modules)\n"
        "    assert not loaded, (words, loaded)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        (["calibrate", "m", "--text", "a", "--samples", "2", "--held-out", "2"], "leaves none"),
        (["evaluate", "m"], "give either --text or --tokens"),
        (["score"], "Missing option '--sparsity'"),
        (["score", "--sparsity", "1"], "not in the range"),
        (["score", "--sparsity", "20"], "not in the range 0<=x<1. Did you mean 0.2?"),
        (["score", "--sparsity", "12.5%"], "not a valid float range. Did you mean 0.125?"),
        (["score", "--sparsity", ".2", "--target", "layers"], "give some of heads, channels"),
        (["score", "--sparsity", ".2,.3"], "several sparsities need -o with {sparsity}"),
        (
            ["score", "--sparsity", ".2", "--refine", "3", "--target", "heads"],
            "--refine goes with --target qk",
        ),
        (
            ["score", "--sparsity", ".2", "--target", "q", "--weighting", "token"],
            "--weighting is only for heads and channels, but --target names others",
        ),
        (
            ["score", "--sparsity", ".2", "--target", "heads", "--min-channels", "9"],
            "--min-channels goes with --target channels",
        ),
        (["inspect", "m", "--sparsity", ".2"], "--sparsity goes with --plan"),
        (["inspect", "m", "--sequence-length", "9"], "--sequence-length goes with --plan"),
        (
            ["calibrate", "m", "--text", "a", "--labels", "text", "--gradients", "0"],
            "--labels text goes with --gradients, which is 0",
        ),
        (["evaluate", "m", "--text", "a", "--cfg-scale", "2"], "--cfg-scale is for --against"),
        (
            ["evaluate", "m", "--tokens", "a", "--text-field", "b"],
            "--text-field is for --text FILE or --dataset",
        ),
        (["score", "--sparsity", ".2", "--target", "heads,q"], "give some of heads, channels"),
        (
            ["score", "--sparsity", ".2", "--target", "qk", "--method", "newton"],
            "newton does not score q,k; give attention-diag",
        ),
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
            "--published sets --lambda itself: leave out one of them",
        ),
        *(
            (["score", "--sparsity", ".2", "--target", "v", "--method", "wanda", *more], words)
            for more, words in {
                ("--allocation", "global"): "is only for heads and channels; give uniform or loss",
                ("--allocation", "loss"): "--pattern per-output fixes what each matrix loses;",
            }.items()
        ),
        *(
            (["score", "--sparsity", ".2", "--published", *more], words)
            for more, words in {
                ("--lambda", "inf"): "--published sets --lambda itself",
                ("--allocation", "uniform"): "--published sets --allocation itself",
                ("--allocation", "loss"): "--published sets --allocation itself",
                ("--weighting", "token"): "--published sets --weighting itself",
                (
                    "--method",
                    "obs",
                ): "goes with --method newton or taylor or attention-gd, not obs of heads,",
                (
                    "--target",
                    "v",
                ): "goes with --method newton or taylor or attention-gd, not fisher of v",
            }.items()
        ),
        *(
            (["score", "--sparsity", ".2", *more], words)
            for more, words in {
                ("--seed", "1"): "--seed goes with --method random",
                ("--method", "flap", "--damping", "1"): "--damping goes with --method greedy or",
                ("--target", "qk", "--method", "wanda", "--iterations", "9"): "with --method atten",
                ("--target", "qk", "--published", "--iterations", "9"): "sets --iterations itself",
            }.items()
        ),
        (
            ["score", "--sparsity", ".1,.2", "-o", "k{sparsity}", "--profile", "p"],
            "several sparsities need --profile with {sparsity} in its name",
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
            "--attention-length 128 exceeds --sequence-length 64",
        ),
        (["calibrate", "m", "--text", "a", "--attention-length", "1"], "not in the range"),
        (
            ["calibrate", "m", "--text", "a", "--attention-length", "64"],
            "--attention-length goes with --attention-samples",
        ),
        (["score", "--sparsity", ".2", "--newton-iterations", "3", "--lambda", "inf"], "finite"),
        (["compensate", "--damping", "much"], "give a number"),
        (["compensate", "--damping", "-1"], "a damping must be finite"),
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
            (["compensate", "--damping", value], "a damping must be finite and at least 0")
            for value in ("nan", "inf", "0.1,nan")
        ),
        (["prune"], "No such command 'prune'"),
        (["calibrat", "m"], "No such command 'calibrat'. Did you mean 'calibrate'?"),
        (["score", "--sparsty", ".2"], "No such option '--sparsty'. Did you mean '--sparsity'?"),
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
    checkpoint, text, process, tmp_path, encoding
):
    model = tmp_path / ODD
    model.parent.mkdir()
    checkpoint().rename(model)
    words = {"PYTHONIOENCODING": encoding}
    done = process("inspect", ODD, **words)
    assert json.loads(done.stdout)["model"] == ODD
    assert done.stdout.isascii()
    assert done.stderr.startswith(r"m[/x] [red]\x1b[31m\n")
    found = process("calibrate", model, "--text", text, "--samples", 2, "--sequence-length", 32,
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


class TestOutput:
    def test_the_target_of_a_link_is_written_and_the_link_stays(self, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to("there/first")
        (tmp_path / "there/first").symlink_to(tmp_path / "file")
        for written in ("one", "two"):  # a file that is not there yet, and one that is
            with options.open_sink(str(tmp_path / "link")) as sink:
                sink.write(written)
                assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == "one"
            assert (tmp_path / "file").read_text() == written
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there/first").is_symlink()
        assert {path.name for path in tmp_path.iterdir()} == {"there", "link", "file"}

    def test_links_in_a_ring_are_an_error(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(OSError, match="symbolic links"), options.open_sink(f"{tmp_path}/a"):
            pass

    @pytest.mark.skipif(not Path("/dev/fd").exists(), reason="open files by name")
    def test_a_file_that_is_open_already_is_written_and_not_replaced(self, tmp_path):
        path = tmp_path / "file"
        with path.open("w") as held:
            held.write("before\n")
            held.flush()
            (tmp_path / "link").symlink_to(f"/dev/fd/{held.fileno()}")
            for name in (f"/dev/fd/{held.fileno()}", str(tmp_path / "link")):
                with options.open_sink(name) as sink:
                    sink.write("records\n")
            assert os.fstat(held.fileno()).st_ino == path.stat().st_ino
        assert path.read_text() == "before\nrecords\nrecords\n"

    @pytest.mark.skipif(sys.platform != "linux", reason="links to what is open")
    def test_dev_stdout_stays_a_device(self):
        write = "from prunetool import options\nwith options.open_sink('/dev/stdout') as sink: "
        done = subprocess.run(
            [sys.executable, "-c", f"{write}sink.write('records')"], capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("records", "")
        assert Path("/dev/stdout").is_symlink()

    @pytest.mark.parametrize(
        ("words", "output"),
        [
            (["calibrate", "dense", "--text", "b", "--text", "in", "-o"], "in"),
            (["calibrate", "dense", "--tokens", "in", "-o"], "link"),
            (["calibrate", "dense", "--tokens", "in", "-o"], "hard"),
            (["calibrate", "dense", "--text", "in", "--profile"], "in"),
            (["calibrate", "dense", "--text", "b", "-o"], "dense/config.json"),
            (["calibrate", "dense", "--text", "b", "--profile"], "dense/model.safetensors"),
            (["score", "--sparsity", ".2", "in", "-o"], "in"),
            (["score", "--sparsity", ".2", "in", "--profile"], "in"),
            (["compensate", "in", "-o"], "link"),
            (["report", "in", "-o"], "in"),
            (["report", "b", "--evaluation", "in", "-o"], "in"),
        ],
    )
    def test_no_output_goes_onto_an_input(self, checkpoint, tmp_path, monkeypatch, words, output):
        checkpoint()
        monkeypatch.chdir(tmp_path)
        Path("in").write_text("read")
        Path("link").symlink_to("in")
        Path("hard").hardlink_to("in")
        before = Path(output).read_bytes()
        done = CliRunner().invoke(cli.group, [*words, output])
        assert done.exit_code == 2
        assert f"Error: {output} is an input of this command: write to another" in done.output
        assert Path(output).read_bytes() == before

    @pytest.mark.parametrize(
        "words",
        [
            ["bench", "dense", "--plot"],
            ["calibrate", "dense", "--text", "a", "--profile"],
            ["score", "a", "--sparsity", ".2", "-o"],
            ["compensate", "a", "--profile"],
        ],
    )
    def test_the_directory_of_an_output_is_there_before_any_work(self, run, words):
        done = run(*words, "absent/file", ok=False)
        assert error_of(done) == "Error: absent: no such directory; make it, or name another"

    def test_the_files_of_a_streams_model_are_inputs_too(self, calibrated, tmp_path):
        model, stream = calibrated()
        before = (model / "config.json").read_bytes()
        for words in (["score", "--sparsity", ".2"], ["compensate"], ["report"]):
            words = [*words, str(stream), "-o", str(model / "config.json")]
            done = CliRunner().invoke(cli.group, words)
            assert done.exit_code == 2
            assert "config.json is an input of this command" in done.output
        assert (model / "config.json").read_bytes() == before

    def test_redirected_streams_are_inputs_and_outputs_too(self, tmp_path):
        stream = tmp_path / "in"
        stream.write_text("read")
        score = [sys.executable, "-m", "prunetool", "score", "--sparsity", ".2"]
        with stream.open() as stdin, stream.open("a") as stdout:
            found = [
                subprocess.run([*score, "-o", "in"], stdin=stdin, stderr=-1, cwd=tmp_path),
                subprocess.run([*score, "in"], stdout=stdout, stderr=-1, cwd=tmp_path),
            ]
        for done, name in zip(found, ("in", "stdout"), strict=True):
            assert done.returncode == 2
            assert f"Error: {name} is an input of this command".encode() in done.stderr
        assert stream.read_text() == "read"

    def test_other_files_beside_the_inputs_are_written(self, checkpoint, tmp_path):
        model = checkpoint()
        (model / "stats.jsonl").write_text("of the run before")
        options.keep_inputs([model / "stats.jsonl", tmp_path / "new", None], [model, None])
        options.keep_inputs(["/dev/null"], ["/dev/null", "m\0", "m" * 5000])

    @pytest.mark.parametrize(
        "words",
        [
            ["export", "/", "in"],
            ["export", "/tmp/..", "in"],
            ["convert", "in", "/"],
            ["calibrate", "m", "--text", "in", "--work", "/"],
            ["evaluate", "m", "--text", "in", "--work", "/"],
            ["evaluate", "m", "--text", "in", "--work", "."],
            ["evaluate", "m", "--text", "in", "--work", ".."],
        ],
    )
    def test_the_root_directory_is_refused_by_any_name(self, words, monkeypatch):
        monkeypatch.chdir("/")
        done = CliRunner().invoke(cli.group, words)
        assert done.exit_code == 2
        assert "cannot be the root directory: name a directory in it" in done.output

    @pytest.mark.parametrize("name", [".", "../w"])
    def test_a_work_directory_may_be_named_by_dots(self, checkpoint, text, run, tmp_path, name):
        (tmp_path / "w").mkdir()
        words = ["evaluate", checkpoint(), "--text", text, "--samples", 1, "--work", name]
        run(*words, cwd=tmp_path / "w")
        assert not list(tmp_path.rglob("*lock"))

    def test_the_directory_above_has_its_own_name(self, checkpoint, text, run, tmp_path):
        (tmp_path / "w/inside").mkdir(parents=True)
        words = ["evaluate", checkpoint(), "--text", text, "--samples", 1, "--work", ".."]
        line = error_of(run(*words, cwd=tmp_path / "w/inside", ok=False))
        assert line.startswith(f"Error: {tmp_path}/w: is not a work directory")


def closed(redirection, *words):
    """Run ``prunetool`` with a standard stream that the shell closes."""
    line = f'exec "$@" {redirection}'
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "prunetool", *map(str, words)],
        capture_output=True,
        text=True,
    )


class TestClosedStreams:
    def test_stdin_reads_as_empty(self):
        done = closed("<&-", "score", "--sparsity", ".2")
        assert error_of(done).startswith(
            "Error: /dev/null: the stream is empty; run the previous step again"
        )

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_stdout_is_an_error_if_the_command_writes_there(self, calibrated, tmp_path, name):
        words = {
            "convert": ["m.gguf", "out"],
            "export": ["out", "c.jsonl"],
            "sample": ["m", "-o", "p.npy"],
            "score": ["--sparsity", 0],
            "calibrate": ["m", "--text", "t"],
            "evaluate": ["m", "--text", "t"],
        }
        line = error_of(closed(">&-", name, *words.get(name, ["m"])))
        if name in cli.WRITES_FILES:
            assert line.startswith(f"Error: {words[name][-1 if name == 'export' else 0]}: ")
        else:
            assert line == "Error: stdout: is closed; redirect it to a file, or to /dev/null"

    def test_export_needs_no_stdout(self, calibrated, run, tmp_path):
        _, stream = calibrated()
        run("score", "--sparsity", ".2", "--multiple-of", 8, stream, "-o", "b.jsonl")
        done = closed(">&-", "export", tmp_path / "out", tmp_path / "b.jsonl")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out/model.safetensors.index.json").exists()

    def test_without_stderr_the_records_are_the_same(self, calibrated, run):
        _, stream = calibrated()
        words = ["score", "--sparsity", ".2", "--multiple-of", 8, stream]
        done = closed("2>&-", *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run(*words).stdout
        assert (
            closed("2>&-", "score", "--sparsity", ".2", stream.with_name("absent")).returncode == 1
        )

    def test_no_file_takes_the_number_of_a_closed_stream(self):
        program = (
            "import os, sys; from prunetool import cli; cli._fill_streams()\n"
            "opened = os.open(sys.executable, os.O_RDONLY)\n"
            "os._exit(opened if sys.stdout is None and sys.stdin.read() == '' else 99)"
        )
        line = 'exec "$@" <&- >&- 2>&-'
        done = subprocess.run(["sh", "-c", line, "sh", sys.executable, "-c", program])
        assert done.returncode == 3


class TestPerplexity:
    def test_it_is_exp_of_the_loss_as_long_as_there_is_such_a_number(self):
        assert evaluate.perplexity(2.0) == math.exp(2.0)
        assert evaluate.perplexity(709.7) == math.exp(709.7)
        for loss in (709.79, 1e9, math.inf, math.nan):
            assert evaluate.perplexity(loss) is None

    @pytest.mark.parametrize("against", [False, True])
    def test_a_model_that_knows_nothing_has_a_loss_and_no_perplexity(
        self, checkpoint, text, run, against
    ):
        model = checkpoint()
        head = load_file(model / "model.safetensors")
        head["lm_head.weight"] *= 1e5
        save_file(head, model / "model.safetensors")
        more = ["--against", model] if against else []
        done = run(
            "evaluate", model, "--text", text, "--samples", 2, "--sequence-length", 32, *more
        )
        result = json.loads(done.stdout)
        assert result["perplexity"] is None
        assert result["loss"] > 1000
        assert f"perplexity too large for a number (loss {result['loss']:.1f} nats)" in done.stderr
        if against:
            assert result["against"]["perplexity"] is None
            assert result["against"]["loss"] == result["loss"]
            assert f"too large for a number (loss {result['loss']:.1f} nats) before" in done.stderr


def test_what_an_export_copies_along_is_downloaded_with_a_model(checkpoint, process, tmp_path):
    model = checkpoint("served")
    for name in (*COMPANIONS, "README.md", "pytorch_model.bin", "modeling_x.py"):
        if not (model / name).exists():
            (model / name).write_text("{}")
    server = hub.start(model)
    process("inspect", "me/tiny", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1", HF_TOKEN="")  # fmt: skip
    server.shutdown()
    server.server_close()
    (snapshot,) = tmp_path.glob("hf/hub/*/snapshots/*")
    found = {path.name for path in snapshot.iterdir()}
    assert found == {"config.json", "model.safetensors", "README.md", *COMPANIONS}


def test_an_empty_stream_exits_1_with_one_line(process):
    for words in (["score", "--sparsity", ".2"], ["compensate"], ["export", "out"]):
        done = process(*words, stdin="", ok=False)
        assert "<stdin>: the stream is empty; run the previous step again" in error_of(done)


def test_a_traceback_is_shown_on_request(process):
    done = process("compensate", stdin="", ok=False, PRUNETOOL_DEBUG="1")
    assert "Traceback" in done.stderr


def test_verbose_and_quiet_stand_before_a_command_or_behind_it(checkpoint, capsys):
    model = checkpoint(num_hidden_layers=16)

    def rows(*words):
        cli.group.main([*words, str(model)], standalone_mode=False)
        return capsys.readouterr().err.count("\n│")

    assert rows("inspect") == 1  # all layers are alike
    assert rows("inspect", "-v") == rows("-v", "inspect") == 16
    assert rows("inspect", "-q") == rows("-q", "inspect") == rows("-v", "inspect", "-q") == 0


def test_a_message_is_one_line():
    error = errors.CheckpointError("a", "b\nc", "d")
    assert str(error) == r"a: b\nc; d"
    with (
        pytest.raises(errors.NumericalError, match="layer 1: A: is bad; do"),
        errors.naming("layer 1"),
    ):
        raise errors.NumericalError("A", "is bad", "do")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_message_fits_three_lines_of_a_terminal_and_cuts_the_part_that_is_too_long(part):
    parts = ["model.safetensors", "is damaged", "download it again"]
    whole = parts.pop(part)
    said = str(errors.CheckpointError(*parts[:part], whole * 100, *parts[part:]))
    assert len(f"Error: {said}") <= 240
    assert all(other in said for other in parts)
    assert said.count("…") == 1


ALLOWED = {
    "cli": {"commands", "console", "options", "records", "signals", "errors"},
    "commands": {"options", "records", "console", "corpus", "checkpoint", "model", "steps",
                 "workdir", "plan", "devices", "profiling", "streaming", "tokenizer",
                 "methods", "formats", "llama", "errors"},
    "options": {"checkpoint", "console", "corpus", "dataset", "errors"},
    "steps": {"records", "console", "corpus", "plan", "checkpoint", "llama", "pruning", "model",
              "kept", "stats", "streaming", "workdir", "card", "devices", "profiling", "methods",
              "errors", "loaders", "tokenizer", "runtimes", "chat", "overlap", "formats"},
    "plan": {"llama", "model", "pruning", "stats"},
    "devices": {"errors", "signals"},
    "profiling": set(),
    "methods": set(),
    "formats": set(),
    "overlap": set(),
    "runtimes": set(),
    "card": {"checkpoint", "errors", "llama", "model", "records"},
    "kept": {"records", "workdir", "checkpoint", "llama", "methods", "model", "errors"},
    "stats": {"records", "workdir", "llama", "pruning", "errors"},
    "streaming": {"checkpoint", "llama", "model", "errors"},
    "workdir": {"checkpoint", "records", "console", "errors"},
    "model": {"checkpoint", "llama", "errors"},
    "records": {"console", "errors"},
    "corpus": {"chat", "dataset", "text", "tokenizer", "errors"},
    "chat": {"checkpoint", "tokenizer", "errors"},
    "dataset": {"checkpoint", "errors"},
    "text": {"errors"},
    "tokenizer": {"checkpoint", "pieces", "errors"},
    "pieces": set(),
    "console": {"errors"},
    "signals": set(),
    "checkpoint": {"errors", "signals"},
    "llama": {"errors"},
    "pruning": {"errors"},
    "errors": set(),
}  # fmt: skip


def modules(path):
    """All that a file imports, by its full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name for alias in node.names]


def imports(path):
    """Parts of the package that a file imports."""
    return {name.split(".")[1] for name in modules(path) if name.startswith("prunetool.")}


def test_imports_point_down():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__", "loaders"):
            continue
        outside = imports(path) - {part, "__version__"}
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


@pytest.mark.parametrize(
    ("library", "known_to"), [("click", r"commands/\w+|cli|options"), ("torch", r"loaders/\w+")]
)
def test_only_some_modules_know(library, known_to):
    for path in PACKAGE.rglob("*.py"):
        if not re.fullmatch(known_to, str(path.relative_to(PACKAGE).with_suffix(""))):
            assert library not in {name.split(".")[0] for name in modules(path)}, path


def test_every_module_imports():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "loaders" and path.name != "__main__.py":
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            importlib.import_module(name.removesuffix(".__init__"))

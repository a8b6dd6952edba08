"""``run``: what the pipe writes, in one command."""

import pytest

from tests.commands.test_pipe import contents
from tests.conftest import error_of

WORDS = ["--samples", 4, "--sequence-length", 32]


# Options of run, and of which steps.
OF = {
    "--recover": (),
    "--allocation": ("score",),
    "--shuffle": ("calibrate",),
    "--bos": ("calibrate",),
    "--gradients": ("calibrate",),
    "--first-tokens": ("calibrate",),
    "--dtype": ("calibrate", "recover"),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"--recover": None},
        {"--allocation": "uniform"},
        {"--recover": None, "--shuffle": 1, "--bos": "always", "--dtype": "bfloat16"}
        | {"--gradients": 2, "--first-tokens": 32},
    ],
)
def test_the_same_bytes_as_the_pipe(checkpoint, text, run, call, tmp_path, options):
    def of(step=None):
        own = {k: v for k, v in options.items() if step is None or step in OF[k]}
        return [str(word) for pair in own.items() for word in pair if word is not None]

    more = of()
    model = checkpoint()
    done = run("run", model, "out", "--text", text, *WORDS, "--sparsity", ".2", *more,
               "--work", "w")  # fmt: skip
    for step in ("calibrate", "score", "compensate", "export"):
        assert f"{step}: " in done.stderr
    assert ("recover: " in done.stderr) == ("--recover" in more)
    assert not done.stdout
    words = of("calibrate")
    call("calibrate", model, "--text", text, *WORDS, *words, "--work", "v", "-o", "a")
    call("score", "a", "--sparsity", ".2", *of("score"), "-o", "b")
    call("compensate", "b", "-o", "c")
    if "--recover" in more:
        call("recover", "c", *of("recover"), "-o", "c2")
    call("export", "piped", "c2" if "--recover" in more else "c")
    assert contents(tmp_path / "out") == contents(tmp_path / "piped")
    again = run("run", model, "out", "--text", text, *WORDS, "--sparsity", ".2", *more,
                "--work", "w").stderr  # fmt: skip
    assert "already has it" in again


def test_a_wrong_option_and_a_failing_step_are_one_line(checkpoint, text, run, tmp_path):
    model = checkpoint()
    words = ["run", model, "out", "--text", text, *WORDS]
    own = run(*words[:3], "--sparsity", ".1", ok=False).stderr
    assert "Usage: prunetool run [OPTIONS] MODEL OUT" in own, (
        "not of a step, whose name is not known"
    )
    assert "is MODEL itself" in run("run", model, model, *words[3:], "--sparsity", ".1",
                                    ok=False).stderr  # fmt: skip
    assert "Missing option '--sparsity'" in run(*words, ok=False).stderr
    assert "not a valid float" in run(*words, "--sparsity", ".1,.2", ok=False).stderr
    assert "No such option" in run(*words, "--sparsity", ".1", "--damping", "1", ok=False).stderr
    line = error_of(run(*words[:-1], 99999, "--sparsity", ".1", ok=False))
    assert "text.txt" in line
    assert not (tmp_path / "out").exists()
    quiet = run(*words, "--sparsity", ".1", "-q")
    assert "calibrate: " not in quiet.stderr


def test_what_would_fail_after_calibrating_is_refused_before(checkpoint, text, run, tmp_path):
    model = checkpoint()
    for more, says in {
        ("--gradients", 0): "--gradients 0 goes with --allocation uniform or share",
        ("--samples", 1): "--samples 1 leaves none to choose a damping on: give 2 or more",
    }.items():
        words = ["--text", text, *WORDS, "--sparsity", ".2"]
        assert says in run("run", model, "out", *words, *more, ok=False).stderr
    assert not (tmp_path / "dense.prunetool").exists()
    run("run", model, "out", *words[:-1], ".1")
    for allocation in ("uniform", "share"):
        again = run("run", "out", "out2", *words, "--allocation", allocation, ok=False)
        assert "the layers of MODEL differ in size; give --allocation loss" in error_of(again)
    assert not (tmp_path / "out.prunetool").exists()


def test_a_taken_out_is_refused_before_the_steps(checkpoint, text, run, tmp_path):
    words = ["--text", text, *WORDS, "--sparsity"]
    model = checkpoint()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, says in (("full", "full: is not empty; name another"), ("file", "file: is a file")):
        assert says in error_of(run("run", model, out, *words, ".2", ok=False))
    assert not (tmp_path / "dense.prunetool").exists()
    run("run", model, "out", *words, ".2")
    done = run("run", model, "out", *words, ".3", ok=False)
    assert (
        "out: was made with --sparsity 0.2 --allocation loss; name another directory or"
        in error_of(done)
    )
    assert "calibrate: " not in done.stderr
    trained = run("run", model, "out", *words, ".2", "--recover", ok=False)
    assert "out: was made with --sparsity 0.2 --allocation loss; name" in error_of(trained)
    assert "recover: " not in trained.stderr
    assert "already has it" in run("run", model, "out", *words, ".2").stderr
    run("run", model, "out", *words, ".3", "--overwrite")
    run("clean", "out")
    assert "already has it" in run("run", model, "out", *words, ".3").stderr

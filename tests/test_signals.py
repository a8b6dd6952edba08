"""Commands that a signal ends, as processes: what they say, leave and exit with."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.commands.test_pipe import contents
from tests.conftest import STAND, at_layer, command, until

GO_ON = "Interrupted; run the same command again to resume\n"
ENDING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture
def slow(checkpoint, text):
    """Words of a calibration that computes for a while in each layer."""
    model = checkpoint(num_hidden_layers=9, hidden_size=128, intermediate_size=512)
    return ["calibrate", model, "--text", text, "--samples", 30, "--sequence-length", 128,
            "--work", "w"]  # fmt: skip


@pytest.fixture
def script(popen):
    """Start a Python program that runs under `signals.raised`; it says when it is ready."""
    begin = "import os, signal, sys, time; from prunetool import signals\n"
    return lambda program, *words: popen([*words, sys.executable, "-c", begin + program])


def test_interrupted_while_it_computes_it_leaves_what_a_resume_needs(slow, run, start, tmp_path):
    slow = [*slow, "--gradients", 0]  # whose records come layer by layer
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    records = run(*slow, cwd=tmp_path / "whole").stdout

    chance = random.Random(0)
    for layer, (number, code) in enumerate((*ENDING, *ENDING)):
        running = start(slow, tmp_path / "killed", first=at_layer(layer + 2, STAND))
        for _ in range(layer + 2):  # the header, and what is whole
            assert running.stdout.readline()
        time.sleep(chance.uniform(0, 0.1))  # somewhere in the next layers: it stands in the second
        running.send_signal(number)
        _, said = running.communicate()
        assert (running.returncode, said) == (code, GO_ON)
        left = {path.name for path in (tmp_path / "killed").glob("w*/*")}
        allowed = {"run.json", "weights.json", "tokens.safetensors", "stats"}
        assert left - {name for name in left if name.startswith("hidden-")} <= allowed
        assert [path.name for path in (tmp_path / "killed").iterdir()] == ["w"]  # no lock
        assert not list((tmp_path / "killed").rglob(".*"))
    last = run(*slow, cwd=tmp_path / "killed").stdout
    assert last == records.replace("/whole/", "/killed/")
    assert contents(tmp_path / "killed/w") == contents(tmp_path / "whole/w")


@pytest.mark.parametrize(("number", "code"), ENDING)
def test_an_evaluation_that_is_ended_removes_its_temporary_stream(
    slow, start, tmp_path, number, code
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = ["evaluate", *slow[1:-2]]
    running = start(words, first=at_layer(1, STAND), TMPDIR=str(temporary))
    until(lambda: list(temporary.glob("prunetool-*/hidden-00001")), running)
    running.send_signal(number)
    out, said = running.communicate()
    assert (running.returncode, out, said) == (code, "", "Interrupted; nothing is kept\n")
    assert not list(temporary.iterdir())


# A step that says when it is ready for a signal, and waits for the step before however long.
PATIENT = """
import os
from pathlib import Path
from prunetool import cli, console
def ready(verbosity, real=console.setup_logging):
    real(verbosity)
    Path(f"ready-{os.getpid()}").touch()
console.setup_logging, cli.WAIT_SECONDS = ready, 600
"""


@pytest.mark.parametrize(("number", "code"), ENDING)
def test_a_pipe_that_is_ended_says_it_once(slow, popen, tmp_path, number, code):
    steps = [["score", "--sparsity", ".2"], ["compensate"], ["export", "out"]]
    pipe = [command(slow, at_layer(4, STAND)), *(command(words, PATIENT) for words in steps)]
    line = " | ".join(map(shlex.join, pipe))
    running = popen(
        ["bash", "-c", f"trap : INT TERM HUP; {line}; exit ${{PIPESTATUS[3]}}"],
        cwd=tmp_path,
        start_new_session=True,
    )
    until(lambda: list(tmp_path.glob("w/stats/layer-00003.*")), running)
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 3, running)
    os.killpg(running.pid, number)
    _, said = running.communicate()
    assert said.splitlines() == [GO_ON.strip()]
    assert running.returncode == code
    assert not list(tmp_path.rglob("*.lock"))


def test_a_step_that_alone_is_ended_says_so_in_the_pipe(calibrated, start, tmp_path):
    _, records = calibrated()
    quick = "from prunetool import cli; cli.WAIT_SECONDS = 0.1"
    running = start(["score", "--sparsity", ".2"], first=quick, stdin=subprocess.PIPE)
    running.stdin.write(records.read_text()[:-40])
    running.stdin.flush()
    until(lambda: list(tmp_path.glob("dense.work/scores-*/layer-00001.*")), running)
    running.send_signal(signal.SIGTERM)
    assert (running.wait(), running.stderr.read()) == (143, GO_ON)


def wait_until_blocked(process):
    """Return once a process has slept for a while: it is in the call that does not return."""
    states = []

    def blocked():
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        states.append(stat.rpartition(")")[2].split()[0])
        return states[-50:] == 50 * ["S"]

    until(blocked, process)


def test_a_second_signal_ends_a_process_that_cannot_react(script):
    stuck = script(
        "import ctypes; lock = ctypes.create_string_buffer(256); c = ctypes.CDLL(None)\n"
        "with signals.raised(lambda: None):\n"
        "    c.pthread_mutex_lock(lock); print(flush=True); c.pthread_mutex_lock(lock)"
    )
    stuck.stdout.readline()
    wait_until_blocked(stuck)
    stuck.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        stuck.wait(1)
    # Of two that it notices within half a second, as on a busy machine, the second is the first.
    for _ in range(60):
        stuck.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            stuck.wait(1)
            break
    assert stuck.wait(1) == 130


def test_at_once_the_first_signal_ends_a_process_that_cannot_react(script):
    stuck = script(
        "import ctypes; lock = ctypes.create_string_buffer(256); c = ctypes.CDLL(None)\n"
        "with signals.raised(lambda: None), signals.at_once('last words'):\n"
        "    c.pthread_mutex_lock(lock); print(flush=True); c.pthread_mutex_lock(lock)"
    )
    stuck.stdout.readline()
    stuck.send_signal(signal.SIGTERM)
    assert stuck.communicate() == ("", "last words\n")
    assert stuck.returncode == 143


def test_behind_at_once_a_signal_is_raised_again(script):
    raised = script(
        "try:\n"
        "    with signals.raised(lambda: 'during'):\n"
        "        with signals.at_once('last words'): pass\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(600)\n"
        "except signals.Interrupted as e: print(e.number, e.during)"
    )
    assert raised.communicate() == ("2 during\n", "")


def test_two_signals_at_once_are_one(script):
    twice = script(
        "signals.SAME_SECONDS = 600\n"
        "try:\n"
        "    with signals.raised(lambda: None):\n"
        "        try: print(flush=True); time.sleep(600)\n"
        "        finally: os.kill(os.getpid(), signal.SIGINT); time.sleep(1); print('clean')\n"
        "except signals.Interrupted as e: print(e.number)"
    )
    twice.stdout.readline()
    twice.send_signal(signal.SIGTERM)
    assert twice.communicate() == ("clean\n15\n", "")


def test_a_signal_in_a_destructor_is_not_lost(script):
    lost = script(
        "class Thing:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "try:\n"
        "    with signals.raised(lambda: 'during'):\n"
        "        thing = Thing(); del thing; time.sleep(600)\n"
        "except signals.Interrupted as e: print(e.number, e.during)"
    )
    assert lost.communicate() == ("2 during\n", "")


def test_what_is_ignored_stays_ignored_and_others_are_the_systems_again(script):
    program = (
        "with signals.raised(lambda: None):\n"
        "    print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    )
    out, _ = script(program, "nohup").communicate()
    assert out.split() == ["True", "True"]


def test_nobody_reads_the_output_any_more_and_nothing_is_said(slow, start, tmp_path):
    closed = tmp_path / "closed"
    running = start(slow, first=at_layer(1, "while not Path('closed').exists(): time.sleep(.01)"))
    running.stdout.readline()
    running.stdout.close()
    closed.touch()
    assert (running.wait(), running.stderr.read()) == (1, "")
    assert not list(tmp_path.rglob("*.lock"))

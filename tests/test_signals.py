"""Commands that a signal ends, as processes: what they say, leave and exit with."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.test_pipe import contents
from tests.commands.test_resume import start

GO_ON = "Interrupted; run the same command again to go on\n"
ENDING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture
def slow(checkpoint, text):
    """Words of a calibration that computes for a second or more."""
    model = checkpoint(num_hidden_layers=16, hidden_size=128, intermediate_size=512)
    return ["calibrate", model, "--text", text, "--samples", 30, "--sequence-length", 128,
            "--work", "w"]  # fmt: skip


def script(program, *words):
    """A Python program that runs under `signals.raised`; it says when it is ready."""
    begin = "import os, signal, sys, time; from prunetool import signals\n"
    return subprocess.Popen(
        [*words, sys.executable, "-c", begin + program], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_interrupted_while_it_computes_it_leaves_what_a_resume_needs(slow, run, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    running = start(slow, tmp_path / "whole")
    records = running.communicate()[0]
    assert running.returncode == 0

    chance, interrupted = random.Random(0), 0
    for layer, (number, code) in enumerate((*ENDING, *ENDING)):
        running = start(slow, tmp_path / "killed")
        while not list((tmp_path / "killed").glob(f"w/stats/layer-{layer:05d}.*")):
            assert running.poll() is None
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.05))  # somewhere in the next of the 16 layers
        running.send_signal(number)
        _, said = running.communicate()
        if "peak" not in said:  # else it had ended, and only Python was still leaving
            interrupted += 1
            assert (running.returncode, said) == (code, GO_ON)
        left = {path.name for path in (tmp_path / "killed").glob("w*/*")}
        allowed = {"run.json", "weights.json", "stats", "calibrated"}
        assert left - {name for name in left if name.startswith("hidden-")} <= allowed
        assert [path.name for path in (tmp_path / "killed").iterdir()] == ["w"]  # no lock
        assert not list((tmp_path / "killed").rglob(".*"))
    assert interrupted >= 4  # of 6
    last = run(*slow, cwd=tmp_path / "killed").stdout
    assert last == records.replace("/whole/", "/killed/")
    assert contents(tmp_path / "killed/w") == contents(tmp_path / "whole/w")


@pytest.mark.parametrize(("number", "code"), ENDING)
def test_an_evaluation_that_is_ended_removes_its_temporary_stream(slow, tmp_path, number, code):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    running = start(["evaluate", *slow[1:-2]], tmp_path, TMPDIR=str(temporary))
    while not list(temporary.glob("prunetool-*/hidden-0000[1-9]")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    out, said = running.communicate()
    assert (running.returncode, out, said) == (code, "", "Interrupted; nothing is kept\n")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(("number", "code"), ENDING)
def test_a_pipe_that_is_ended_says_it_once(slow, tmp_path, number, code):
    steps = [slow, ["score", "--sparsity", ".2"], ["compensate"], ["export", "out"]]
    line = " | ".join(shlex.join([sys.executable, "-m", "prunetool", *map(str, w)]) for w in steps)
    pipe = subprocess.Popen(
        ["bash", "-c", f"trap : INT TERM HUP; {line}; exit ${{PIPESTATUS[3]}}"], cwd=tmp_path,
        text=True, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not list(tmp_path.glob("w/stats/layer-00003.*")):
        assert pipe.poll() is None
        time.sleep(0.01)
    os.killpg(pipe.pid, number)
    _, said = pipe.communicate()
    assert said.splitlines() == [GO_ON.strip()]
    assert pipe.returncode == code
    assert not list(tmp_path.rglob("*.lock"))


def test_a_step_that_alone_is_ended_says_so_in_the_pipe(calibrated, tmp_path):
    _, records = calibrated()
    with start(["score", "--sparsity", ".2"], tmp_path, stdin=subprocess.PIPE) as running:
        running.stdin.write(records.read_text()[:-40])
        running.stdin.flush()
        while not list(tmp_path.glob("dense.work/scores-*/layer-00001.*")):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        assert (running.wait(), running.stderr.read()) == (143, GO_ON)


def wait_until_blocked(process):
    """Return once a process has slept for a while: it is in the call that does not return."""
    asleep = 0
    for _ in range(1000):
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        if asleep == 20:
            return
        time.sleep(0.02)
    raise AssertionError("it never blocked")


def test_a_second_signal_ends_a_process_that_cannot_react(tmp_path):
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
    stuck.send_signal(signal.SIGINT)
    assert stuck.wait(10) == 130
    stuck.communicate()


def test_at_once_the_first_signal_ends_a_process_that_cannot_react():
    stuck = script(
        "import ctypes; lock = ctypes.create_string_buffer(256); c = ctypes.CDLL(None)\n"
        "with signals.raised(lambda: None), signals.at_once('last words'):\n"
        "    c.pthread_mutex_lock(lock); print(flush=True); c.pthread_mutex_lock(lock)"
    )
    stuck.stdout.readline()
    stuck.send_signal(signal.SIGTERM)
    assert stuck.communicate(timeout=10) == ("", "last words\n")
    assert stuck.returncode == 143


def test_behind_at_once_a_signal_is_raised_again():
    raised = script(
        "try:\n"
        "    with signals.raised(lambda: 'during'):\n"
        "        with signals.at_once('last words'): pass\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
        "except signals.Interrupted as e: print(e.number, e.during)"
    )
    assert raised.communicate(timeout=20) == ("2 during\n", "")


def test_two_signals_at_once_are_one(tmp_path):
    twice = script(
        "try:\n"
        "    with signals.raised(lambda: None):\n"
        "        try: print(flush=True); time.sleep(60)\n"
        "        finally: os.kill(os.getpid(), signal.SIGINT); time.sleep(1); print('clean')\n"
        "except signals.Interrupted as e: print(e.number)"
    )
    twice.stdout.readline()
    twice.send_signal(signal.SIGTERM)
    assert twice.communicate() == ("clean\n15\n", "")


def test_a_signal_in_a_destructor_is_not_lost():
    lost = script(
        "class Thing:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "try:\n"
        "    with signals.raised(lambda: 'during'):\n"
        "        thing = Thing(); del thing; time.sleep(30)\n"
        "except signals.Interrupted as e: print(e.number, e.during)"
    )
    assert lost.communicate(timeout=20) == ("2 during\n", "")


def test_what_is_ignored_stays_ignored_and_others_are_the_systems_again():
    program = (
        "with signals.raised(lambda: None):\n"
        "    print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    )
    out, _ = script(program, "nohup").communicate()
    assert out.split() == ["True", "True"]


def test_nobody_reads_the_output_any_more_and_nothing_is_said(slow, tmp_path):
    with start(slow, tmp_path) as running:
        running.stdout.readline()
        running.stdout.close()
        assert (running.wait(), running.stderr.read()) == (1, "")
    assert not list(tmp_path.rglob("*.lock"))

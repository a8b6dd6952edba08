"""Runs that are killed, run again, and run twice at once."""

import gzip
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from prunetool import cli, console, records, streaming, workdir
from prunetool.workdir import load
from tests.commands.test_pipe import contents
from tests.conftest import STAND, at_layer, command, error_of, until

KILLS = int(os.environ.get("PRUNETOOL_KILLS", "8"))


def commands(model, text):
    return [
        ["calibrate", model, "--text", text, "--samples", 8, "--sequence-length", 64,
         "--held-out", 2, "--first-tokens", 64, "--attention-samples", 2, "--stats", "all",
         "--work", "w", "-o", "a.jsonl"],
        ["score", "--target", "qk", "--method", "attention-diag", "--sparsity", ".5", "a.jsonl",
         "-o", "b.jsonl"],
        ["score", "--sparsity", ".2", "--multiple-of", 8, "--min-channels", 8, "b.jsonl",
         "-o", "c.jsonl"],
        ["compensate", "c.jsonl", "-o", "d.jsonl"],
        ["export", "out", "d.jsonl"],
    ]  # fmt: skip


def stamps(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("layer-*.safetensors")}


# Counts what a process changes in its directory, and kills it before the change of this number.
COUNT = """
import os, signal
changes = 0
def count(event, arguments):
    global changes
    opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if opened or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        path = arguments[0]
        if not isinstance(path, int) and os.path.abspath(path).startswith(os.getcwd()):
            changes += 1
            if changes == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
import sys; sys.addaudithook(count)
"""
COUNTED = "import atexit; atexit.register(lambda: print(changes, file=sys.stderr))"


def test_killed_at_any_moment_and_run_again_it_ends_in_the_same_bytes(
    checkpoint, text, start, call, tmp_path
):
    model = checkpoint(num_hidden_layers=6)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    changes = []
    for words in commands(model, text):
        done = start(words, whole, first=COUNT.format(number=0) + COUNTED)
        _, said = done.communicate()
        assert done.returncode == 0, said
        changes.append(int(said.splitlines()[-1]))

    chance, redone = random.Random(0), []
    moments = [chance.choice(range(5)) for _ in range(KILLS)]
    for step, words in enumerate(commands(model, text)):
        kills = moments.count(step)
        for _ in range(kills):
            before = stamps(killed)
            # Not more than its share, so that there is something left for each of them.
            number = chance.randint(1, changes[step] // (kills + 1))
            running = start(words, killed, first=COUNT.format(number=number))
            _, said = running.communicate()
            assert running.returncode == -signal.SIGKILL, said
            now = stamps(killed)
            redone += [path for path, stamp in before.items() if now.get(path) != stamp]
        before = stamps(killed)
        call(*words, cwd=killed)
        now = stamps(killed)
        redone += [path for path, stamp in before.items() if now.get(path) != stamp]
    print(f"{KILLS} runs killed, {len(redone)} files made twice")
    assert len(redone) <= 3 * KILLS, "a run makes the files of at most one layer again"
    for part in ("w", "out"):
        assert contents(killed / part) == contents(whole / part)


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(
    checkpoint, text, run, start, tmp_path
):
    words = commands(checkpoint(), text)[0]
    first = start(words, first=at_layer(1, STAND))
    until(lambda: list(tmp_path.glob("w/stats/layer-00000.*")), first)
    line = error_of(run(*words, ok=False))
    assert f"w: is being written by process {first.pid}; wait for it, or stop it (if" in line
    first.kill()
    first.wait()
    said = run(*words).stderr
    assert f"process {first.pid}, which wrote it, is gone; continuing" in said
    assert not list(tmp_path.rglob("*.lock"))


def test_an_evaluation_that_failed_goes_on(checkpoint, text, run, tmp_path, monkeypatch):
    words = ["evaluate", checkpoint(num_hidden_layers=6), "--text", text, "--samples", 8,
             "--sequence-length", 64]  # fmt: skip
    expected = run(*words).stdout
    check = streaming.check_finite

    def fail(h, layer):
        check(h, layer)
        if layer == 3:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "check_finite", fail)
        patch.chdir(tmp_path)
        failing = [str(word) for word in [*words, "--work", "w"]]
        with pytest.raises(MemoryError):
            cli.group.main(failing, standalone_mode=False)
    assert [path.name for path in (tmp_path / "w").glob("hidden-*")] == ["hidden-00003"]
    refused = {
        "--sequence-length was 64 and is 32": [*words[:-1], 32],
        "the tensors of the checkpoint are not the same": [
            words[0],
            checkpoint("other", num_hidden_layers=6, seed=1),
            *words[2:],
        ],
    }
    for what, others in refused.items():
        assert f"holds another run: {what}" in error_of(run(*others, "--work", "w", ok=False))
    other = run("calibrate", *words[1:], "--work", "w", "--overwrite", ok=False)
    assert "w: holds a run of evaluate; give another --work" in error_of(other)
    (tmp_path / "w/hidden-00002").write_bytes(b"not read: the last stream counts")
    (tmp_path / "w/.hidden-00004.partial").write_bytes(b"nor this")
    (tmp_path / "link").symlink_to(tmp_path / "w")
    assert run(*words, "--work", "link").stdout == expected
    assert not list((tmp_path / "w").iterdir())
    for wrong in (["--work", "w", "--against", words[1]], ["--overwrite"]):
        assert "--work" in run(*words, *wrong, ok=False).stderr.splitlines()[-1]


def test_two_sparsities_at_once_share_their_scores(calibrated, start, tmp_path):
    _, records = calibrated()
    words = ["score", "--method", "wanda-sp", "--multiple-of", 4, "--sparsity"]
    both = [start([*words, s], stdin=subprocess.PIPE) for s in (".2", ".3")]
    for line in records.read_text().splitlines(keepends=True):
        for process in both:
            process.stdin.write(line)
            process.stdin.flush()
    for process in both:
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert "is gone" not in said
    (scores,) = (tmp_path / "dense.work").glob("scores-*")
    assert len(list(scores.iterdir())) == 3
    assert len(list((tmp_path / "dense.work").glob("score-*"))) == 2
    assert not list(tmp_path.rglob("*.lock"))


def test_a_score_waits_for_a_layer_that_another_makes(calibrated, call, tmp_path, monkeypatch):
    _, records = calibrated()
    words = [
        "score",
        "--method",
        "wanda-sp",
        "--allocation",
        "global",
        "--multiple-of",
        32,
        records,
        "--sparsity",
    ]
    call(*words, ".2")
    (made,) = (tmp_path / "dense.work").glob("scores-*/layer-00001.*")
    made.unlink()
    other = workdir.lock(made)
    other.__enter__()
    said = []

    def warning(line, *arguments):
        said.append(line % arguments)
        assert not made.exists()
        other.__exit__(None, None, None)

    monkeypatch.setattr(workdir, "SILENT_SECONDS", 0)
    monkeypatch.setattr(console.log, "warning", warning)
    call(*words, ".3")
    assert [line.partition(";")[0] for line in said] == [
        f"{made}: still being written by process {os.getpid()}"
    ]
    assert made.exists()


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_who_waits_for_a_lock_gets_it(popen, tmp_path, monkeypatch, end):
    program = (
        "import sys; from pathlib import Path; from prunetool.workdir import lock\n"
        "with lock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, tmp_path / "x"]
    holder = popen(words, stdin=subprocess.PIPE)
    holder.stdout.readline()
    said = []

    def warning(line, *arguments):
        said.append(line % arguments)
        if end == "is killed":
            holder.kill()
        holder.communicate()  # ends it; a process that nobody waited for is not gone

    monkeypatch.setattr(workdir, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(console.log, "warning", warning)
    with workdir.lock(tmp_path / "x", wait=True):
        assert f"still being written by process {holder.pid}; wait for it, or" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_lock_given_back_meanwhile_was_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(
        workdir.SoftFileLock, "pid", os.getppid()
    )  # as read before it was given back
    monkeypatch.setattr(console.log, "warning", pytest.fail)
    with workdir.lock(tmp_path / "x"):
        pass


def test_an_export_that_failed_half_way_goes_on(checkpoint, text, run, tmp_path):
    for words in commands(checkpoint(num_hidden_layers=4), text)[:4]:
        run(*words)
    size = ["--max-shard-size", "100KB"]  # a layer's
    run("export", "whole", "d.jsonl", *size)
    (refit,) = tmp_path.glob("w/compensate-*/layer-00002.safetensors")
    refit.rename(tmp_path / "aside")
    assert "run the step that made it again" in error_of(
        run("export", "out", "d.jsonl", *size, ok=False)
    )
    (tmp_path / "aside").rename(refit)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/model-*")}
    assert len(made) == 3, "the embedding and two layers"
    assert "is not empty" in error_of(run("export", "out", "b.jsonl", *size, ok=False))
    run("export", "out", "d.jsonl", *size)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "out already has it" in run("export", "out", "d.jsonl", *size).stderr
    for others in (["b.jsonl", *size], ["d.jsonl"]):
        assert "is not empty" in error_of(run("export", "out", *others, ok=False))


# Kills the steps of a pipe as the last one puts its second shard in its place.
KILL_ALL = """
import os, signal, sys
def kill(event, arguments):
    if event == "os.rename" and "/model-00002" in str(arguments[1]):
        os.killpg(0, signal.SIGKILL)
sys.addaudithook(kill)
"""


def test_what_is_read_last_can_be_discarded(checkpoint, text, run, popen, tmp_path):
    calibrate, _, _, _, _ = commands(checkpoint(), text)
    run(*calibrate)
    work = tmp_path / "w"
    for name, discard in (("kept", []), ("gone", ["--discard"])):
        run("score", "--sparsity", ".2", "--multiple-of", 8, "a.jsonl", "-o", "b.jsonl")
        run("compensate", *discard, "--damping", "auto" if discard else "0.01,1", "b.jsonl",
            "-o", "c.jsonl")  # fmt: skip
        run("export", name, "c.jsonl", "--max-shard-size", "100KB")
    assert not list(work.glob("stats/layer-*"))
    # The same without files of the run before, and killed on its way.
    shutil.rmtree(work)
    words = commands(checkpoint(), text)[0]
    pipe = [
        [*words[:-2]],
        ["score", "--sparsity", ".2", "--multiple-of", "8"],
        ["compensate", "--discard"],
        ["export", "again", "--max-shard-size", "100KB"],
    ]
    *before, export = map(command, pipe)
    for last, code in ((command(pipe[-1], KILL_ALL), -signal.SIGKILL), (export, 0)):
        line = " | ".join(map(shlex.join, [*before, last]))
        running = popen(["sh", "-c", line], cwd=tmp_path, start_new_session=True)
        _, said = running.communicate()
        assert running.returncode == code, said
    assert contents(tmp_path / "again") == contents(tmp_path / "gone")
    assert not list(work.glob("stats/layer-*"))
    # The steps before still give their records, and what needs the stats says where they went.
    assert run(*calibrate[:-2]).stdout == (tmp_path / "a.jsonl").read_text()
    run("score", "--sparsity", ".2", "--multiple-of", 8, "a.jsonl")
    line = error_of(run("score", "--sparsity", ".3", "a.jsonl", ok=False))
    assert "if discarded, delete the work directory and calibrate again" in line


def test_stats_can_be_stored_in_float64(checkpoint, text, run, tmp_path):
    model = checkpoint()
    sums = {}
    for dtype in ("float32", "float64"):
        work = tmp_path / dtype
        run("calibrate", model, "--text", text, "--samples", 4, "--sequence-length", 32,
            "--stats-dtype", dtype, "--work", work, "-o", "a.jsonl")  # fmt: skip
        sums[dtype] = load(work, "stats/layer-00001.stats.safetensors")
    single, double = sums.values()
    assert single["down.gram"].dtype == np.float32
    assert double["down.gram"].dtype == np.float64
    for name, array in single.items():
        np.testing.assert_array_equal(array, double[name].astype(array.dtype))


def test_a_profile_has_a_trace_and_the_seconds(checkpoint, text, run, tmp_path):
    words = commands(checkpoint(), text)
    run(*words[0], "--profile", "calibrate.json.gz")
    run("score", "--sparsity", ".2", "--multiple-of", 8, "a.jsonl", "-o", "b.jsonl",
        "--profile", "score.json.gz")  # fmt: skip
    run("compensate", "b.jsonl", "-o", "c.jsonl", "--profile", "compensate.json.gz")
    with (tmp_path / "c.jsonl").open() as stream:
        _, layers = records.read(stream)
        seconds = [layer.values["seconds"] for layer in layers]
    assert seconds[1].keys() == {"calibrate", "gradients", "score", "compensate"}
    assert all(0 < sum(phases.values()) < 100 for phases in seconds[1].values())
    for step in ("calibrate", "score", "compensate"):
        trace = json.loads(gzip.decompress((tmp_path / f"{step}.json.gz").read_bytes()))
        assert trace["traceEvents"]


@pytest.mark.parametrize("step", ["calibrate", "score", "compensate", "export"])
def test_each_step_refuses_at_once_when_the_disk_is_short(checkpoint, text, run, tmp_path, step):
    model = checkpoint()
    words = commands(model, text)
    order = ["calibrate", "score", "compensate", "export"]
    given = dict(zip(order, [words[0], words[2], words[3], words[4]], strict=True))
    given["score"] = [*words[2][:-3], "a.jsonl", "-o", "c.jsonl"]
    for before in order[: order.index(step)]:
        run(*given[before])
    full = (
        "import shutil, sys; real = shutil.disk_usage;"
        "shutil.disk_usage = lambda path: real(path)._replace(free=1000);"
        "sys.argv = ['prunetool', *sys.argv[1:]]; from prunetool.cli import main; main()"
    )
    there = contents(tmp_path / "w") if step != "calibrate" else {}
    done = subprocess.run(
        [sys.executable, "-c", full, *map(str, given[step])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "GB of disk and 0.00 GB are free; make room" in error_of(done)
    if step != "calibrate":
        assert contents(tmp_path / "w") == there


def stream(path, samples=3):
    return streaming.HiddenStates(path, 2, samples, 4)


def written_stream(path, samples=3):
    made = stream(path, samples)
    with made.writing() as write:
        write(range(samples), np.arange(2.0 * samples * 4, dtype=np.float32).reshape(2, samples, 4))
    return made


def test_a_restart_leaves_neither_an_old_stream_nor_the_mark_of_a_whole_run(
    checkpoint, text, call, tmp_path, monkeypatch
):
    words = commands(checkpoint(num_hidden_layers=4), text)[0]

    def failing_at(number):
        def check(h, layer):
            if layer == number:
                raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(streaming, "check_finite", check)
            with pytest.raises(MemoryError):
                call(*words)
        return sorted(path.name for path in (tmp_path / "w").iterdir())

    streams = ["hidden-00001", "residual-00000", "residual-00001"]
    files = [*streams, "run.json", "stats", "tokens.safetensors", "weights.json"]
    assert failing_at(1) == files
    shutil.copy(tmp_path / "w/hidden-00001", tmp_path / "w/hidden-00000")
    assert failing_at(1) == files, "the stream before the one to resume from is of no use"
    call(*words)
    assert (tmp_path / "w/calibrated").exists()
    (tmp_path / "w/stats/layer-00003.stats.safetensors").write_bytes(b"damaged")
    assert failing_at(1) == files, "half a run must not pass for a whole one"


def test_only_the_stream_to_resume_from_is_kept(tmp_path):
    for name in ("hidden-00001", "hidden-00002", "hidden-00002.0of2", "hidden-00003"):
        written_stream(tmp_path / name)

    def before(layer, suffix=""):
        return stream(streaming.path_before(tmp_path, layer, suffix))

    assert streaming.layers_done(before, 5) == 3
    assert streaming.layers_done(before, 2) == 2, "a stray one beyond the last layer does not count"
    streaming.keep_only(streaming.path_before(tmp_path, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden-00002", "hidden-00002.0of2"]
    assert streaming.layers_done(lambda n: before(n, ".0of2"), 5) == 2


@pytest.mark.parametrize("damage", ["short", "long", "flipped", "of fewer samples", "a link"])
def test_a_stream_that_is_not_as_it_was_written_is_not_resumed_from(tmp_path, damage):
    written_stream(tmp_path / "hidden-00001")
    path = tmp_path / "hidden-00002"
    written_stream(path, 2 if damage == "of fewer samples" else 3)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[17] ^= 1
    path.write_bytes({"short": data[:-1], "long": data + b"x"}.get(damage, data))
    if damage == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert streaming.layers_done(lambda n: stream(tmp_path / f"hidden-{n:05d}"), 5) == 1

"""What people see: tables and bars, and pipes of real processes on a terminal of their own."""

import fcntl
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest

from prunetool import console
from tests.conftest import DIE, at_layer, command, until

STYLES = re.compile(r"\x1b\[[\d;]*m")
BAR = re.compile(r"\r(\w+): ([^\r\x1b]*)\x1b\[K")
COLUMNS = 80


@pytest.fixture
def terminal():
    """Start a command with stderr on one new terminal; ``said()`` ends it, and gives all of it."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, COLUMNS, 0, 0))
    read: list[bytes] = []

    def collect():
        try:
            while data := os.read(master, 4096):
                read.append(data)
        except OSError:  # nobody has the terminal open any more
            pass

    thread = threading.Thread(target=collect)
    thread.start()
    running = []

    def start(words, **how):
        environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", **how.pop("env", {})}
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **how}
        running.append(subprocess.Popen(words, stderr=slave, env=environment, text=True, **how))
        return running[-1]

    def shows(what):
        until(lambda: what.encode() in b"".join(read), running[-1])

    def said():
        for process in running:
            process.wait()
        if thread.is_alive():
            os.close(slave)
            thread.join()
        return STYLES.sub("", b"".join(read).decode()).replace("\r\n", "\n")

    start.shows, start.said = shows, said
    yield start
    for process in running:
        with process:
            process.kill()
    said()
    os.close(master)


def python(program):
    begin = "import sys\nfrom prunetool import console\n"
    return [sys.executable, "-c", begin + program]


def shown(said):
    """The lines that stay: of each what follows the last return to its beginning."""
    return [re.sub(r".*\r", "", line).replace("\x1b[K", "") for line in said.split("\n")]


def steps_of(said):
    """The steps whose bars were drawn, one after the other."""
    names = [name for name, _ in BAR.findall(said)]
    return [name for i, name in enumerate(names) if names[i - 1 : i] != [name]]


def pipe(*steps):
    return " | ".join(shlex.join(command(words)) for words in steps)


ROWS = [[i, "x", 7 * i % 30] for i in range(30)]


class TestTable:
    def lines(self, capsys, rows, verbosity=0, **how):
        console.setup_logging(verbosity)
        console.table("title", ["layer", "name", "number"], rows, **how)
        title, _, _, _, *lines, _ = capsys.readouterr().err.splitlines()
        return title, [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]

    def test_it_shows_the_rows_that_matter_in_their_order(self, capsys):
        title, rows = self.lines(capsys, ROWS, by=[row[2] for row in ROWS])
        assert title == "title; the 12 largest of 30 rows, all with -v"
        assert sorted(int(row[2]) for row in rows) == list(range(18, 30))
        assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)

    def test_without_a_number_it_shows_the_first_and_the_last_ones(self, capsys):
        title, rows = self.lines(capsys, ROWS)
        assert title == "title"
        assert len(rows) == console.ROWS
        assert [row[0] for row in rows] == [*"012345", "…", *map(str, range(25, 30))]

    def test_neighbours_that_are_alike_are_one_row(self, capsys):
        rows = [[i, "x", i == 7] for i in range(30)]
        _, rows = self.lines(capsys, rows)
        assert rows == [["0-6", "x", "False"], ["7", "x", "True"], ["8-29", "x", "False"]]

    def test_verbose_it_shows_all_and_quiet_none(self, capsys):
        for how in ({}, {"by": [0] * 30}):
            title, rows = self.lines(capsys, ROWS, verbosity=1, **how)
            assert (title, rows) == ("title", [[str(cell) for cell in row] for row in ROWS])
        console.setup_logging(-1)
        console.table("title", ["layer"], [[1]])
        assert capsys.readouterr().err == ""

    def test_nothing_is_wider_than_80_columns_and_nothing_is_lost(self, capsys):
        console.setup_logging(0)
        console.table("word " * 30, ["name", "other"], [["x" * 90, "y" * 60]])
        lines = capsys.readouterr().err.splitlines()
        assert max(map(len, lines)) == COLUMNS
        assert [sum(line.count(letter) for line in lines) for letter in "xy"] == [90, 60]


class TestBar:
    @pytest.fixture
    def step(self, monkeypatch):
        """A step and its clock, ``clock[0]``, seconds."""
        clock = [100.0]
        monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
        with console.step("score", waiting=False):
            yield clock, console._step
        monkeypatch.undo()

    def test_it_moves_within_a_layer_and_says_what_is_left(self, step):
        clock, now = step
        assert now.line(77) == "score: starting 00:00"
        layers = console.progress("abcd", 4)
        next(layers)
        clock[0] += 30  # compiling: no measure of the others
        console.within(1, 2, "matrix")
        assert now.line(77).startswith("score: layer 1/4, matrix 2/2  12% |")
        assert now.line(77).endswith("| 00:30")
        clock[0] += 2
        next(layers)
        assert now.line(77).startswith("score: layer 2/4  25% |")
        assert now.line(77).endswith("| 00:32, 00:12 left")
        clock[0] += 1
        assert now.line(77).endswith("| 00:33, 00:11 left")
        assert len(now.line(77)) == 77
        assert len(now.line(30)) <= 30

    def test_waiting_is_no_work(self, step, caplog):
        clock, now = step
        console.progress("abcd", 4)
        clock[0] += 2
        with console.waiting():
            clock[0] += 40
            assert now.worked() == 2
        clock[0] += 1
        assert (now.worked(), now.waited) == (3, 40)

    def test_the_summary_says_both_where_there_was_waiting(self, step, capsys):
        clock, _ = step
        console.setup_logging(0)
        clock[0] += 12.3
        with console.summary("score") as said:
            said.append("done")
        assert capsys.readouterr().err.startswith("score: done, 12.3 s, peak ")
        with console.waiting():
            clock[0] += 40.1
        with console.summary("score"):
            pass
        expected = "score: 12.3 s working, 40.1 s waiting on input, peak "
        assert capsys.readouterr().err.startswith(expected)

    @pytest.mark.parametrize("terminal", [True, False])
    def test_on_a_terminal_the_summary_is_folded_between_its_parts(
        self, step, capsys, monkeypatch, terminal
    ):
        monkeypatch.setattr(console, "_on_terminal", lambda: terminal)
        console.setup_logging(0)
        parts = ["removes 21,252,096 of 106,168,320 layer parameters (20.0%)", "15.8% of all"]
        with console.summary("score") as said:
            said += parts
        lines = capsys.readouterr().err.removeprefix(console.CLEAR).splitlines()
        joined = " ".join(line.strip() for line in lines)
        assert joined.startswith(f"score: {parts[0]}, {parts[1]}, 0.0 s, peak ")
        assert len(lines) == (2 if terminal else 1)
        if terminal:
            assert max(map(len, lines)) <= COLUMNS


# A step that looks whether its bar may be shown, and again after each line it is given.
WORKS = """
console.setup_logging({verbosity})
with console.step({name!r}, waiting=False):
    console.doing('looking')
    for line in sys.stdin:
        console.doing('looking again')
        print('looked', flush=True)
    console.log.info('{name} is done')
"""
# One that has the bar until it is given a line, and waits from then on.
WAITS = """
console.setup_logging(0)
with console.step('waits', waiting=False):
    console.doing('looking')
    sys.stdin.readline()
    with console.waiting(): sys.stdin.read()
"""
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def works(name, verbosity=0):
    return python(WORKS.format(name=name, verbosity=verbosity))


def look(process):
    """Have a process of `WORKS` look, and wait until it has."""
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "looked\n"


class TestTerminal:
    def test_one_step_at_a_time_has_the_bar(self, terminal):
        first = terminal(works("first"), **PIPES)
        look(first)
        second = terminal(works("second"), **PIPES)
        look(second)
        look(first)  # had the second drawn its bar, this would draw the first one's once more
        first.communicate()
        look(second)
        second.communicate()
        said = terminal.said()
        assert steps_of(said) == ["first", "second"]
        assert [line for line in shown(said) if line] == ["first is done", "second is done"]

    def test_a_step_that_waits_gives_the_bar_away_and_a_killed_one_too(self, terminal):
        waiting = terminal(python(WAITS), **PIPES)
        terminal.shows("waits: looking")
        working = terminal(works("works"), **PIPES)
        look(working)
        waiting.stdin.write("\n")
        waiting.stdin.flush()
        terminal.shows("works: looking")
        working.kill()
        last = terminal(works("last"), **PIPES)
        terminal.shows("last: looking")
        last.kill()
        waiting.kill()
        assert steps_of(terminal.said()) == ["waits", "works", "last"]

    def test_quiet_or_dumb_or_elsewhere_there_is_no_bar(self, terminal):
        for process in (
            terminal(works("a", verbosity=-1), **PIPES),
            terminal(works("a"), env={"TERM": "dumb"}, **PIPES),
        ):
            look(process)
            process.communicate()
        assert terminal.said() == "a is done\n"
        done = subprocess.run(works("a"), capture_output=True, input="\n", text=True)
        assert done.stderr == "a is done\n"


PRUNE = [["score", "--sparsity", ".2", "--multiple-of", 8], ["compensate"], ["export", "out"]]


class TestPipe:
    @pytest.fixture
    def calibrate(self, checkpoint, text):
        model = checkpoint(num_hidden_layers=16)
        return ["calibrate", model, "--text", text, "--samples", 8, "--sequence-length", 64,
                "--work", "w"]  # fmt: skip

    def test_on_a_terminal_every_line_is_whole(self, calibrate, terminal, tmp_path):
        score, compensate, export = PRUNE
        steps = calibrate, score, [*compensate, "-v"], export
        terminal(["sh", "-c", pipe(*steps)], cwd=tmp_path)
        said = terminal.said()
        assert steps_of(said)[:1] == ["calibrate"], said
        warning = re.compile(
            r"layer .*: no damping lowered the held-out|\d+ tokens are few: |export pads layers "
        )
        lines = [line for line in shown(said) if line and not warning.match(line)]
        *lines, load, measure, report, llama_cpp, upload, clean = lines
        assert llama_cpp == "Take it to llama.cpp: prunetool convert out out.gguf"
        assert "from_pretrained" in load
        for line, name in {
            measure: "evaluate",
            report: "report",
            upload: "upload",
            clean: "clean",
        }.items():
            assert f": prunetool {name} out" in line
        assert max(map(len, (line for line in lines if not line[0].isascii()))) <= COLUMNS
        text = "".join(f"{line}\n" for line in lines)
        more = r"(?:  .*\n)*"  # a summary is folded
        row = r"│ +\d+ │ .* │"
        table = rf"[^│\n]+\n┏[━┳]+┓\n┃.*┃\n┡[━╇]+┩\n(?:{row}\n)+└[─┴]+┘\n"
        found = re.fullmatch(
            rf"(calibrate: .*\n{more})({table})score: .*\n{more}({table})(compensate: .*\n{more})"
            rf"(export: .*\n{more})",
            text,
        )
        assert found, text
        _, of_score, of_refits, *last_two = found.groups()
        counts = [len(re.findall(row, table)) for table in (of_score, of_refits)]
        assert counts == [console.ROWS, 32]
        times = r", \d+\.\d s working, \d+\.\d s waiting on input, peak \d+ MB"
        for summary in last_two:
            assert re.search(times, summary.replace("\n ", ""))
        assert " working" not in found[1]

    @pytest.mark.parametrize(
        ("at", "words", "says"),
        [
            (0, ["--text", "absent"], "Error: absent: cannot be read (No such file"),
            (0, ["--samples", 0], "Error: Invalid value for '--samples'"),
            (1, ["--sparsity", 0.999], "Error: --sparsity: "),
        ],
        ids=["before its header", "by its command line", "behind another"],
    )
    def test_steps_behind_a_failed_one_are_silent(
        self, calibrate, terminal, tmp_path, at, words, says
    ):
        steps = [calibrate, *PRUNE]
        steps[at] = [*steps[at], *words]
        shell = terminal(["bash", "-c", f"{pipe(*steps)}; exit ${{PIPESTATUS[3]}}"], cwd=tmp_path)
        lines = [line for line in shown(terminal.said()) if line]
        assert shell.returncode == 1
        assert [line for line in lines if line.startswith("Error")] == lines[-1:]
        assert lines[-1].startswith(says)
        assert all(re.match("Usage|Try", line) for line in lines[:-1])
        assert not (tmp_path / "out").exists()

    def test_of_a_killed_step_only_the_next_one_speaks(self, calibrate, terminal, tmp_path):
        record, end = os.pipe()
        killed = terminal(command(calibrate, at_layer(2, DIE)), cwd=tmp_path, stdout=end)
        shell = terminal(
            ["bash", "-c", f"{pipe(*PRUNE)}; exit ${{PIPESTATUS[2]}}"], cwd=tmp_path, stdin=record
        )
        os.close(record)
        os.close(end)
        said = terminal.said()
        assert shell.returncode == 1
        lines = [line for line in shown(said) if "Error" in line]
        assert len(lines) == 1
        assert killed.returncode == -signal.SIGKILL
        assert "Error: <stdin>: cut off after 0 of 16 layers; " in lines[0]

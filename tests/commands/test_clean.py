"""What a finished run leaves: records, which report finds, and work files, which clean deletes."""

import json
from pathlib import Path

import pytest

from prunetool import workdir
from prunetool.checkpoint import checksum
from prunetool.errors import WorkError


@pytest.fixture
def finished(checkpoint, text, call, tmp_path):
    """A pruned checkpoint, and its work directory."""
    words = ["--samples", 4, "--sequence-length", 16, "--work", "w", "-o", "a.jsonl"]
    call("calibrate", checkpoint(), "--text", text, *words)
    call("score", "--sparsity", ".3", "a.jsonl", "-o", "b.jsonl")
    call("compensate", "b.jsonl", "-o", "c.jsonl")
    call("export", "out", "c.jsonl")
    return tmp_path / "out", tmp_path / "w"


def test_records_are_kept_and_report_finds_them(finished, call, tmp_path):
    out, work = finished
    kept = {path.parent.name.split("-")[0]: path for path in work.glob("*/records.jsonl")}
    for step, name in {"stats": "a.jsonl", "score": "b.jsonl", "compensate": "c.jsonl"}.items():
        assert kept.pop(step).read_text() == (tmp_path / name).read_text()
    assert not kept
    page = call("report", "c.jsonl", "-o", "-")
    assert call("report", out, "-o", "-") == page
    assert call("report", work, "-o", "-") == page
    call("score", "a.jsonl", "--sparsity", ".4", "--method", "random", "-o", "later.jsonl")
    assert call("report", work, "-o", "-") != page
    assert call("report", out, "-o", "-") == page, "of OUT, not of what came last"


def test_a_step_that_fails_keeps_no_records(checkpoint, text, call, tmp_path):
    words = ["--samples", 4, "--sequence-length", 16, "--work", "w", "-o", "a.jsonl"]
    call("calibrate", checkpoint(), "--text", text, *words)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(Exception, match="cut off"):
        call("score", "--sparsity", ".3", "cut.jsonl", "-o", "b.jsonl")
    with pytest.raises(WorkError, match="w: has no records of score or compensate; run score"):
        call("report", "w")


def test_clean_deletes_what_the_steps_made_and_nothing_else(finished, call, tmp_path):
    out, work = finished
    (work / "notes.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    call("clean", out)
    assert [path.name for path in work.iterdir()] == ["notes.md"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for words in (["clean", out], ["report", out]):
        with pytest.raises(WorkError, match=r"out: its work directory /.*/w is gone; a report or"):
            call(*words)


def test_clean_takes_the_work_directory_itself(finished, call, run, tmp_path):
    out, work = finished
    call("clean", work)
    assert not work.exists()
    assert f"{work} is gone already" in run("clean", out).stderr
    assert not (tmp_path / "w.lock").exists()


def test_clean_refuses_what_is_not_its_own(finished, call, checkpoint, tmp_path):
    out, work = finished
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.json").write_text('{"a": 1}')
    for place in (tmp_path / "mine", checkpoint("other"), tmp_path / "nowhere"):
        with pytest.raises(WorkError, match="is neither a work directory nor a checkpoint that"):
            call("clean", place)
    manifest = json.loads((out / ".prunetool.json").read_text()) | {"work": str(tmp_path / "mine")}
    del manifest["checksum"]
    (out / ".prunetool.json").write_text(json.dumps(checksum.sealed(manifest)))
    with pytest.raises(WorkError, match=r"out: its work directory /.*/mine is gone; a"):
        call("clean", out)
    assert (tmp_path / "mine/run.json").exists()
    with workdir.lock(work / "score-0123456789ab"), pytest.raises(WorkError, match="being written"):
        call("clean", work)
    assert (work / "run.json").exists()


def test_a_finished_export_says_what_next(finished, run):
    _, work = finished
    size = workdir.size_bytes(work, *workdir.EVERYTHING) / 1e6
    lines = run("export", "out", "c.jsonl").stderr.splitlines()
    assert [line.split(": ", 1)[1] for line in lines[-6:]] == [
        "AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)",
        "prunetool evaluate out --text OTHER.txt",
        "prunetool report out",
        "prunetool convert out out.gguf",
        "prunetool upload out OWNER/NAME",
        "prunetool clean out",
    ]
    assert lines[-1].startswith(f"Delete {size:,.1f} MB of work files")


def test_the_size_leaves_out_what_another_step_deletes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "recover-1").mkdir()
    for name in ("a", ".b", "recover-1/stays", "recover-1/goes"):
        (tmp_path / name).write_bytes(b"12345")
    is_file = Path.is_file

    def seen(path):
        found = is_file(path)
        if path.name == "goes":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", seen)
    assert workdir.size_bytes(tmp_path, *workdir.EVERYTHING) == 15
    assert not (tmp_path / "recover-1/goes").exists()

"""Files of the user, damaged files of its own, and streams and checkpoints not to trust."""

import gc
import json
import os
import shutil
import stat
import sys
from contextlib import suppress

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard
from safetensors.numpy import load_file, save_file

from prunetool import records, workdir
from prunetool.card import model_card, published
from prunetool.checkpoint import checksum, writer
from prunetool.errors import CheckpointError, RecordError, WorkError, plain
from prunetool.model import open_model
from prunetool.steps.export import companions
from tests.commands.test_pipe import contents
from tests.conftest import write_chunks

FLIPS = 24


def calibration(model, text, *more):
    return ["calibrate", model, "--text", text, "--samples", 4, "--sequence-length", 16,
            "--held-out", 1, "--work", "w", "-o", "a.jsonl", *more]  # fmt: skip


@pytest.fixture
def pruned(checkpoint, text, call):
    """A calibration in ``w``, and the records up to ``c.jsonl``, which is ready to export."""
    model = checkpoint()
    call(*calibration(model, text))
    call("score", "--sparsity", ".3", "--multiple-of", 8, "a.jsonl", "-o", "b.jsonl")
    call("compensate", "b.jsonl", "-o", "c.jsonl")
    return model


def changed(path, to, **fields):
    """Write a stream again with other fields in its header."""
    header, *rest = path.read_text().splitlines(keepends=True)
    to.write_text(json.dumps({**json.loads(header), **fields}) + "\n" + "".join(rest))
    return to


class TestDamage:
    def test_every_flipped_byte_of_a_stats_file_is_found_or_harmless(self, pruned, call, tmp_path):
        path = tmp_path / "w/stats/layer-00001.stats.safetensors"
        whole = path.read_bytes()
        expected = load_file(path)
        random = np.random.default_rng(0)
        places = [*random.integers(0, len(whole), FLIPS), *random.integers(0, 900, FLIPS)]
        said = []
        for place in map(int, places):
            data = bytearray(whole)
            data[place] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
            try:
                arrays = workdir.load(tmp_path / "w", "stats/layer-00001.stats.safetensors")
            except RecordError as error:
                said.append(str(error))
                continue
            assert arrays.keys() == expected.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, expected[name])
                assert array.dtype == expected[name].dtype
        assert len(said) >= len(places) - 2, "a flip in the header's padding changes nothing"
        assert all("layer-00001.stats.safetensors: " in line for line in said)
        assert all("run the step that made it again" in line for line in said)

    def test_checksums_that_cannot_be_read_are_not_the_absence_of_arrays(self, pruned, tmp_path):
        name = "stats/layer-00001.stats.safetensors"
        path = tmp_path / "w" / name
        path.write_bytes(path.read_bytes().replace(b'"checksums"', b'"checksumz"', 1))
        with pytest.raises(RecordError, match="is damaged: its arrays are not those of its check"):
            workdir.load(tmp_path / "w", name)

    @pytest.mark.parametrize("kind", ["stats", "held_out"])
    def test_damaged_stats_are_made_again_by_the_same_calibrate(
        self, pruned, checkpoint, text, call, tmp_path, kind, caplog
    ):
        before = contents(tmp_path / "w")
        path = tmp_path / f"w/stats/layer-00001.{kind}.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(RecordError, match=r"is damaged: the checksum of .* does not match"):
            call("score", "--sparsity", ".2", "--method", "wanda-sp", "a.jsonl")
        call(*calibration(pruned, text))
        after = contents(tmp_path / "w")
        assert {name: after[name] for name in before} == before
        path.unlink()  # and one that is gone, which nobody discarded
        call(*calibration(pruned, text))
        assert contents(tmp_path / "w")[f"stats/{path.name}"] == before[f"stats/{path.name}"]

    @pytest.mark.parametrize("step", ["scores", "score", "compensate"])
    def test_a_damaged_file_of_a_step_is_made_again_by_it(self, pruned, call, tmp_path, step):
        (path,) = tmp_path.glob(f"w/{step}-*/layer-00001.safetensors")
        whole = path.read_bytes()
        for damaged in (whole[:-3], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            if step == "score":
                with pytest.raises(RecordError, match="run the step that made it again"):
                    call("compensate", "--damping", "0.5", "b.jsonl")
            call("score", "--sparsity", ".3", "--multiple-of", 8, "a.jsonl")
            call("compensate", "b.jsonl")
            assert path.read_bytes() == whole

    def test_a_file_without_an_array_that_is_needed_is_named(self, pruned, call, tmp_path):
        name = "stats/layer-00001.stats.safetensors"
        arrays = workdir.load(tmp_path / "w", name)
        total = arrays.pop("down.total")
        workdir.write(tmp_path / "w", name, arrays)
        with pytest.raises(RecordError, match=r"lacks down.total; run the step that made it again"):
            call("score", "--sparsity", ".2", "--method", "flap", "a.jsonl")
        for wrong in (total.astype(bool), total[:-1]):
            workdir.write(tmp_path / "w", name, {**arrays, "down.total": wrong})
            with pytest.raises(RecordError, match="not of shape"):
                call("score", "--sparsity", ".2", "--method", "flap", "a.jsonl")

    def test_units_and_weights_of_another_shape_are_refused(self, pruned, call, tmp_path):
        (kept,) = tmp_path.glob("w/score-*/layer-00001.safetensors")
        (refit,) = tmp_path.glob("w/compensate-*/layer-00001.safetensors")
        for path, name in ((kept, "channels"), (refit, "down_proj.weight")):
            whole = path.read_bytes()
            below = str(path.relative_to(tmp_path / "w"))
            arrays = workdir.load(tmp_path / "w", below)
            for wrong in (arrays[name][..., :-1], arrays[name].astype(np.float64)):
                workdir.write(tmp_path / "w", below, {**arrays, name: wrong})
                with pytest.raises(RecordError, match=f"{name} is "):
                    call("export", "out", "c.jsonl", "--overwrite")
            path.write_bytes(whole)
        call("export", "whole", "c.jsonl")

    def test_a_damaged_run_json_says_what_helps_and_it_helps(self, pruned, text, call, tmp_path):
        expected = contents(tmp_path / "w")
        run = tmp_path / "w/run.json"
        for damaged in (b"{", b"", run.read_bytes().replace(b"16", b"17")):
            run.write_bytes(damaged)
            with pytest.raises(WorkError, match=r"run.json: .*; give --overwrite to start again"):
                call(*calibration(pruned, text))
            with pytest.raises(WorkError, match=r"run.json: .*; run calibrate again, with --over"):
                call("score", "--sparsity", ".2", "a.jsonl")
            call(*calibration(pruned, text, "--overwrite"))
            left = contents(tmp_path / "w")
            assert {name: expected[name] for name in left} == left

    @pytest.mark.parametrize("damaged", [b"{}", b"", None])
    def test_damaged_checksums_of_weights_are_made_again(
        self, pruned, text, call, tmp_path, damaged
    ):
        path = tmp_path / "w/weights.json"
        expected = path.read_bytes()
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"weights\.json: .*; run calibrate again"):
            call("score", "--sparsity", ".2", "a.jsonl")
        tokens = (tmp_path / "w/tokens.safetensors").read_bytes()
        call(*calibration(pruned, text))
        assert path.read_bytes() == expected
        assert (tmp_path / "w/tokens.safetensors").read_bytes() == tokens
        assert not list((tmp_path / "w").glob("score*")), "may be made of other weights"
        call("score", "--sparsity", ".2", "a.jsonl")

    @pytest.mark.parametrize("name", ["hidden-00001", "hidden-00099", "hidden-00003"])
    def test_a_stray_stream_is_not_resumed_from(self, checkpoint, text, call, tmp_path, name):
        model = checkpoint()
        call(*calibration(model, text))
        expected = contents(tmp_path / "w")
        shutil.rmtree(tmp_path / "w/stats")
        (tmp_path / "w/calibrated").unlink()
        (tmp_path / "w" / name).write_bytes(b"short")
        call(*calibration(model, text))
        assert contents(tmp_path / "w") == expected

    @pytest.mark.parametrize("kind", ["cut", "flipped", "gone"])
    def test_a_damaged_export_is_found_and_made_again(self, pruned, call, tmp_path, kind, caplog):
        call("export", "out", "c.jsonl")
        expected = contents(tmp_path / "out")
        index = "model.safetensors.index.json"
        for name in ("model-00001-of-00001.safetensors", "tokenizer.json", "README.md", index):
            path = tmp_path / "out" / name
            data = path.read_bytes()
            if kind == "gone":
                path.unlink()
            else:
                flipped = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
                path.write_bytes(data[:-1] if kind == "cut" else flipped)
            with pytest.raises(WorkError, match=f"{name}: has changed since .*; give --over"):
                call("export", "out", "c.jsonl")
            call("export", "out", "c.jsonl", "--overwrite")
            assert contents(tmp_path / "out") == expected
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
        call("export", "out", "c.jsonl")
        call("export", "out", "c.jsonl", "--overwrite")
        assert {path: path.stat().st_mtime_ns for path in made} == made, "it was whole"

    def test_a_shard_damaged_between_two_runs_is_made_again(self, tmp_path):
        one, b = np.ones((2, 3), np.float32), {"b": np.zeros(1, np.float32)}
        first = writer.CheckpointWriter(tmp_path / "out", run="one")
        write_chunks(first, [{"a": 0 * one}, b], whole=1)
        path = tmp_path / "out/model-00001-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        again = writer.CheckpointWriter(tmp_path / "out", run="one")
        write_chunks(again, [{"a": one}, b])
        assert load_file(path)["a"].all()


class TestForeignStreams:
    """A stream is input from outside: nothing beside the work directory's own files is touched."""

    def test_discard_deletes_nothing_outside(self, pruned, call, tmp_path):
        private = tmp_path / "private/stats/layer-00000.stats.safetensors"
        private.parent.mkdir(parents=True)
        private.write_bytes(b"mine")
        for work in (tmp_path / "private", "/", "relative"):
            stream = changed(tmp_path / "b.jsonl", tmp_path / "x.jsonl", work=str(work))
            for words in (["score", "--discard", "--sparsity", ".2"], ["compensate", "--discard"]):
                with pytest.raises(WorkError, match=r"run.json: no such file"):
                    call(*words, stream)
        assert private.read_bytes() == b"mine"
        assert [path.name for path in (tmp_path / "private").iterdir()] == ["stats"]

    def test_the_work_directory_of_another_run_is_not_touched(
        self, pruned, checkpoint, text, call, tmp_path
    ):
        other = checkpoint("other", seed=1)
        call(*calibration(other, text, "--samples", 5, "--work", "w2", "-o", "other.jsonl"))
        stream = changed(tmp_path / "b.jsonl", tmp_path / "x.jsonl", work=str(tmp_path / "w2"))
        before = contents(tmp_path / "w2")
        with pytest.raises(WorkError, match="w2: is not the work directory of this stream"):
            call("compensate", "--discard", stream)
        call(*calibration(other, text, "--work", "w3", "-o", "other.jsonl"))
        stream = changed(tmp_path / "b.jsonl", tmp_path / "x.jsonl", work=str(tmp_path / "w3"))
        with pytest.raises(CheckpointError, match="its tensors has changed since it was calibrat"):
            call("compensate", "--discard", stream)
        assert contents(tmp_path / "w2") == before

    def test_links_in_a_work_directory_are_not_followed(self, pruned, text, call, tmp_path):
        stats = tmp_path / "w/stats"
        stats.rename(tmp_path / "elsewhere")
        stats.symlink_to(tmp_path / "elsewhere")
        before = contents(tmp_path / "elsewhere")
        for words in (
            ["score", "--discard", "--sparsity", ".2", "a.jsonl"],
            ["compensate", "--discard", "b.jsonl"],
            calibration(pruned, text),
            calibration(pruned, text, "--samples", 5, "--overwrite"),
        ):
            with pytest.raises(WorkError, match="stats: is a link, and links are not followed"):
                call(*words)
        assert contents(tmp_path / "elsewhere") == before
        stats.unlink()
        (tmp_path / "elsewhere").rename(stats)
        path = stats / "layer-00001.stats.safetensors"
        path.rename(tmp_path / "file")
        path.symlink_to(tmp_path / "file")
        with pytest.raises(WorkError, match="is a link"):
            call("score", "--sparsity", ".2", "--discard", "a.jsonl")
        assert (tmp_path / "file").exists()

    def test_a_stream_cannot_make_anybody_ask_the_hub(self, pruned, call, tmp_path):
        stream = changed(tmp_path / "b.jsonl", tmp_path / "x.jsonl", model="evil/repository")
        with pytest.raises(CheckpointError, match="evil/repository: no such directory"):
            call("compensate", stream)

    def test_a_path_with_a_nul_is_refused(self, pruned, call, tmp_path):
        for key in ("work", "model"):
            stream = changed(tmp_path / "b.jsonl", tmp_path / "x.jsonl", **{key: "/a\0b"})
            with pytest.raises(RecordError, match=f"{key} is not a path"):
                call("compensate", stream)


class TestOverwrite:
    """Only what the index or the run names is removed."""

    def test_calibrate_keeps_what_is_not_its_own(self, pruned, text, call, tmp_path):
        work = tmp_path / "w"
        mine = ["notes.md", "stats/notes.md", "data/x", "stats/layer-1.safetensors", "hidden-1"]
        (work / "data").mkdir()
        for name in mine:
            (work / name).write_text("mine")
        call(*calibration(pruned, text, "--samples", 5, "--overwrite"))
        assert all((work / name).read_text() == "mine" for name in mine)
        assert not list(work.glob("score*"))
        assert not list(work.glob("compensate*"))

    def test_a_directory_that_is_not_a_work_directory_is_refused(
        self, checkpoint, text, call, tmp_path
    ):
        model = checkpoint()
        (tmp_path / "w").mkdir()
        (tmp_path / "w/notes.md").write_text("mine")
        for more in ([], ["--overwrite"]):
            with pytest.raises(WorkError, match="w: is not a work directory of prunetool"):
                call(*calibration(model, text, *more))
        (tmp_path / "w/notes.md").rename(tmp_path / "w/weights.json")
        with pytest.raises(WorkError, match="w: is not a work directory of prunetool"):
            call(*calibration(model, text, "--overwrite"))
        (tmp_path / "w/weights.json").rename(tmp_path / "w/run.json")
        with pytest.raises(WorkError, match=r"run\.json: cannot be read as JSON"):
            call(*calibration(model, text))
        call(*calibration(model, text, "--overwrite"))

    def test_export_keeps_what_no_checkpoint_names(self, pruned, call, tmp_path):
        call("export", "out", "b.jsonl")
        out = tmp_path / "out"
        for name in ("notes.md", "model.gguf", ".gitattributes", "other.safetensors"):
            (out / name).write_text("mine")
        shutil.copy(tmp_path / "c.jsonl", out / "c.jsonl")
        call("export", "out", "out/c.jsonl", "--overwrite")
        call("export", "clean", "c.jsonl")
        for name in ("notes.md", "model.gguf", ".gitattributes", "other.safetensors"):
            assert (out / name).read_text() == "mine"
            (out / name).unlink()
        (out / "c.jsonl").unlink()
        assert contents(out) == contents(tmp_path / "clean")

    def test_files_of_the_user_that_would_be_replaced_are_refused_by_name(
        self, pruned, checkpoint, call, tmp_path
    ):
        foreign = checkpoint("foreign", shards=2)
        (foreign / "README.md").write_text("mine")
        before = contents(foreign)
        with pytest.raises(WorkError, match=r"foreign/README\.md: would be replaced"):
            call("export", "foreign", "c.jsonl", "--overwrite")
        assert contents(foreign) == before
        (foreign / "README.md").unlink()
        call("export", "foreign", "c.jsonl", "--overwrite")
        call("export", "clean", "c.jsonl")
        assert contents(foreign) == contents(tmp_path / "clean"), "the other checkpoint is gone"

    def test_what_a_model_reads_through_links_is_never_replaced(
        self, checkpoint, text, call, tmp_path
    ):
        real = checkpoint("real")
        model = tmp_path / "model"
        model.mkdir()
        for name in ("model.safetensors", "tokenizer.json"):
            (model / name).symlink_to(real / name)
        shutil.copy(real / "config.json", model)
        call(*calibration(model, text))
        call("score", "--sparsity", ".3", "a.jsonl", "-o", "b.jsonl")
        before = contents(real)
        with pytest.raises(WorkError, match=r"real/.*: is read by this run, which would replace"):
            call("export", "real", "b.jsonl", "--overwrite")
        assert contents(real) == before

    def test_data_of_another_checkpoint_does_not_stay_beside_the_new_one(
        self, pruned, checkpoint, call, tmp_path
    ):
        foreign = checkpoint("foreign")
        (foreign / "tokenizer.model").write_text("of another tokenizer")
        with pytest.raises(WorkError, match=r"tokenizer\.model: would be replaced or out of place"):
            call("export", "foreign", "c.jsonl", "--overwrite")
        assert (foreign / "tokenizer.model").read_text() == "of another tokenizer"

    def test_a_file_put_there_while_an_export_was_dead_is_not_replaced(self, tmp_path):
        out = tmp_path / "out"
        first = writer.CheckpointWriter(out, run="one", files=["README.md"])
        write_chunks(first, [{"a": np.zeros(1, np.float32)}])
        (out / "README.md").write_text("mine")
        with pytest.raises(WorkError, match=r"README\.md: would be replaced"):
            writer.CheckpointWriter(out, run="one", files=["README.md"])

    def test_a_killed_replacement_of_another_checkpoint_goes_on(self, checkpoint, tmp_path):
        foreign = checkpoint("foreign")
        given = {"run": "one", "files": ["config.json", "tokenizer.json"], "overwrite": True}
        write_chunks(writer.CheckpointWriter(foreign, **given), [{"a": np.zeros(1, np.float32)}])
        again = writer.CheckpointWriter(foreign, **given)
        assert again.state == "begun"
        assert not (foreign / "model.safetensors").exists()

    def test_calibrate_does_not_drop_what_a_living_step_writes(self, pruned, text, call, tmp_path):
        (score,) = tmp_path.glob("w/score-*")
        with (
            workdir.lock(score),
            pytest.raises(WorkError, match=r"score-\w+: is being written by process"),
        ):
            call(*calibration(pruned, text, "--samples", 5, "--overwrite"))
        assert list(score.iterdir())

    def test_a_run_without_its_run_json_can_be_started_again(self, pruned, text, call, tmp_path):
        (tmp_path / "w/run.json").unlink()
        with pytest.raises(WorkError, match=r"run\.json: no such file; run calibrate again, with"):
            call("score", "--sparsity", ".2", "a.jsonl")
        with pytest.raises(WorkError, match=r"holds a run without its run.json; give --over"):
            call(*calibration(pruned, text))
        call(*calibration(pruned, text, "--overwrite"))
        call("score", "--sparsity", ".2", "a.jsonl")

    def test_the_stream_that_is_read_is_never_replaced(self, pruned, call, tmp_path):
        call("export", "out", "b.jsonl")
        shutil.copy(tmp_path / "c.jsonl", tmp_path / "out/README.md")
        with pytest.raises(WorkError, match=r"README\.md: is read by this run"):
            call("export", "out", "out/README.md", "--overwrite")
        assert (tmp_path / "out/README.md").read_bytes() == (tmp_path / "c.jsonl").read_bytes()

    def test_a_directory_with_no_checkpoint_is_refused(self, pruned, call, tmp_path):
        with pytest.raises(WorkError, match="is not empty and holds no checkpoint"):
            call("export", ".", "c.jsonl", "--overwrite")
        assert (tmp_path / "c.jsonl").exists()
        with pytest.raises(WorkError, match="is not empty and holds no checkpoint"):
            call("export", "w", "c.jsonl", "--overwrite")

    @pytest.mark.parametrize("names", [["notes.md"], ["../private.safetensors"], ["config.json"]])
    def test_an_index_cannot_name_files_away(self, tmp_path, names):
        out = tmp_path / "out"
        out.mkdir()
        (tmp_path / "private.safetensors").write_text("mine")
        for name in ("notes.md", "x.py"):
            (out / name).write_text("mine")
        index = {
            "weight_map": dict(zip("ab", names, strict=False)),
            "metadata": {"files": dict.fromkeys([*names, "x.py"], "0")},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        made = writer.CheckpointWriter(out, overwrite=True)
        write_chunks(made, [{"a": np.zeros(1, np.float32)}])
        made.close()
        for path in (tmp_path / "private.safetensors", out / "notes.md", out / "x.py"):
            assert path.read_text() == "mine"

    @pytest.mark.parametrize("files", [True, "a", None, {"../private": "0"}, {"config.json": 1}])
    def test_a_forged_manifest_names_nothing_of_the_user(self, pruned, call, tmp_path, files):
        call("export", "out", "c.jsonl")
        (tmp_path / "private").write_text("mine")
        path = tmp_path / "out/.prunetool.json"
        run = checksum.read_sealed(path)["run"]
        path.write_text(json.dumps(checksum.sealed({"run": run, "files": files})))
        with pytest.raises(WorkError, match=r"out.*(has changed since|is not empty)"):
            call("export", "out", "c.jsonl")
        assert (tmp_path / "private").read_text() == "mine"

    def test_the_old_index_goes_first(self, tmp_path, monkeypatch):
        out, chunks = tmp_path / "out", [{"a": np.zeros(1, np.float32)}]
        old = writer.CheckpointWriter(out)
        write_chunks(old, chunks)
        old.close()

        def killed(path, missing_ok=False):
            with suppress(FileNotFoundError):
                os.unlink(path)
            if path.suffix == ".safetensors":
                raise KeyboardInterrupt

        monkeypatch.setattr(writer.Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            write_chunks(writer.CheckpointWriter(out, overwrite=True), chunks)
        monkeypatch.undo()
        assert not (out / "model.safetensors.index.json").exists(), "half a checkpoint looks whole"
        write_chunks(writer.CheckpointWriter(out, overwrite=True), chunks)


class TestFiles:
    def test_interrupted_at_any_call_a_write_leaves_nothing_beside_the_file(
        self, tmp_path, request
    ):
        gc.freeze()  # what other tests left would be looked through a hundred times
        request.addfinalizer(gc.unfreeze)

        class Stop(BaseException):
            pass

        def stopped_at(moment):
            calls = iter(range(1000))

            def trace(frame, event, _):
                if event == "call" and next(calls) == moment:
                    sys.settrace(None)
                    raise Stop

            sys.settrace(trace)
            try:
                writer.write_bytes(tmp_path / "a.json", b"x")
            except Stop:
                return True
            finally:
                sys.settrace(None)
            return False

        moment = 0
        while stopped_at(moment):
            gc.collect()  # as `cli.main` does
            assert {path.name for path in tmp_path.iterdir()} <= {"a.json"}, moment
            moment += 1
        assert moment > 20

    def test_a_planted_link_is_not_written_through(self, tmp_path):
        (tmp_path / "private").write_text("mine")
        for name in (".x.json.partial", "x.json"):
            (tmp_path / name).symlink_to(tmp_path / "private")
        writer.write_json(tmp_path / "x.json", {"a": 1})
        assert (tmp_path / "private").read_text() == "mine"
        assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
        assert not (tmp_path / "x.json").is_symlink()

    def test_files_are_made_under_names_that_nobody_can_guess(self, tmp_path):
        seen = []
        for _ in range(2):
            with writer.atomic(tmp_path / "x") as partial:
                partial.write_text("a")
                seen.append(partial.parent.name)
                assert stat.S_IMODE(partial.parent.stat().st_mode) == 0o700
        assert seen[0] != seen[1]

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_every_file_follows_the_umask(self, pruned, call, tmp_path, umask):
        before = os.umask(umask)
        try:
            call("compensate", "b.jsonl", "--damping", "0.5", "-o", "d.jsonl")
            call("export", "out", "d.jsonl")
        finally:
            os.umask(before)
        (made,) = {p.parent for p in tmp_path.glob("w/compensate-*/*")} - {
            (tmp_path / "w" / json.loads(line)["files"]["refit"]).parent
            for line in (tmp_path / "c.jsonl").read_text().splitlines()[1:2]
        }
        for path in (*made.iterdir(), *(tmp_path / "out").iterdir(), tmp_path / "d.jsonl"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name

    def test_what_a_killed_writer_left_is_swept(self, pruned, text, call, tmp_path):
        call("export", "out", "b.jsonl")
        (score,) = (path.name for path in tmp_path.glob("w/score-*"))
        (scores,) = (path.name for path in tmp_path.glob("w/scores-*"))
        directories = ["out", "w", "w/stats", f"w/{score}", f"w/{scores}"]
        for directory in directories:
            for name in (
                ".layer-00001.safetensors.0123456789abcdef.prunetool-partial",
                ".x.prunetool-partial",
            ):
                if directory.endswith(scores) and name.startswith(".x"):
                    continue  # there only what is left of a layer's file, under its lock
                (tmp_path / directory / name).mkdir()
                (tmp_path / directory / name / "file").write_text("")
                (tmp_path / directory / name / ".tmpAb12Cd").write_text("")
        for directory in directories[:3]:  # of version 0.1, and of safetensors
            (tmp_path / directory / ".tmpAb12Cd").write_text("")
            (tmp_path / directory / ".config.json.partial").write_text("")
        call("export", "out", "c.jsonl", "--overwrite")
        call(*calibration(pruned, text))
        call("score", "--sparsity", ".3", "--multiple-of", 8, "a.jsonl")
        for directory in directories:
            left = {path.name for path in (tmp_path / directory).glob(".*")}
            assert left <= {".prunetool.json"}, directory

    def test_files_that_only_look_like_leftovers_are_the_users(self, pruned, call, tmp_path):
        for name in (".thesis.partial", ".tmpabc123", ".x.prunetool-partial"):
            out = tmp_path / f"out{name}"
            out.mkdir()
            (out / name).write_text("mine")
            with pytest.raises(WorkError, match="is not empty"):
                call("export", out, "c.jsonl")
            (out / name).unlink()
            (out / name).mkdir()
            (out / name / "mine").write_text("mine")
            with pytest.raises(WorkError, match="is not empty"):
                call("export", out, "c.jsonl")
            assert (out / name / "mine").read_text() == "mine"

    def test_a_full_disk_names_the_file(self, tmp_path, monkeypatch):
        def full(_):
            raise OSError(28, "No space left on device")

        with (
            pytest.raises(WorkError, match=r"x\.json: cannot be written \(No space left"),
            writer.atomic(tmp_path / "x.json"),
        ):
            full(None)
        assert not list(tmp_path.iterdir())
        with (
            pytest.raises(WorkError, match="absent: no such directory; make it"),
            writer.atomic(tmp_path / "absent/x"),
        ):
            pass

    @pytest.mark.parametrize("left", [b"", b"\0" * 40, b"123"])
    def test_a_lock_file_that_a_power_cut_left_is_taken_over(self, tmp_path, monkeypatch, left):
        monkeypatch.setattr(workdir, "BROKEN_SECONDS", 0.1)
        path = tmp_path / "w.lock"
        path.write_bytes(left)
        long_ago = path.stat().st_mtime - 1e6
        os.utime(path, (long_ago, long_ago))  # so that reading it changes when it was read
        with workdir.lock(tmp_path / "w"):
            assert (tmp_path / "w.lock").read_text()
        assert not list(tmp_path.iterdir())

    def test_a_lock_file_of_another_program_is_refused_and_stays(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workdir, "BROKEN_SECONDS", 0.1)
        path = tmp_path / "uv.lock"
        path.write_text("version = 1\n")
        with pytest.raises(WorkError, match=r"uv\.lock: is no lock of prunetool; name another"):
            workdir.lock(tmp_path / "uv").__enter__()
        assert path.read_text() == "version = 1\n"

    def test_what_another_file_of_a_longer_name_needs_is_not_swept(self, tmp_path):
        with writer.atomic(tmp_path / "out.gguf") as partial:
            partial.write_text("whole")
            with workdir.lock(tmp_path / "out"):
                pass
        assert (tmp_path / "out.gguf").read_text() == "whole"

    def test_checksums_know_dtype_shape_and_bytes(self):
        a = np.arange(6, dtype=np.float32)
        sums = {
            checksum.of_array(b)
            for b in (a, a.reshape(2, 3), a.reshape(3, 2), a.view(np.int32), a + 1, a[:5])
        }
        assert len(sums) == 6
        assert checksum.of_array(a.reshape(2, 3).T) == checksum.of_array(
            np.ascontiguousarray(a.reshape(2, 3).T)
        )


class TestCompanions:
    def test_links_out_of_the_checkpoint_do_not_go_along(self, pruned, call, tmp_path):
        (tmp_path / "private").write_text("a key")
        (pruned / "LICENSE").symlink_to(tmp_path / "private")
        (pruned / "merges.txt").mkdir()
        call("export", "out", "c.jsonl")
        assert not (tmp_path / "out/LICENSE").exists()
        assert not (tmp_path / "out/merges.txt").exists()

    def test_links_of_a_hub_cache_go_along(self, checkpoint, tmp_path):
        snapshot = tmp_path / "models--a--b/snapshots/123"
        blobs = tmp_path / "models--a--b/blobs"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (blobs / "1").write_text("free")
        (tmp_path / "private").write_text("a key")
        (snapshot / "LICENSE").symlink_to("../../blobs/1")
        (snapshot / "NOTICE").symlink_to("../../../private")
        assert companions(snapshot) == {"LICENSE": b"free"}
        blobs.rename(tmp_path / "home")
        blobs.symlink_to(tmp_path / "home")
        assert companions(snapshot) == {}, "a cache's blobs are its own"

    def test_no_code_goes_along(self, pruned, call, tmp_path):
        for name in ("tokenizer_evil.py", "modeling_evil.py", "tokenizer.py", "chat_template.py"):
            (pruned / name).write_text("raise SystemExit")
        original = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "auto_map": {"AutoTokenizer": ["tokenizer_evil.Evil", None]},
        }
        (pruned / "tokenizer_config.json").write_text(json.dumps(original))
        config = json.loads((pruned / "config.json").read_text())
        evil = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
        assert open_model(str(pruned)).identity()
        (pruned / "config.json").write_text(json.dumps({**config, **evil}))
        call("export", "out", "c.jsonl")
        out = tmp_path / "out"
        assert {path.name for path in out.glob("*.py")} <= {
            "configuration_pruned_llama.py",
            "modeling_pruned_llama.py",
            "mlx_pruned_llama.py",
        }
        said = json.loads((out / "tokenizer_config.json").read_text())
        assert said == {"tokenizer_class": "PreTrainedTokenizerFast"}
        assert "evil" not in (out / "config.json").read_text()

    def test_a_damaged_companion_is_said_before_anything_is_written(self, pruned, call, tmp_path):
        (pruned / "generation_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be read"):
            call("export", "out", "c.jsonl")
        assert not (tmp_path / "out").exists()


class TestCard:
    def test_a_source_cannot_write_markup_into_the_card(self, checkpoint):
        model = open_model(str(checkpoint()))
        source = "/a\n# Heading <img src=x onerror=alert(1)> [link](http://x) `code` " + "x" * 300
        step = {"command": "calibrate", "version": "0", "options": {"tokens": "```\n# H"}}
        header = records.Header("/m", source, "f", "/w", 3, [step])
        card = model_card(header, model, "llama", model.config, 10, ())
        assert "\n# Heading" not in card
        assert "<img" not in card.replace("\\<img", "")
        assert max(map(len, card.splitlines())) < 400
        assert "[link](" not in card
        assert "\n# H" not in card

    def card(self, model, source, directory):
        header = records.Header(directory, source, "f", "/w", 3, [])
        return model_card(header, model, "llama", model.config, 10, ()).splitlines()

    def test_zeros_in_unequal_layers_need_the_loader_too(self, checkpoint):
        model = open_model(str(checkpoint()))
        header = records.Header("/m", "tiny", "f", "/w", 3, [])
        for form, trust in (("llama", False), ("pruned_llama", True)):
            card = model_card(header, model, form, model.config, 10, (), zeros=True)
            assert ("trust_remote_code=True" in card) == trust
            assert ("zeros in the original shapes" in card) != trust

    @pytest.mark.parametrize("source", [".", "..", "./", "models/..", "/models/tiny"])
    def test_a_path_without_a_name_gives_the_name_of_the_directory(self, checkpoint, source):
        card = self.card(open_model(str(checkpoint())), source, "/models/tiny")
        assert "# tiny, pruned" in card
        assert any(line.startswith("Made from tiny by ") for line in card)
        assert not any("/models" in line for line in card)
        assert not any(line.startswith("base_model") for line in card)

    @pytest.mark.parametrize("source", ["me/tiny", "/hub/models--me--tiny/snapshots/0a1b", "."])
    def test_a_download_of_the_hub_is_called_by_its_id(self, checkpoint, monkeypatch, source):
        model = open_model(str(checkpoint("me/tiny")))
        monkeypatch.chdir(model.directory.parent.parent)  # a directory called as the repository is
        card = self.card(model, source, "/hub/models--me--tiny/snapshots/0a1b")
        assert card[:2] == ["---", "base_model: me/tiny"]
        assert "# tiny, pruned" in card
        assert any(line.startswith("Made from me/tiny by ") for line in card)

    @pytest.mark.parametrize(
        "directory",
        ["/gone/me/tiny", "/models--me--tiny", "/models--tiny/snapshots/0a1b",
         "/datasets--me--tiny/snapshots/0a1b", "/models--me--tiny/refs/0a1b",
         "/models--me--a\nb/snapshots/0a1b", "/me--tiny/snapshots/0a1b",
         "/models--a--b--c/snapshots/0a1b"],
    )  # fmt: skip
    def test_a_local_directory_is_not_a_base_model_even_if_it_is_gone(self, checkpoint, directory):
        card = self.card(open_model(str(checkpoint())), "me/tiny", directory)
        assert card[:2] == ["---", "library_name: transformers"]
        assert "# tiny, pruned" in card

    def test_no_path_of_this_machine_is_in_it(self, checkpoint):
        model = open_model(str(checkpoint()))
        (model.directory / "README.md").write_text(
            "---\nbase_model: /home/me/base\nlicense_link: /home/me/LICENSE\n---\n"
        )
        options = {"text": "/home/me/secret/wiki.txt", "more": ["~/secret/x", "C:\\secret\\y"],
                   "method": "a\nb", "pattern": "2:4", "d": {"f": "file:///secret/z"}}  # fmt: skip
        header = records.Header(
            "/home/me/tiny",
            "../secret/tiny",
            "f",
            "/home/me/w",
            3,
            [{"command": "score", "version": "0", "options": options}],
        )
        card = model_card(header, model, "llama", model.config, 10, ())
        for word in ("/home", "secret", "base_model"):
            assert word not in card
        for word in ("wiki.txt", '["x", "y"]', '"z"', "--pattern 2:4", "# tiny, pruned"):
            assert word in card

    def test_the_front_matter_is_the_bases(self, checkpoint):
        model = open_model(str(checkpoint()))
        front = {
            "license": "other",
            "license_name": "a: b\u202e",
            "license_link": "LICENSE",
            "language": ["en", "no", 3],
            "base_model": ["meta-llama/Llama-3.2-1B", "../x/y"],
            "tags": ["evil"],
            "extra_gated_prompt": "agree",
        }
        (model.directory / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")
        step = {"command": "score", "version": "0", "options": {"method": "newton"}}
        header = records.Header("/m/tiny", "tiny", "f", "/w", 3, [step, step])
        card = model_card(header, model, "llama", model.config, 10, ())
        data = ModelCard(card).data.to_dict()
        assert data == {
            "license": "other",
            "license_link": "LICENSE",
            "language": ["en", "no"],
            "base_model": "meta-llama/Llama-3.2-1B",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["pruned", "prunetool", "newton"],
        }
        assert "The licence is the base model's: other." in card

    def test_front_matter_cannot_be_broken_out_of(self, checkpoint):
        model = open_model(str(checkpoint()))
        front = {"license_name": "x: y\n---\n# H", "license": "'\"#[{&*!|>%@`", "language": "---"}
        (model.directory / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")
        header = records.Header("/m/tiny", "tiny", "f", "/w", 3, [])
        card = model_card(header, model, "llama", model.config, 10, ())
        data = ModelCard(card).data
        assert (data.license, data.language) == (front["license"], "---")
        assert "\n# H" not in card

    def test_what_is_measured_is_in_the_published_card(self, checkpoint):
        header = records.Header("/m/tiny", "tiny", "f", "/w", 3, [])
        model = open_model(str(checkpoint()))
        card = model_card(header, model, "llama", model.config, 10, ())
        result = EvalResult(
            "text-generation", "wiki", "wiki|`x`", "perplexity", 12.5, metric_name="Perplexity"
        )
        page = ModelCard(published(card, "me/tiny-pruned", [result]))
        (read,) = page.data.eval_results
        assert (read.dataset_name, read.metric_value) == ("wiki|`x`", 12.5)
        assert page.data.model_name == "tiny-pruned"
        assert r"| wiki\|\`x\` | Perplexity | 12.5 |" in page.text
        assert page.text.count('from_pretrained("me/tiny-pruned")') == 2
        assert "## Evaluation" not in published(card, "me/tiny-pruned", [])

    def test_an_ordinary_name_stays_readable(self):
        assert plain("SmolLM2-135M") == "SmolLM2-135M"
        assert plain("a_b") == r"a\_b"


class TestTiedWithItsOwnHead:
    def model(self, checkpoint, same):
        model = checkpoint(tie_word_embeddings=False)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        if same:
            tensors = load_file(model / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        return model

    def test_a_head_of_its_own_is_used_counted_and_exported(self, checkpoint, text, call, tmp_path):
        import torch
        from transformers import AutoModelForCausalLM

        model = self.model(checkpoint, same=False)
        stored = load_file(model / "model.safetensors")
        said = json.loads(call("inspect", model))
        assert said["parameters"] == sum(array.size for array in stored.values())
        assert said["tied"] is False
        tokens = np.random.default_rng(0).integers(0, 256, (2, 32))
        np.save(tmp_path / "ids.npy", tokens)
        call(*calibration(model, text))
        call("score", "--sparsity", "0", "a.jsonl", "-o", "b.jsonl")
        call("export", "out", "b.jsonl")
        for directory in (model, tmp_path / "out"):
            theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            with torch.no_grad():
                expected = theirs(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.item()
            ours = json.loads(
                call(
                    "evaluate",
                    "--allow-calibrated",
                    directory,
                    "--tokens",
                    "ids.npy",
                    "--sequence-length",
                    32,
                )
            )
            assert ours["loss"] == pytest.approx(expected, abs=2e-5)
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["tie_word_embeddings"] is False
        exported = load_file(tmp_path / "out/model-00001-of-00001.safetensors")
        np.testing.assert_array_equal(exported["lm_head.weight"], stored["lm_head.weight"])

    def test_a_copy_of_the_embedding_is_not_a_head_of_its_own(self, checkpoint, call):
        model = self.model(checkpoint, same=True)
        stored = load_file(model / "model.safetensors")
        said = json.loads(call("inspect", model))
        assert said["tied"] is True
        head = stored["lm_head.weight"]
        assert said["parameters"] == sum(array.size for array in stored.values()) - head.size
        assert said["size_bytes"] == 4 * said["parameters"]

    def test_a_head_that_differs_in_its_last_value_is_its_own(self, checkpoint):
        model = self.model(checkpoint, same=True)
        tensors = load_file(model / "model.safetensors")
        tensors["lm_head.weight"][-1, -1] += 1
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        assert open_model(str(model)).config.tied is False

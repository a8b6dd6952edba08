"""Upload to a Hub on loopback by the real client, and what comes back."""

import json
import re
import shlex
import shutil
import sys

import pytest
from huggingface_hub import ModelCard, constants

from prunetool import card, cli
from prunetool.checkpoint import writer
from prunetool.errors import LONGEST, HubError, RecordError, WorkError
from tests import hub
from tests.conftest import tiny_config, until, write_checkpoint
from tests.loaders.test_llamacpp import with_merges

# The client's own, of the library that it sends by.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN, READER = "hf_writes0123456789", "hf_reads0123456789"
INDEX = "model.safetensors.index.json"
LOADERS = {"modeling_pruned_llama.py", "mlx_pruned_llama.py"}
TEXT = "all the letters that there are, and more of them\n" * 60


def prunetool(*words):
    cli.group.main([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with three exports of one model, and a text."""
    home = tmp_path_factory.mktemp("made")
    model = write_checkpoint(home / "tiny", tiny_config())
    (home / "text.txt").write_text(TEXT)
    prunetool("calibrate", model, "--text", home / "text.txt", "--samples", 8,
              "--sequence-length", 32, "--stats", "all", "--work", home / "w",
              "-o", home / "a.jsonl")  # fmt: skip
    score = ["score", "--sparsity", ".3", "--multiple-of", 8, home / "a.jsonl"]
    for name, more in (("pruned_llama", []), ("llama", ["--allocation", "uniform"])):
        prunetool(*score, *more, "-o", home / f"{name}.jsonl")
        prunetool("export", home / name, home / f"{name}.jsonl", "--max-shard-size", "100KB")
    prunetool("export", home / "dense", home / "llama.jsonl", "--format", "dense")
    for name in ("pruned_llama", "llama", "dense"):
        config = json.loads((home / name / "config.json").read_text())
        assert config["model_type"] == ("llama" if name == "dense" else name)
    return home


@pytest.fixture
def out(made, tmp_path):
    """A copy of the export with unequal layers."""
    return shutil.copytree(made / "pruned_llama", tmp_path / "out")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub that this process talks to with a token that may write."""
    started = hub.start()
    started.tokens |= {TOKEN: "write", READER: "read"}
    hub.connect(started, tmp_path / "hub", monkeypatch, TOKEN)
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture
def upload(tmp_path, monkeypatch, capsys):
    """Upload in this process; gives what it wrote to stdout and stderr, in which no token is."""

    def run(*words):
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        error = None
        try:
            prunetool("upload", *words)
        except HubError as refused:
            error = refused
        said = capsys.readouterr()
        for token in (TOKEN, READER, hub.SIGNATURE):
            assert token not in said.out + said.err + str(error)
        if error:
            assert len(str(error)) <= LONGEST
            raise error
        return said

    return run


def evaluated(capsys, model, text, *more):
    capsys.readouterr()
    prunetool(
        "evaluate",
        "--allow-calibrated",
        model,
        "--text",
        text,
        "--sequence-length",
        32,
        "--samples",
        4,
        *more,
    )
    return json.loads(capsys.readouterr().out)


def names(out):
    return {path.name for path in out.iterdir() if not path.name.startswith(".")}


class TestWhatGoes:
    def test_upload_then_download_is_the_same_model(self, made, out, server, upload, capsys):
        said = upload(out, "me/tiny-pruned")
        assert said.out == f"{server.address}/me/tiny-pruned\n"
        assert "Next: prunetool evaluate me/tiny-pruned --text TEXT" in said.err
        assert re.search(r"upload: \d+ files, 0\.\d MB, in me/tiny-pruned, ", said.err)
        files = server.files("me/tiny-pruned")
        assert set(files) == {*names(out), ".gitattributes"}
        for name in names(out) - {"README.md"}:
            assert files[name] == (out / name).read_bytes()
        text = made / "text.txt"
        expected = evaluated(capsys, out, text)
        server.log.clear()
        found = evaluated(capsys, "me/tiny-pruned", text)
        assert found["loss"] == expected["loss"]
        assert any("/me/tiny-pruned/resolve/" in line for line in server.log)
        again = upload(out, "me/tiny-pruned")
        assert "already in me/tiny-pruned" in again.err

    def test_nothing_but_the_checkpoint_goes(self, out, server, upload):
        for name in (".env", ".prunetool-lock", "notes.md", "run.json", "model.gguf", "x.lock",
                     "other.safetensors", ".README.md.x.prunetool-partial"):  # fmt: skip
            (out / name).write_text("private")
        (out / "sub").mkdir()
        (out / "sub/config.json").write_text("private")
        (out / "LICENSE").write_text("free")
        (out / "NOTICE").symlink_to(out / "notes.md")
        upload(out, "me/x")
        files = server.files("me/x")
        assert files["LICENSE"] == b"free"
        assert not [name for name, data in files.items() if b"private" in data]
        assert set(files) - {".gitattributes", "LICENSE"} == set(writer.whole_files(out))

    def test_a_dry_run_names_every_file_and_asks_nothing(self, out, server, upload, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "")
        said = upload(out, "me/x", "--dry-run")
        listed = dict(reversed(line.split("  ")) for line in map(str.strip, said.out.splitlines()))
        sizes = {name: int(size.replace(",", "")) for name, size in listed.items()}
        assert set(sizes) == names(out)
        for name in names(out) - {"README.md"}:
            assert sizes[name] == (out / name).stat().st_size
        assert "nothing sent to me/x" in said.err
        assert not server.asked

    def test_large_files_go_in_parts_if_the_hub_wants_it(self, out, server, upload):
        server.part_bytes = 10_000
        upload(out, "me/x")
        files = server.files("me/x")
        assert any(name.endswith("/1") for name in server.stored)
        for name in names(out) - {"README.md"}:
            assert files[name] == (out / name).read_bytes()

    def test_an_edited_card_goes_as_it_is(self, out, server, upload):
        path = out / "README.md"
        edited = path.read_text().replace(", pruned\n", ", pruned\n\nBuilt with care by me.\n")
        path.write_text(edited)
        upload(out, "me/x")
        assert b"Built with care by me." in server.files("me/x")["README.md"]
        path.write_text("---\na: [\n---\n")
        with pytest.raises(WorkError, match=r"README\.md: has front matter that cannot be read"):
            upload(out, "me/x")

    @pytest.mark.parametrize("kind", ["damaged", "gone", "unfinished", "foreign", "none", "file"])
    def test_what_is_no_whole_checkpoint_is_refused(self, out, server, upload, tmp_path, kind):
        shard = out / "model-00002-of-00005.safetensors"
        said = "model-00002-of-00005.safetensors: is damaged or missing; write the checkpoint again"
        if kind == "damaged":
            data = shard.read_bytes()
            shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif kind == "gone":
            shard.unlink()
        elif kind == "unfinished":
            (out / writer.UNFINISHED).write_text("{}")
            said = "out: was not finished; run the command that writes it again"
        elif kind == "foreign":
            (out / writer.MANIFEST).unlink()
            said = "out: has no .prunetool.json to check it against; name a checkpoint"
        else:
            shutil.rmtree(out)
            said = "out: no such directory; name one that export wrote"
            if kind == "file":
                out.write_text("x")
        for more in ([], ["--dry-run"]):
            with pytest.raises(WorkError, match=re.escape(said)):
                upload(out, "me/x", *more)
        assert not server.asked


class TestPlaces:
    def test_a_branch_is_made(self, made, out, server, upload, capsys):
        said = upload(out, "me/x", "--revision", "half")
        assert said.out == f"{server.address}/me/x/tree/half\n"
        assert "Next: prunetool evaluate me/x --revision half --text TEXT" in said.err
        assert set(server.files("me/x")) == {".gitattributes"}
        assert set(server.files("me/x", "half")) == {*names(out), ".gitattributes"}
        text = made / "text.txt"
        found = evaluated(capsys, "me/x", text, "--revision", "half")
        assert found["loss"] == evaluated(capsys, out, text)["loss"]

    def test_a_pull_request(self, out, server, upload):
        server.publish("me/x", {"model.safetensors": b"another"})
        said = upload(out, "me/x", "--create-pr")
        assert said.out == f"{server.address}/me/x/discussions/1\n"
        assert set(server.files("me/x")) == {"model.safetensors"}
        assert set(server.files("me/x", "refs/pr/1")) == names(out)
        with pytest.raises(HubError, match="me/x: no revision 'absent'; see its branches"):
            upload(out, "me/x", "--create-pr", "--revision", "absent")

    def test_private(self, out, server, upload):
        upload(out, "me/x", "--private")
        assert server.repositories["me/x"].private
        upload(out, "me/y")
        assert not server.repositories["me/y"].private
        before = server.files("me/y")
        with pytest.raises(
            HubError, match="me/y: exists and is public; make it private in its set"
        ):
            upload(out, "me/y", "--private")
        assert server.files("me/y") == before

    def test_another_checkpoint_is_replaced_only_if_asked(self, made, out, server, upload, capsys):
        upload(out, "me/x")
        for stale in (
            "model.safetensors",
            "adapter_config.json",
            "model-00009-of-00009.safetensors",
        ):
            other = {**server.files("me/x"), stale: b"stale", "notes.md": b"mine"}
            server.publish("me/x", other)
            with pytest.raises(
                HubError, match=rf"me/x: holds another checkpoint \({stale}\); name"
            ):
                upload(out, "me/x")
            assert server.files("me/x") == other
            upload(out, "me/x", "--overwrite")
            assert set(server.files("me/x")) == {*names(out), ".gitattributes", "notes.md"}
        with pytest.raises(
            HubError, match=r"me/x: holds another checkpoint \(configuration_pruned_llama.py\)"
        ):
            upload(made / "llama", "me/x")
        upload(made / "llama", "me/x", "--overwrite")
        assert not LOADERS & set(server.files("me/x"))
        text = made / "text.txt"
        found = evaluated(capsys, "me/x", text)
        assert found["loss"] == evaluated(capsys, made / "llama", text)["loss"]


class TestRefusals:
    def test_no_token(self, out, server, upload, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "")
        with pytest.raises(
            HubError,
            match="me/x: needs a token with write access, but there is "
            "none; set HF_TOKEN, or run: hf auth login",
        ):
            upload(out, "me/x")
        assert not server.asked

    def test_the_token_of_the_login(self, out, server, upload, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_TOKEN", "")
        (tmp_path / "token").write_text(TOKEN)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        upload(out, "me/x")
        assert "config.json" in server.files("me/x")

    def test_a_wrong_token(self, out, server, upload, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(
            HubError, match="me/x: the token was refused: it is wrong or has expired"
        ):
            upload(out, "me/x")

    def test_a_token_that_may_only_read(self, out, server, upload, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", READER)
        with pytest.raises(
            HubError,
            match=r"me/x: is not there and cannot be made \(the token lac"
            r"ks permission\); use one that has it",
        ):
            upload(out, "me/x")
        server.publish("me/x", {"notes.md": b""})
        with pytest.raises(HubError, match=r"me/x: is not uploaded \(the token lacks permission\)"):
            upload(out, "me/x")
        assert set(server.files("me/x")) == {"notes.md"}

    def test_somebody_elses_repository(self, out, server, upload):
        with pytest.raises(HubError, match="you/x: is not there and cannot be made"):
            upload(out, "you/x")
        server.publish("you/x", {"notes.md": b""})
        with pytest.raises(
            HubError, match=r"you/x: is not uploaded \(the token lacks permission\)"
        ):
            upload(out, "you/x")

    @pytest.mark.parametrize("name", ["x", "me/x/y", "me/x y", "https://me:p@hub/x", "me/a--b", ""])
    def test_names_that_are_no_ids(self, out, server, upload, name):
        with pytest.raises(HubError, match="is not an id of the Hub") as caught:
            upload(out, name)
        assert "p@" not in str(caught.value)
        assert not server.asked

    def test_no_network(self, out, server, upload, monkeypatch):
        hub.point("http://127.0.0.1:9", monkeypatch)
        with pytest.raises(
            HubError,
            match=r"me/x: is not there and cannot be made \(no answer from"
            r" http://127\.0\.0\.1:9\); check the connection",
        ):
            upload(out, "me/x")
        hub.point(server.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            upload(out, "me/x")

    def test_a_file_that_is_too_large(self, out, server, upload):
        server.most_bytes = 1000
        with pytest.raises(
            HubError,
            match=r"me/x: is not uploaded \(a file was refused: \d+ bytes "
            r"are too many for a file\); see the Hub's limits",
        ):
            upload(out, "me/x")

    def test_a_bad_branch(self, out, server, upload, monkeypatch):
        def refuse(handler, body, name, branch):
            handler.refuse(400, "", "Invalid reference name")

        routes = [(p, refuse if m is hub.Handler.branch else m, n) for p, m, n in hub.ROUTES]
        monkeypatch.setattr(hub, "ROUTES", routes)
        with pytest.raises(HubError, match=r"not uploaded \(status 400: Invalid reference name\)"):
            upload(out, "me/x", "--revision", "bad..name")


@pytest.mark.parametrize("signal", [9, 2], ids=["SIGKILL", "SIGINT"])
def test_killed_half_way_it_sends_what_is_missing(out, server, start, process, signal, tmp_path):
    words = ["upload", out, "me/x"]
    environment = {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    first = []

    def during(path):
        """Let one file through; end the client in the middle of the next."""
        with server.lock:
            first.append(path)
            number = len(first)
        if number == 1:
            return False
        if number == 2:
            until(lambda: server.stored, started)
            started.send_signal(signal)
        started.wait()
        return True

    server.during = during
    started = start(words, **environment)
    output, error = started.communicate()
    assert started.returncode == (-9 if signal == 9 else 130)
    if signal == 2:
        assert error == "Interrupted; run the same command again to resume\n"
    assert output == ""
    server.during = lambda path: False
    kept = list(server.stored)
    assert set(server.files("me/x")) == {".gitattributes"}, "nothing half can be downloaded"
    shards = {path.name for path in out.glob("*.safetensors")}
    assert 1 <= len(kept) < len(shards)
    done = process(*words, **environment)
    assert len(server.stored) == len(set(server.stored)) == len(shards), "none was sent twice"
    assert TOKEN not in output + error + done.stdout + done.stderr
    for name in names(out) - {"README.md"}:
        assert server.files("me/x")[name] == (out / name).read_bytes()


class TestMetrics:
    def test_they_are_in_the_card(self, made, out, server, upload, capsys, tmp_path):
        more = ["--against", made / "tiny"]
        measured = evaluated(capsys, out, made / "text.txt", *more)
        (tmp_path / "wiki text|2.json").write_text(json.dumps(measured))
        (tmp_path / "plain.json").write_text(json.dumps({**measured, "perplexity": None}))
        upload(out, "me/x", "--metrics", "wiki text|2.json", "--metrics", "plain.json")
        page = ModelCard(server.files("me/x")["README.md"].decode())
        found = {(r.dataset_name, r.metric_type): r.metric_value for r in page.data.eval_results}
        kl = measured["against"]["kl"]
        assert found == {
            ("wiki text|2", "perplexity"): measured["perplexity"],
            ("wiki text|2", "kl_divergence"): kl,
            ("plain", "loss"): measured["loss"],
            ("plain", "kl_divergence"): kl,
        }
        assert page.data.model_name == "x"
        assert page.data.tags == ["pruned", "prunetool", "greedy"]
        assert str(made) not in str(page)
        assert 'from_pretrained("me/x", trust_remote_code=True)' in page.text

    def test_of_another_model_or_of_nothing(self, made, out, server, upload, capsys, tmp_path):
        measured = evaluated(capsys, made / "tiny", made / "text.txt")
        (tmp_path / "m.json").write_text(json.dumps(measured))
        with pytest.raises(
            RecordError, match=r"m\.json: is for a model of \d+ parameters, but OUT"
        ):
            upload(out, "me/x", "--metrics", "m.json")
        (tmp_path / "m.json").write_text("[]")
        with pytest.raises(RecordError, match=r"m\.json: is not an evaluation"):
            upload(out, "me/x", "--metrics", "m.json")
        with pytest.raises(RecordError, match="absent: No such file"):
            upload(out, "me/x", "--metrics", "absent")
        assert not server.asked


def test_a_card_beside_a_converted_checkpoint_goes_along(made, upload, server, tmp_path):
    model = with_merges(shutil.copytree(made / "tiny", tmp_path / "tiny"))
    prunetool("convert", model, tmp_path / "a.gguf")
    prunetool("convert", tmp_path / "a.gguf", tmp_path / "plain")
    (tmp_path / "plain/LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE")
    upload(tmp_path / "plain", "me/plain")
    assert "LICENSE" in server.files("me/plain"), "a page is not needed"
    (tmp_path / "plain/README.md").write_text("---\nlicense: mit\n---\nmine")
    upload(tmp_path / "plain", "me/with-page")
    assert b"mine" in server.files("me/with-page")["README.md"]


class TestLicence:
    def said(self, upload, out, name):
        return [
            line for line in upload(out, name, "--dry-run").err.splitlines() if "requires" in line
        ]

    def test_what_a_llama_licence_asks_for_is_said(self, out, upload):
        assert self.said(upload, out, "me/x") == []
        (out / "LICENSE.txt").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n")
        assert self.said(upload, out, "me/x") == [
            "The Llama 3.1 licence requires: a copy of the licence (there), a Notice file (NOT "
            "there), “Built with Llama” on the page (NOT there), a name that begins with “Llama” "
            "(NOT there)"
        ]
        (out / "LICENSE.txt").unlink()
        (out / "NOTICE").write_text("Llama 3.2 is licensed …")
        text = (out / "README.md").read_text() + "\nBuilt with Llama\n"
        (out / "README.md").write_text(text.replace("---\n", "---\nlicense: llama3.2\n", 1))
        assert self.said(upload, out, "me/Llama-3.2-x") == [
            "The Llama 3.2 licence requires: a copy of the licence (NOT there), a Notice file "
            "(there), “Built with Llama” on the page (there), a name that begins with “Llama” "
            "(there)"
        ]

    @pytest.mark.parametrize("licence", ["apache-2.0", "llama2", "llama"])
    def test_others_ask_for_nothing_here(self, out, upload, licence):
        text = (out / "README.md").read_text()
        (out / "README.md").write_text(text.replace("---\n", f"---\nlicense: {licence}\n", 1))
        assert self.said(upload, out, "me/x") == []


class TestCard:
    @pytest.mark.parametrize("form", ["llama", "pruned_llama", "dense"])
    def test_its_code_loads_model_and_tokenizer(self, made, form):
        page = (made / form / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        assert card.ID_PLACE in code
        space = {}
        exec(code.replace(card.ID_PLACE, repr(str(made / form))), space)
        ids = space["tokenizer"]("letters", return_tensors="pt")["input_ids"]
        assert space["model"](ids).logits.shape == (1, ids.shape[1], 260)

    def test_its_commands_have_the_options_of_every_step(self):
        def step(command, **options):
            return {"command": command, "version": "0", "options": options}

        history = [
            step("calibrate", samples=8, shuffle=None, bos=None, attention=[2, 16], tokens="ab"),
            step("score", target="q,k", lam=None, published=True, newton_iterations=3, seed=0),
            step("score", lam=1e-3, refine=2, published=False, pattern="$(evil) `x`\n```"),
            step("compensate", damping=[1e-4, 0.1]),
            step("export", format="auto"),
        ]
        assert card.commands(history, "me/tiny") == [
            "prunetool calibrate me/tiny --text TEXT --samples 8 --bos never "
            "--attention-samples 2 --attention-length 16 \\",
            "  | prunetool score --target q,k --published --newton-iterations 3 --seed 0 \\",
            "  | prunetool score --lambda 0.001 --refine 2 --pattern '$(evil) `x`\\n```' \\",
            "  | prunetool compensate --damping 0.0001,0.1 \\",
            "  | prunetool export OUT --format auto",
        ]

    def test_its_commands_make_the_same_again(self, made, call, tmp_path):
        """The pipe of the card, step by step, gives the history that it was made from."""
        scores = [
            ["--sparsity", ".2", "--multiple-of", "8", "--method", "newton", "--lambda", "inf"],
            ["--target", "gate,up", "--method", "wanda", "--pattern", "2:4", "--sparsity", ".5"],
        ]
        call("calibrate", made / "tiny", "--text", made / "text.txt", "--samples", 8,
             "--shuffle", 1, "--sequence-length", 32, "--stats", "all", "--bos", "always",
             "--work", "w", "-o", "0.jsonl")  # fmt: skip
        for number, words in enumerate(scores):
            call("score", *words, f"{number}.jsonl", "-o", f"{number + 1}.jsonl")
        call("compensate", "--damping", "0.01,1", f"{len(scores)}.jsonl", "-o", "last.jsonl")
        call("export", "first", "last.jsonl", "--format", "dense")
        history = json.loads((tmp_path / "last.jsonl").read_text().splitlines()[0])["history"]
        page = (tmp_path / "first/README.md").read_text()
        (pipe,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        steps = [shlex.split(step) for step in pipe.replace("\\\n", "").split(" | ")]
        assert [step[:2] for step in steps] == [
            ["prunetool", name]
            for name in ("calibrate", *["score"] * len(scores), "compensate", "export")
        ]
        shutil.copytree(made / "tiny", tmp_path / "tiny")
        shutil.copy(made / "text.txt", tmp_path / "TEXT")
        for number, step in enumerate(steps[:-1]):
            before = [f"again{number - 1}.jsonl"] if number else ["--work", "w2"]
            call(*step[1:], *before, "-o", f"again{number}.jsonl")
        last = tmp_path / f"again{len(steps) - 2}.jsonl"
        assert json.loads(last.read_text().splitlines()[0])["history"] == history
        call(*steps[-1][1:], last)
        assert names(tmp_path / "OUT") == names(tmp_path / "first")
        for name in names(tmp_path / "OUT") - {"README.md"}:  # where options may be in other order
            assert (tmp_path / "OUT" / name).read_bytes() == (
                tmp_path / "first" / name
            ).read_bytes()


@pytest.mark.parametrize(
    ("words", "terminal", "bars"), [([], True, True), (["-q"], True, False), ([], False, False)]
)
def test_bars_are_for_a_terminal(out, server, monkeypatch, words, terminal, bars):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    prunetool(*words, "upload", out, "me/x")
    assert are_progress_bars_disabled() is not bars

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
from huggingface_hub import constants

from prunetool import errors
from prunetool.checkpoint import hub as client
from prunetool.checkpoint import source
from prunetool.model import open_model
from tests import hub
from tests.conftest import error_of, tiny_config, write_checkpoint

SECRET = "hf_abcdefghijklmnop"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.fixture
def serve(checkpoint, tmp_path):
    servers = []

    def start(token=""):
        model = checkpoint("served", shards=2)
        (model / "pytorch_model.bin").write_bytes(b"pickled")
        servers.append(hub.start(model, token))
        return servers[-1], {
            "HF_ENDPOINT": servers[-1].address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
        }

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(serve, tmp_path, monkeypatch):
    """A Hub that this process talks to, with ``me/tiny`` and the cache in ``hub``."""
    started, _ = serve()
    hub.connect(started, tmp_path / "hub", monkeypatch)
    return started


def given(server):
    """Names of the files that were sent."""
    log = [entry for entry in server.log if entry.startswith("GET ") and "/resolve/" in entry]
    return sorted(entry.rsplit("/", 1)[1] for entry in log)


def says(model, *parts, kind=errors.PrunetoolError):
    """The one line by which a model is refused."""
    with pytest.raises(kind) as caught:
        open_model(str(model))
    line = str(caught.value)
    for part in parts:
        assert part in line
    assert len(line) <= errors.LONGEST
    assert "Error(" not in line
    return line


def test_a_hub_id_is_downloaded_and_only_what_is_needed(serve, process):
    server, environment = serve()
    result = json.loads(process("inspect", "me/tiny", **environment).stdout)
    assert result["layers"] == 3
    assert any(path.endswith("model-00002-of-00002.safetensors") for path in server.asked)
    assert not any(path.endswith(".bin") for path in server.asked)


def test_the_token_is_sent_and_never_printed(serve, process):
    _, environment = serve(SECRET)
    line = error_of(process("inspect", "me/tiny", ok=False, **environment))
    assert "me/tiny: is gated; accept its terms on the Hub and set HF_TOKEN" in line
    environment["HF_TOKEN"] = SECRET
    done = process("-v", "inspect", "me/tiny", **environment)
    assert SECRET not in done.stdout + done.stderr


def test_what_the_hub_does_not_have(serve, process):
    _, environment = serve()
    line = error_of(process("inspect", "me/absent", ok=False, **environment))
    assert "me/absent: no such directory or Hub repository" in line
    line = error_of(process("inspect", "me/tiny", "--revision", "v9", ok=False, **environment))
    assert "me/tiny: no revision 'v9'" in line


def test_a_hub_out_of_reach(process, tmp_path):
    done = process("inspect", "me/tiny", ok=False, HF_ENDPOINT="http://127.0.0.1:9",
               HF_HOME=str(tmp_path / "hf"), HF_TOKEN="")  # fmt: skip
    line = error_of(done)
    assert "me/tiny: no such directory, and the Hub did not provide it" in line
    assert "(no answer from http://127.0.0.1:9); check the connection" in line


class TestWhatIsTaken:
    def test_no_second_copy_of_the_weights(self, server):
        files = server.files("me/tiny")
        copies = ("consolidated.safetensors", "model.fp16.safetensors", "tf_model.h5",
                  "original/consolidated.00.pth", "onnx/model.onnx", "checkpoint-9/config.json",
                  "checkpoint-9/model.safetensors", "original/params.json", "a.gguf")  # fmt: skip
        small = {"LICENSE": b"free", "README.md": b"# Tiny", "training_args.json": b"{}"}
        server.publish("me/tiny", {**files, **dict.fromkeys(copies, b"copy"), **small})
        assert open_model("me/tiny").layers == 3
        expected = ["LICENSE", "README.md", "config.json", "model.safetensors.index.json",
                    *SHARDS, "tokenizer.json"]  # fmt: skip
        assert given(server) == sorted(expected)

    def test_a_single_file_before_an_index(self, server, checkpoint):
        single = (checkpoint("single", seed=1) / "model.safetensors").read_bytes()
        server.publish("me/tiny", {**server.files("me/tiny"), "model.safetensors": single})
        model = open_model("me/tiny")
        assert {info.shard.name for info in model.index.values()} == {"model.safetensors"}
        assert not set(SHARDS) & set(given(server))

    def test_names_in_the_index_are_no_patterns(self, server):
        files = server.files("me/tiny")
        index = json.loads(files["model.safetensors.index.json"])
        wild = {
            name: shard.replace("model-", "m[o]*-") for name, shard in index["weight_map"].items()
        }
        files |= {name.replace("model-", "m[o]*-"): files[name] for name in SHARDS}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": wild}).encode()
        server.publish("me/tiny", files)
        assert open_model("me/tiny").layers == 3
        assert not set(SHARDS) & set(given(server))

    def test_a_model_that_is_not_read_is_refused_before_its_weights(self, server):
        files = server.files("me/tiny")
        server.publish("me/tiny", {**files, "config.json": b'{"model_type": "mamba"}'})
        says("me/tiny", "model_type 'mamba'", kind=errors.ConfigError)
        assert not set(SHARDS) & set(given(server))

    def test_an_index_that_names_what_is_not_there_or_outside(self, server):
        files = server.files("me/tiny")
        del files[SHARDS[1]]
        server.publish("me/tiny", files)
        says("me/tiny", f"me/tiny: lacks {SHARDS[1]}, which its index names")
        index = {"weight_map": {"lm_head.weight": "../../x.safetensors"}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        server.publish("me/tiny", files)
        says("me/tiny", "outside the directory", kind=errors.CheckpointError)


class TestCache:
    def test_what_is_there_is_taken_without_the_network(self, server, monkeypatch):
        directory = open_model("me/tiny").directory
        asked = len(server.asked)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert open_model("me/tiny").directory == directory
        assert len(server.asked) == asked
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.point("http://127.0.0.1:9", monkeypatch)
        assert open_model("me/tiny").directory == directory

    def test_what_is_not_there_whole_is_said_without_the_network(self, server, monkeypatch):
        shard = open_model("me/tiny").directory / SHARDS[0]
        shard.unlink()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in ("me/tiny", "me/other"):
            says(
                name,
                f"{name}: no such directory, and the Hub did not provide it "
                "(HF_HUB_OFFLINE is set, and the cache does not hold all of it); unset",
                kind=errors.HubError,
            )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        open_model("me/tiny")
        assert shard.exists()

    def test_a_killed_download_goes_on(self, serve, tmp_path):
        server, environment = serve()
        words = [sys.executable, "-m", "prunetool", "inspect", "me/tiny"]
        started = subprocess.Popen(
            words, cwd=tmp_path, stdout=subprocess.PIPE, env={**os.environ, **environment}
        )
        done = []

        def kill(path):
            if path.endswith(SHARDS[1]):
                for _ in range(500):  # the other is on its way too
                    if list((tmp_path / "hf").rglob(SHARDS[0])):
                        break
                    done.append(started.poll())
                    os.sched_yield()
                started.kill()
                return True
            return False

        server.during = kill
        started.communicate()
        assert started.returncode == -9
        server.during = lambda path: False
        whole = {path.name for path in (tmp_path / "hf").rglob("*.safetensors") if path.exists()}
        assert SHARDS[1] not in whole
        server.log.clear()
        again = subprocess.run(
            words, cwd=tmp_path, capture_output=True, env={**os.environ, **environment}
        )
        assert again.returncode == 0, again.stderr
        assert set(given(server)) & set(SHARDS) == set(SHARDS) - whole

    def test_a_connection_that_breaks_is_taken_up(self, server):
        broken = []

        def cut(path):
            if path.endswith(SHARDS[1]) and not broken:
                broken.append(path)
                return True
            return False

        server.during = cut
        with suppress(errors.HubError):  # an older client leaves it to the next run
            open_model("me/tiny")
        assert broken
        assert open_model("me/tiny").layers == 3

    def test_a_full_disk_is_said(self, server, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device", "/hub/blobs/x.incomplete")

        monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
        says("me/tiny", "did not provide it (the disk is full); make room and run again")


class TestRefusals:
    """What the Hub answers, in words; the token in none of them."""

    @pytest.fixture
    def answers(self, server, monkeypatch):
        def answer(status, name="", message=""):
            def refuse(handler):
                handler.body(handler.path)
                handler.refuse(status, name, message)

            for method in ("do_GET", "do_HEAD"):
                monkeypatch.setattr(hub.Handler, method, refuse)

        return answer

    def test_a_wrong_token(self, server, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", SECRET)
        line = says("me/tiny", "me/tiny: the token was refused: it is wrong or has expired; set HF")
        assert SECRET not in line

    def test_a_private_repository_needs_a_token(self, server, monkeypatch):
        server.repositories["me/tiny"].private = True
        says("me/tiny", "me/tiny: no such directory or Hub repository; check it, or set HF_TOKEN")
        server.tokens[SECRET] = "read"
        monkeypatch.setenv("HF_TOKEN", SECRET)
        assert open_model("me/tiny").layers == 3
        says("me/other", "no such directory or Hub repository; check it, and the token's")

    @pytest.mark.parametrize(
        ("status", "said"),
        [
            (403, "the token lacks permission"),
            (500, "a fault of the Hub, status 500"),
            (503, "a fault of the Hub, status 503"),
            (418, "status 418: tea … …=x"),
        ],
    )
    def test_other_answers(self, answers, monkeypatch, status, said):
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        answers(status, message=f"tea {SECRET} https://u:{SECRET}@hub/?token={SECRET}")
        line = says("me/tiny", "me/tiny: no such directory, and the Hub did not provide it (")
        assert said.split(" …")[0] in line
        assert SECRET not in line
        assert "http" not in line.replace("https://…hub", "")

    def test_names_that_the_hub_cannot_have(self, server):
        for name in ("me/a--b", "me/a..b", "me/" + "x" * 97):
            says(name, "is not an id of the Hub; give an id such as owner/name")
        assert not server.asked

    def test_an_address_with_a_token_in_it(self):
        line = says(f"https://user:{SECRET}@huggingface.co/me/tiny", "give the id: me/tiny")
        assert SECRET not in line

    def test_secrets_are_taken_out(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "odd-token")
        text = client.without_secrets("GET http://u:p@h/x?X-Sig=abc&b=c odd-token hf_AbC1 hf_")
        assert text == "GET http://…h/x?…&… … … hf_"


class TestOtherThings:
    """MODEL given wrongly: what it is, and what to give."""

    def test_adapters(self, tmp_path, server):
        adapter = {
            "adapter_config.json": b'{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}',
            "adapter_model.safetensors": b"",
        }
        (tmp_path / "adapter").mkdir()
        for name, data in adapter.items():
            (tmp_path / "adapter" / name).write_bytes(data)
        server.publish("me/adapter", {**adapter, "README.md": b"an adapter"})
        for model in (tmp_path / "adapter", "me/adapter"):
            says(
                model,
                f"{model}: is an adapter of meta-llama/Llama-3.2-1B, not a model; merge it",
                "PeftModel.merge_and_unload()",
            )
        config = json.dumps(tiny_config()).encode()
        server.publish("me/unsloth", {**adapter, "config.json": config})
        says("me/unsloth", "me/unsloth: is an adapter of")

    def test_repositories_without_safetensors(self, server):
        config = {"config.json": json.dumps(tiny_config()).encode()}
        server.publish("me/a", {"a.Q4_0.gguf": b"GGUF", "README.md": b""})
        says(
            "me/a",
            "me/a: holds GGUF files and no safetensors; convert one to a checkpoint: "
            "prunetool convert FILE OUT",
        )
        server.publish("me/b", {**config, "pytorch_model-00001-of-00002.bin": b"", "x/y.gguf": b""})
        says(
            "me/b",
            "me/b: holds neither model.safetensors.index.json nor model.safetensors, "
            "only pickled files (never read); load it in transformers",
        )
        server.publish("me/c", config)
        says("me/c", "me/c: holds neither model.safetensors.index.json nor model.safetensors; give")
        server.publish("me/d", {"notes.txt": b""})
        says("me/d", "me/d: has no config.json; give a repository of a Llama model")

    def test_files_and_directories_of_something_else(self, tmp_path, checkpoint):
        model = checkpoint()
        (tmp_path / "gguf").mkdir()
        for name in ("gguf/a.gguf", "dense/pytorch_model.bin", "notes"):
            (tmp_path / name).write_bytes(b"x")
        says(
            tmp_path / "gguf/a.gguf",
            "is a GGUF file; convert it to a checkpoint: prunetool convert a.",
        )
        says(
            tmp_path / "gguf",
            "holds GGUF files and no safetensors; convert one to a checkpoint: prunetool c",
        )
        for name in ("model.safetensors", "config.json"):
            says(model / name, "is one file of a checkpoint; give its directory: ")
        says(model / "pytorch_model.bin", "is a pickled file, which is never read; load it in")
        says(tmp_path / "notes", "is neither a directory nor a Hub id")
        says(
            "https://huggingface.co/me/tiny/tree/main",
            "neither a directory nor a Hub id; give the id: me/tiny",
        )
        says("hf://me/tiny", "give the id: me/tiny")

    def test_the_cache_itself(self, server, tmp_path):
        snapshot = open_model("me/tiny").directory
        assert open_model(str(snapshot)).directory == snapshot
        root = snapshot.parent.parent
        assert root.name == "models--me--tiny"
        for directory in (root, snapshot.parent):
            says(directory, "is where the Hub's cache keeps me/tiny; give the id: me/tiny")
        says(root.parent, "hub: is the Hub's cache; give an id, such as me/tiny")

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("quantization_config", {"quant_method": "awq", "bits": 4, "x": [1] * 99},
             "is quantised (awq, 4 bits)"),
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True},
             "is quantised (bitsandbytes, 8 bits)"),
            ("quantization", {"group_size": 64, "bits": 4}, "is quantised (4 bits)"),
            ("quantization_config", [{"quant_method": 3}], "is quantised;"),
        ],
    )  # fmt: skip
    def test_quantised_models_name_their_original(self, tmp_path, key, value, said):
        model = write_checkpoint(tmp_path / "Llama-3-8B-AWQ", tiny_config())
        config = tiny_config(**{key: value})
        (model / "config.json").write_text(json.dumps(config))
        line = says(model, said, "give the unquantised original: probably Llama-3-8B")
        assert "{" not in line
        for front in ("base_model: meta/Llama-3-8B", "base_model:\n- meta/Llama-3-8B\n- x/y"):
            (model / "README.md").write_text(f"---\n{front}\n---\n")
            says(model, "original: meta/Llama-3-8B, as its card says")
        shutil.move(model, tmp_path / "plain")
        (tmp_path / "plain/README.md").unlink()
        says(tmp_path / "plain", "give the unquantised original, which its card may name")

    @pytest.mark.parametrize(
        ("name", "plain"),
        [("Llama-2-7B-GPTQ", "Llama-2-7B"), ("Llama-3.2-1B-Instruct-bnb-4bit", "Llama-3.2-1B-Inst"
          "ruct"), ("TinyLlama-1.1B-Chat-v1.0-AWQ", "TinyLlama-1.1B-Chat-v1.0"),
         ("Llama-3.1-8B-Instruct-FP8-dynamic", "Llama-3.1-8B-Instruct"),
         ("Llama-3-8B-unsloth-bnb-4bit", "Llama-3-8B"), ("Llama-3-8B-4bit", "Llama-3-8B"),
         ("Meta-Llama-3-8B-quantized.w4a16", "Meta-Llama-3-8B"), ("Llama-3-8B", "Llama-3-8B")],
    )  # fmt: skip
    def test_names_of_originals(self, name, plain):
        assert source.QUANTISED_NAME.sub("", name) == plain

    def test_quantised_repositories_are_refused_before_their_weights(self, server):
        config = tiny_config(quantization_config={"quant_method": "gptq", "bits": 4})
        files = {**server.files("me/tiny"), "config.json": json.dumps(config).encode()}
        server.publish("me/tiny-GPTQ", files)
        says(
            "me/tiny-GPTQ",
            "me/tiny-GPTQ: is quantised (gptq, 4 bits); give the unquantised "
            "original: probably tiny",
        )
        assert not set(SHARDS) & set(given(server))


class TestFrontMatter:
    def test_it_is_read(self, tmp_path):
        (tmp_path / "README.md").write_text(
            "\ufeff---\nlicense: mit\n---\n# Title\n---\nx: 1\n---\n"
        )
        assert source.front_matter(tmp_path) == {"license": "mit"}

    @pytest.mark.parametrize(
        "text",
        ["", "# Title\n---\nlicense: mit\n---\n", "---\n- a\n---\n", "---\na: [\n---\n", "---\n---",
         "---\na: &a {b: 1}\nc: {<<: *a}\n---\n", "---\na: !!python/name:os.system x\n---\n",
         "---\nlicense: mit\n---\n" + "x" * (1 << 18), "---\n" + "[" * 5000 + "\n---\n"],
        ids=["empty", "none", "list", "cut", "nothing", "merge", "code", "long", "deep"],
    )  # fmt: skip
    def test_what_cannot_be_read_says_nothing(self, tmp_path, text):
        assert source.front_matter(tmp_path) == {}
        (tmp_path / "README.md").write_text(text)
        assert source.front_matter(tmp_path) == {}

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
        assert source.front_matter(tmp_path) == {}

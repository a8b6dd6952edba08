import json

import pytest

from tests import hub
from tests.conftest import error_of

SECRET = "hf_abcdefghijklmnop"


@pytest.fixture
def serve(checkpoint, tmp_path):
    servers = []

    def start(token=""):
        model = checkpoint("served", shards=2)
        (model / "pytorch_model.bin").write_bytes(b"pickled")
        servers.append(hub.start(model, token))
        address = f"http://127.0.0.1:{servers[-1].server_port}"
        return servers[-1], {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "",
        }  # fmt: skip

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_hub_id_is_downloaded_and_only_what_is_needed(serve, run):
    server, environment = serve()
    result = json.loads(run("inspect", "me/tiny", **environment).stdout)
    assert result["layers"] == 3
    assert any(path.endswith("model-00002-of-00002.safetensors") for path in server.asked)
    assert not any(path.endswith(".bin") for path in server.asked)


def test_the_token_is_sent_and_never_printed(serve, run):
    _, environment = serve(SECRET)
    line = error_of(run("inspect", "me/tiny", ok=False, **environment))
    assert "me/tiny: is gated; accept its terms on the Hub and set HF_TOKEN" in line
    environment["HF_TOKEN"] = SECRET
    done = run("-v", "inspect", "me/tiny", **environment)
    assert SECRET not in done.stdout + done.stderr


def test_what_the_hub_does_not_have(serve, run):
    _, environment = serve()
    line = error_of(run("inspect", "me/absent", ok=False, **environment))
    assert "me/absent: no such directory or Hub repository" in line
    line = error_of(run("inspect", "me/tiny", "--revision", "v9", ok=False, **environment))
    assert "me/tiny: no revision 'v9'" in line


def test_a_hub_out_of_reach(run, tmp_path):
    done = run("inspect", "me/tiny", ok=False, HF_ENDPOINT="http://127.0.0.1:9",
               HF_HOME=str(tmp_path / "hf"), HF_TOKEN="")  # fmt: skip
    assert "me/tiny: no such directory, and the Hub did not give it" in error_of(done)

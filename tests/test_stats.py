"""The table of sites decides what is summed, kept and read."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from prunetool import stats
from prunetool.llama.config import parse_config
from prunetool.llama.parts import MATRICES
from prunetool.records import LayerRecord
from prunetool.stats import GIVEN, SITES, Site, Stats
from tests.conftest import tiny_config


def test_every_matrix_is_given_one_site():
    matrices = [matrix for site in SITES.values() for matrix in site.matrices]
    assert sorted(matrices) == sorted(MATRICES)
    assert set(GIVEN) == set(MATRICES)


@pytest.mark.parametrize("kept", ["structural", "token", "all"])
def test_a_file_holds_what_the_table_says(calibrated, tmp_path, kept):
    calibrated(stats=kept)
    config = parse_config(tiny_config(), "")
    for layer in range(3):
        arrays = load_file(tmp_path / f"dense.work/stats/layer-{layer:05d}.stats.safetensors")
        shapes = {name: array.shape for name, array in arrays.items()}
        assert shapes == stats.array_shapes(config, config.layer_shapes[layer], kept)


def test_a_row_is_all_that_a_site_needs(monkeypatch, checkpoint, text, call, tmp_path):
    """The residual stream before the MLP, as the input of gate and up."""
    monkeypatch.setitem(SITES, "before_mlp", Site(("gate", "up"), "before_mlp"))
    stream = call("calibrate", checkpoint(), "--text", text, "--samples", 4, "--sequence-length",
                  32, "--held-out", 0, "--stats", "all", "--work", "w")  # fmt: skip
    config = parse_config(tiny_config(), "")
    record = json.loads(stream.splitlines()[1])
    sums = Stats(tmp_path / "w", LayerRecord(0, record["files"]), config)
    assert sums.tokens == 4 * 32
    gram, total = sums["before_mlp.gram"], sums["before_mlp.total"]
    assert (gram.shape, total.shape) == ((64 * 65 // 2,), (64,))
    assert np.abs(total).min() > 0

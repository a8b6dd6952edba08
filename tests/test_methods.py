"""The tables of methods decide what `score` does: a row is all that a method needs."""

import inspect
import json
import re
import sys
import types

import click
import numpy as np
import pytest
from safetensors.numpy import load_file

from prunetool import methods
from prunetool.commands.score import score
from prunetool.methods import QK, UNITS, WEIGHTS, Method
from prunetool.pruning.units import Ranking
from prunetool.steps.mask import Masking
from prunetool.steps.score import Scoring

ROWS = [pytest.param(row, id=name) for rows in (UNITS, WEIGHTS, QK) for name, row in rows.items()]


@pytest.fixture
def toy(monkeypatch):
    """Rows of a method ``toy``: its units go in the order of their number, its weights too."""
    module = types.ModuleType("toy")
    module.units = lambda of: Ranking(np.arange(of.blocks or len(of.W), dtype=float))
    module.weights = lambda W, A: np.arange(W.size, dtype=float).reshape(W.shape)
    monkeypatch.setitem(sys.modules, "prunetool.toy", module)
    monkeypatch.setitem(UNITS, "toy", Method("toy:units"))
    monkeypatch.setitem(WEIGHTS, "toy", Method("toy:weights"))
    choice = next(option for option in score.params if option.name == "method").type
    monkeypatch.setattr(choice, "choices", (*choice.choices, "toy"))


def test_a_row_is_all_that_a_method_of_units_needs(toy, calibrated, call, tmp_path):
    _, records = calibrated()
    *_, last, _ = call(
        "score", records, "--method", "toy", "--sparsity", ".3", "--multiple-of", 1
    ).splitlines()
    kept = load_file(tmp_path / "dense.work" / json.loads(last)["files"]["kept.channels"])
    gone = np.flatnonzero(kept["channels"] == 0)
    assert 0 < len(gone) < 96
    np.testing.assert_array_equal(gone, np.arange(len(gone)))


def test_a_row_is_all_that_a_method_of_weights_needs(toy, calibrated, call):
    _, records = calibrated()
    stream = call("score", records, "--method", "toy", "--sparsity", ".25", "--target", "up")
    mask = json.loads(stream.splitlines()[1])["values"]["masks"]["up"]
    assert (mask["method"], mask["removed"]) == ("toy", 0.25)


def test_a_name_without_a_row_scores_nothing(calibrated, call):
    _, records = calibrated()
    for targets in (("heads",), ("up",), ("q", "k")):
        job = Scoring if targets == ("heads",) else Masking
        with pytest.raises(KeyError, match="nonesuch"):
            job(types.SimpleNamespace(model=None, work=None), targets, {"method": "nonesuch"})
    with pytest.raises(click.UsageError, match="'nonesuch' is not one of 'greedy', "):
        call("score", records, "--method", "nonesuch", "--sparsity", ".3")


@pytest.mark.parametrize("row", ROWS)
def test_a_function_takes_the_options_of_its_row(row):
    function = row.load()
    first = [None] * (1 + (row in WEIGHTS.values()) + row.needs_gradients)
    inspect.signature(function).bind(*first, **dict.fromkeys(row.options))
    given = {option.name for option in score.params} | {"sparsity"}  # one of its sparsities
    assert set(row.options) <= given


def test_help_names_every_method_and_the_defaults_that_differ():
    with click.Context(score) as context:
        said = " ".join(score.get_help(context).split())
    (method,) = (option for option in score.params if option.name == "method")
    assert set(methods.NAMES) <= set(re.findall(r"[\w-]+", method.help))
    assert "(0.0001; greedy: 0.01; fisher: 0.01; sparsegpt: 0.01); x>=0]" in said
    assert "[default: (unstructured; wanda: per-output)]" in said

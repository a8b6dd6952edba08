import numpy as np
import pytest

from prunetool.llama.config import LayerShape
from prunetool.llama.parts import PARTS
from prunetool.llama.weights import Layer, scatter, select
from prunetool.model import open_model


def test_every_part_has_its_place_in_a_layer():
    assert tuple(PARTS) == Layer._fields


@pytest.mark.parametrize("biased", [False, True])
def test_select_then_scatter_zeroes_what_was_not_kept(checkpoint, biased):
    model = open_model(str(checkpoint(attention_bias=biased, mlp_bias=biased)))
    layer, shape = model.layer(0), model.config.layer_shapes[0]
    groups, channels = np.array([1]), np.array([0, 5, 95])
    small = select(layer, shape, groups, channels)
    assert small.q.shape == (32, 64)
    assert small.k.shape == (16, 64)
    assert small.o.shape == (64, 32)
    assert small.down.shape == (64, 3)
    np.testing.assert_array_equal(small.q, layer.q[32:])
    np.testing.assert_array_equal(small.o, layer.o[:, 32:])
    np.testing.assert_array_equal(small.v, layer.v[16:])
    np.testing.assert_array_equal(small.gate, layer.gate[[0, 5, 95]])
    back = scatter(small, LayerShape(2, 1, 3), shape, groups, channels)
    np.testing.assert_array_equal(back.q[32:], layer.q[32:])
    assert not back.q[:32].any()
    assert not back.o[:, :32].any()
    np.testing.assert_array_equal(back.down[:, [0, 5, 95]], layer.down[:, [0, 5, 95]])
    assert np.count_nonzero(back.down.any(axis=0)) == 3
    if biased:
        np.testing.assert_array_equal(small.q_bias, layer.q_bias[32:])
        np.testing.assert_array_equal(back.up_bias[[0, 5, 95]], layer.up_bias[[0, 5, 95]])
        np.testing.assert_array_equal(back.o_bias, layer.o_bias)


def test_keeping_all_changes_nothing(checkpoint):
    model = open_model(str(checkpoint()))
    layer, shape = model.layer(1), model.config.layer_shapes[1]
    same = select(layer, shape, np.arange(2), np.arange(96))
    for ours, theirs in zip(same, layer, strict=True):
        np.testing.assert_array_equal(ours, theirs)

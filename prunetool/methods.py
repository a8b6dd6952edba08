"""The methods of ``prunetool score``: one row each, named nowhere else.

Choices, help, defaults, checks, cache keys of scores and the tests read these tables. To add a
method, write its function (`units` and `unstructured` have examples) and its row.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple


def load(function: str) -> Callable[..., Any]:
    """Import a row's function, ``module:name`` in prunetool."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(import_module(f"prunetool.{module}"), name)
    return found


class Method(NamedTuple):
    """A way to score what could be removed.

    Attributes:
      function: ``module:name`` in prunetool, imported when it is used.
      options: options of ``score`` that the function takes as keywords; scores are kept by their
        values, so without ``sparsity`` a sweep shares them.
      needs_gram: it requires the Gram matrix of the inputs.
      needs_gradients: it requires the mean squared gradients at the outputs, its third argument.
      needs_slopes: it requires gradients of the text's own labels, `Evidence.slopes`.
      raw_loss: its scores are a loss in output units. Layers are then compared by loss per
        parameter; the scores of other methods are already relative to their layer.
      weighs_tokens: ``--weighting token`` changes its order even without ``--stats token``.
      sums_energy: it also returns the output energy of all units together.
      cuts: it returns a mask rather than scores.
      updates: ``compensate`` moves the weights that it keeps, by `unstructured.sparsegpt`.
      damping: default, as a fraction of the mean diagonal of its system.
      pattern: default pattern.
      allocation: default allocation; None: ``loss`` where it can be.
      published: options that ``--published`` sets, by name (None: left to the function); None if
        there is no such setting.
    """

    function: str
    options: tuple[str, ...] = ()
    needs_gram: bool = False
    needs_gradients: bool = False
    needs_slopes: bool = False
    raw_loss: bool = False
    weighs_tokens: bool = False
    sums_energy: bool = False
    cuts: bool = False
    updates: bool = False
    damping: float = 1e-4
    pattern: str = "unstructured"
    allocation: str | None = None
    published: Mapping[str, Any] | None = None

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        return load(self.function)

    def given(self, how: Mapping[str, Any]) -> dict[str, Any]:
        """The function's keywords, selected from all options of ``score``."""
        return {name: how[name] for name in self.options}


_NEWTON = ("sparsity", "lam", "damping")

# The first row of each table is the default.
# Functions of `units.Evidence` that return a `units.Ranking`.
UNITS = {
    "greedy": Method("pruning.units:greedy", ("damping",), raw_loss=True, damping=1e-2),
    "newton": Method(
        "pruning.units:newton",
        (*_NEWTON, "newton_iterations"),
        sums_energy=True,
        published={"allocation": "global", "lam": 1.0, "weighting": "none"},
    ),
    "newton-box": Method("pruning.units:newton_box", _NEWTON, sums_energy=True),
    "newton-tied": Method("pruning.units:newton_tied", _NEWTON, sums_energy=True),
    "obs": Method("pruning.units:obs", ("damping",), raw_loss=True),
    "flap": Method("pruning.units:flap"),
    "taylor": Method(
        "pruning.units:taylor",
        ("taylor", "reduce"),
        raw_loss=True,
        needs_slopes=True,
        allocation="share",
        published={
            "allocation": "share",
            "layers": "4:-2",
            "multiple_of": 1,
            "min_channels": 1,
            "weighting": "none",
        },
    ),
    "wanda-sp": Method("pruning.units:wanda_sp", raw_loss=True, weighs_tokens=True),
    "magnitude": Method("pruning.units:magnitude", raw_loss=True),
    "random": Method("pruning.units:random", ("seed",)),
}
# Functions of W and the Gram matrix of its inputs (or None) that return scores, or a mask.
WEIGHTS = {
    "fisher": Method(
        "pruning.unstructured:chosen_by_fisher",
        ("sparsity", "pattern", "damping"),
        needs_gram=True,
        needs_gradients=True,
        cuts=True,
        updates=True,
        damping=1e-2,
    ),
    "wanda": Method("pruning.unstructured:wanda", needs_gram=True, pattern="per-output"),
    "sparsegpt": Method(
        "pruning.unstructured:chosen_by_sparsegpt",
        ("sparsity", "pattern", "damping"),
        needs_gram=True,
        cuts=True,
        updates=True,
        damping=1e-2,
    ),
    "magnitude": Method("pruning.unstructured:magnitude"),
    "random": Method("pruning.unstructured:random", ("seed",)),
}
# For q and k together: functions of `steps.attention.AttentionLayer` that return scores of both.
QK = {
    "attention-diag": Method("steps.attention:saliency"),
    "attention-gd": Method(
        "steps.attention:learned_by_descent",
        ("lam", "learning_rate", "iterations", "published"),
        published={"lam": None, "learning_rate": None, "iterations": 100},
    ),
}
# Of taylor: the sums over a unit's weights in a matrix, and how the matrices are merged.
TAYLOR = ("first", "vector", "second", "mix")
REDUCE = ("sum", "mean", "max", "prod", "first")
# For the hidden dimensions: functions of the stream's Gram matrix H and k that return Q (`basis`).
HIDDEN = {"pca": Method("pruning.basis:principal")}
HIDDEN_TARGETS = ("hidden",)
BASES = SHARED, LAYER = "shared", "layer"  # one for the whole model, or one for each norm
UNIT_TARGETS = GROUPS, CHANNELS = "heads", "channels"  # of ``--target``; heads: whole KV groups
PATTERNS = ("unstructured", "per-output", "2:4")
UPDATED = frozenset(name for name, method in WEIGHTS.items() if method.updates)
PUBLISHED = tuple(n for n, row in (UNITS | QK | WEIGHTS).items() if row.published is not None)
DAMPED = tuple(n for n, row in (UNITS | WEIGHTS).items() if "damping" in row.options)
# Options that only some methods take: of the others they are refused, and not recorded.
OF_METHODS = {
    name for table in (UNITS, WEIGHTS, QK) for row in table.values() for name in row.options
}
OF_METHODS -= {"sparsity", "pattern", "published"}
NAMES = tuple(dict.fromkeys((*UNITS, *WEIGHTS, *QK, *HIDDEN)))


def methods_of(targets: Sequence[str]) -> dict[str, Method]:
    """The methods that score these targets of ``score``, by name."""
    if set(UNIT_TARGETS) & set(targets):
        return UNITS
    if targets == HIDDEN_TARGETS:
        return HIDDEN
    return QK | WEIGHTS if set(targets) == {"q", "k"} else WEIGHTS


def default_of(option: str) -> str:
    """The defaults of ``damping`` or ``pattern`` in words, for ``--help``."""
    usual = Method._field_defaults[option]
    others = {
        name: getattr(method, option)
        for name, method in (UNITS | QK | WEIGHTS).items()
        if getattr(method, option) != usual
    }
    return "; ".join([str(usual), *(f"{name}: {value}" for name, value in others.items())])

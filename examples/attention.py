"""Attention-matrix pruning on synthetic data: the three sweeps of arXiv 2410.11261, figure 2.

    python examples/attention.py OUT.csv [--plots DIR] [--table]

Sweeps λ (absolute for the published settings, relative to the Hessian's largest eigenvalue for the
tuned ones), the sequence length n and the sparsity rho; d = 64, k = 16 and 64 sequences, mean of
three seeds. The error is ‖P̃ − P‖_F / ‖P‖_F, non-causal, on the calibration sequences and on as many
held-out ones. About five minutes on two busy cores. An OUT.csv that is there is not made again.

The paper does not release its data. `gaussian` is X = N(0, I); `correlated` has a covariance with
eigenvalues 1/i in random directions and channels of unequal scale. W = W_Q W_Kᵀ of Gaussian
factors, scaled so that the logits' standard deviation is LOGIT_STD.
"""

import argparse
import csv
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunetool.pruning import attention_mask as am
from prunetool.pruning import unstructured

D = 64
SEEDS = (0, 1, 2)
LOGIT_STD = 2.0  # half of the rows then spread over about 18 to 45 of 128 keys, by their entropy
CHANNEL_STD = 0.5  # of the logarithm of a channel's scale
REFINE_STEPS = 60
REFINE_RATE = 0.05  # Adam's first step, as a fraction of W's root mean square; falls to 0
BASE = {"lambda": am.PUBLISHED_SYNTHETIC.lam, "relative lambda": 1e-3, "n": 128, "rho": 0.5}
SWEEPS = {
    "lambda": (0.004, 0.01, 0.04, 0.1, 0.4),
    "relative lambda": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "n": (32, 64, 128, 256),
    "rho": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
}
PANELS = [(data, k) for data in ("gaussian", "correlated") for k in (16, 64)]
COLUMNS = ["sweep", "value", "k", "data", "method", "calibration", "held_out"]
# Which λ a method takes, if any; the others stand beside it as they are at the base point.
METHODS = {
    "gd-published": "lambda",
    "gd-tuned-raw": "relative lambda",
    "gd-tuned": "relative lambda",
    "gd-refined": None,  # of the base point's gd-tuned: it is the slowest
    **dict.fromkeys(("diag-H", "wanda", "wanda-two-sided", "sparsegpt", "magnitude", "random")),
}


class Case(NamedTuple):
    data: str
    k: int
    n: int
    seed: int


@cache
def problem(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Calibration X and held-out X, (k, n, d), and W, (d, d)."""
    rng = np.random.default_rng(case.seed)
    W = rng.standard_normal((D, D)) @ rng.standard_normal((D, D)).T
    root = np.eye(D)  # rows of X are N(0, rootᵀ root)
    if case.data == "correlated":
        directions = np.linalg.qr(rng.standard_normal((D, D)))[0]
        scales = np.exp(CHANNEL_STD * rng.standard_normal(D))
        root = (directions / np.sqrt(np.arange(1, D + 1))) @ directions.T * scales
    W *= LOGIT_STD / np.linalg.norm(root @ W @ root.T)
    X = rng.standard_normal((2 * case.k, case.n, D)) @ root
    X, held_out, W = (jnp.asarray(a, jnp.float32) for a in (X[: case.k], X[case.k :], W))
    return X, held_out, W


@jax.jit
def relative_error(X: jax.Array, W: jax.Array, V: jax.Array) -> jax.Array:
    P = am.attention_matrix(X, W, causal=False)
    return jnp.linalg.norm(am.attention_matrix(X, V, causal=False) - P) / jnp.linalg.norm(P)


@jax.jit
def curvature(X: jax.Array, W: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest eigenvalue and the diagonal of the Hessian at M = 1, without λ."""
    hessian = partial(am.hessian_product, X=X, W=W, lam=0.0, causal=False)
    diagonal = am.hessian_diagonal(X, W, lam=0.0, causal=False)
    return am.largest_eigenvalue(hessian, W), diagonal


@cache
def curvature_at(case: Case) -> tuple[float, np.ndarray]:
    X, _, W = problem(case)
    largest, diagonal = curvature(X, W)
    return float(largest), np.asarray(diagonal)


@cache
def descended(case: Case, lam: float, learning_rate: float) -> np.ndarray:
    X, _, W = problem(case)
    M, _ = am.gradient_descent_mask(
        X,
        W,
        lam=lam,
        learning_rate=learning_rate,
        causal=False,
        steps=am.PUBLISHED_SYNTHETIC.iterations,
    )
    return np.asarray(M)


@jax.jit
def refine(X: jax.Array, W: jax.Array, mask: jax.Array) -> jax.Array:
    """Adam on the kept weights; the last quarter of the sequences says which step is kept."""
    cut = 3 * len(X) // 4
    fit, check = X[:cut], X[cut:]
    P, P_check = (am.attention_matrix(x, W, causal=False) for x in (fit, check))

    def squared(V: jax.Array, X: jax.Array, P: jax.Array) -> jax.Array:
        error = am.attention_matrix(X, mask * V, causal=False) - P
        return jnp.sum(error**2) / jnp.sum(P**2)

    def step(state: tuple[jax.Array, ...], t: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        V, m, v, best, least = state
        g = jax.grad(squared)(V, fit, P)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        move = m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
        V = V - rate * (1 - t / REFINE_STEPS) * move
        error = squared(V, check, P_check)
        best, least = jnp.where(error < least, V, best), jnp.minimum(error, least)
        return (V, m, v, best, least), None

    rate = REFINE_RATE * jnp.sqrt(jnp.mean(W**2))
    zero = jnp.zeros_like(W)
    start = (W, zero, zero, W, squared(W, check, P_check))
    (*_, best, _), _ = jax.lax.scan(step, start, jnp.arange(1.0, REFINE_STEPS + 1))
    return mask * best


@cache
def gram(case: Case) -> np.ndarray:
    X = np.asarray(problem(case)[0], np.float64).reshape(-1, D)
    return X.T @ X


def tuned(case: Case, relative: float) -> np.ndarray:
    largest, _ = curvature_at(case)
    return descended(case, relative * largest, 1 / (largest * (1 + relative)))


def tuned_score(case: Case, relative: float) -> np.ndarray:
    return tuned(case, relative) ** 2 * curvature_at(case)[1]


def pruned(method: str, case: Case, rho: float, lam: float) -> np.ndarray:
    """W as the method leaves it, (d, d)."""
    X, _, W = problem(case)
    W, A = np.asarray(W), gram(case)
    norms = np.sqrt(np.diagonal(A))
    # `unstructured` has output = x Wᵀ: here the output is x W, so it gets Wᵀ.
    if method == "sparsegpt":
        return unstructured.sparsegpt(W.T, A, damping=0.01, sparsity=rho)[1].T
    if method == "wanda":
        return W * unstructured.keep(unstructured.wanda(W.T, A), rho, "per-output").T
    if method == "gd-refined":
        score = tuned_score(case, BASE["relative lambda"])
        return np.asarray(refine(X, W, unstructured.keep(score, rho)))
    score = {
        "gd-published": lambda: descended(case, lam, 0.1 / lam),
        "gd-tuned-raw": lambda: tuned(case, lam),
        "gd-tuned": lambda: tuned_score(case, lam),
        "diag-H": lambda: curvature_at(case)[1],
        "wanda-two-sided": lambda: np.abs(W) * np.outer(norms, norms),
        "magnitude": lambda: np.abs(W),
        "random": lambda: np.random.default_rng((case.seed, 1)).random(W.shape),
    }[method]()
    return W * unstructured.keep(score, rho)


@cache
def errors(method: str, case: Case, rho: float, lam: float) -> np.ndarray:
    """On the calibration and on the held-out sequences."""
    X, held_out, W = problem(case)
    V = jnp.asarray(pruned(method, case, rho, lam), jnp.float32)
    return np.array([relative_error(X, W, V), relative_error(held_out, W, V)])


def mean_errors(method: str, data: str, k: int, point: dict[str, float]) -> np.ndarray:
    lam = point[METHODS[method]] if METHODS[method] else 0.0
    cases = [Case(data, k, point["n"], seed) for seed in SEEDS]
    return np.mean([errors(method, case, point["rho"], lam) for case in cases], axis=0)


def run(path: Path) -> None:
    rows = []
    for sweep, values in SWEEPS.items():
        for data, k in PANELS:
            print(f"{sweep}: {data}, {k} sequences", file=sys.stderr, flush=True)
            for value, method in product(values, METHODS):
                both = mean_errors(method, data, k, BASE | {sweep: value})
                rows.append([sweep, value, k, data, method, *(f"{error:.4f}" for error in both)])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def held_out_errors(path: Path) -> dict[tuple[str, str, int], dict[str, dict[float, float]]]:
    """sweep, data, k → method → value → held-out error."""
    found: dict = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            panel = found.setdefault((row["sweep"], row["data"], int(row["k"])), {})
            panel.setdefault(row["method"], {})[float(row["value"])] = float(row["held_out"])
    return found


def print_tables(found: dict) -> None:
    for (sweep, data, k), methods in found.items():
        values = SWEEPS[sweep]
        print(f"\nHeld-out error, {data}, {k} sequences, by {sweep}:\n")
        print(f"| method | {' | '.join(f'{value:g}' for value in values)} |")
        print(f"|---|{'---:|' * len(values)}")
        for method, line in methods.items():
            print(f"| {method} | {' | '.join(f'{line[value]:.3f}' for value in values)} |")


def print_losses(found: dict) -> None:
    parts = []
    for data, k in PANELS:
        at_base = {name: line[BASE["n"]] for name, line in found["n", data, k].items()}
        ours = at_base.pop("gd-published")
        better = sorted((error, name) for name, error in at_base.items() if error < ours)
        names = ", ".join(f"{name} {error:.3f}" for error, name in better) or "none"
        parts.append(f"{data} k={k}: {ours:.3f} against {names}")
    print(f"gd-published loses at the base point, held out: {'; '.join(parts)}")


def pyplot():
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("--plots needs matplotlib: pip install 'prunetool[plots]'")
    pyplot.switch_backend("agg")
    return pyplot


def plot(found: dict, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for sweep in SWEEPS:
        figure, axes = pyplot().subplots(
            2, 2, figsize=(12, 9), sharex=True, sharey=True, layout="constrained"
        )
        for (data, k), axis in zip(PANELS, axes.flat, strict=True):
            for index, (method, line) in enumerate(found[sweep, data, k].items()):
                axis.plot(*zip(*line.items(), strict=True), f"C{index}o-", ms=4, label=method)
            axis.set(title=f"{data}, {k} sequences", yscale="log", xlabel=sweep)
            axis.set(ylabel="held-out relative error", xscale="linear" if sweep == "rho" else "log")
            axis.grid(which="both", alpha=0.3)
        handles = axes.flat[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=5)
        figure.savefig(directory / f"attention-{sweep.replace(' ', '-')}.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw one PNG a sweep")
    parser.add_argument("--table", action="store_true", help="print Markdown tables")
    given = parser.parse_args()
    if given.plots:
        pyplot()  # say what is missing before the run, not after it
    if given.csv.exists():
        print(f"{given.csv} is there and not made again", file=sys.stderr)
    else:
        run(given.csv)
    found = held_out_errors(given.csv)
    if given.table:
        print_tables(found)
    if given.plots:
        plot(found, given.plots)
    print_losses(found)


if __name__ == "__main__":
    main()

"""The papers' mathematics: arrays in, arrays out; one file per idea. Does no file access.

[NP] is Shen et al., *Numerical Pruning for Efficient Autoregressive Models*, arXiv 2412.12441.
Symbols, shared by all modules:

| symbol | is | shape |
|---|---|---|
| W | weight of o_proj or down_proj as used, output = X W | (D, D') |
| X | calibration inputs of that matrix, one row per token | (N, D) |
| A | Gram matrix XᵀX | (D, D) |
| m | mean input | (D,) |
| K | (W Wᵀ) ∘ A, Gram matrix of the units' contributions to the output | (D, D) |
| z, y | mask of the kept units, and 1 - z | (D,) |
| s | units to remove, ρD; ρ is the sparsity | |
| κ | 1ᵀK⁻¹1 | |
| p, k | indices of the pruned and kept rows | |

Solves are float64 LAPACK through SciPy, on the host: their sizes differ between layers, so JAX
would compile each one anew.
"""

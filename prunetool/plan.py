"""Memory, disk and arithmetic that each step needs, from the shapes alone."""

import math
from typing import NamedTuple

import numpy as np

from prunetool.llama.weights import input_sizes, part_shapes
from prunetool.model import Model
from prunetool.pruning.compensation import CHOICE_OUTPUTS
from prunetool.pruning.unstructured import BINS
from prunetool.stats import EVERY, MODEL, SITES, array_shapes, gradient_shapes

FILE_BYTES = 4096  # of names, shapes and checksums in a file of a layer
# Resident memory of the program before it reads anything: with JAX in use, and without.
WITH_JAX, WITHOUT = 400_000_000, 150_000_000
LOGIT_TOKENS = 256  # tokens whose logits, (V, 256) float32, exist at a time


class Need(NamedTuple):
    """The needs of a step."""

    memory: int  # peak resident bytes
    disk: int  # bytes added
    products: float = 0.0  # floating-point operations in the dtype of the forward
    solves: float = 0.0  # in float64
    speed: float = 1.0  # that the solves reach, as a fraction of large products' and systems'


def stats_bytes(
    model: Model, stats: str, attention: tuple[int, int], stats_dtype: str, *, first: bool = False
) -> int:
    """Bytes of all stats that calibrate keeps.

    Args:
      model, stats, stats_dtype: as in `calibrate`.
      attention: samples, and their length.
      first: whether there are sums over first tokens.
    """

    def size(kept: str) -> int:
        files = (array_shapes(model.config, shape, kept) for shape in model.config.layer_shapes)
        return sum(math.prod(shape) for file in files for shape in file.values())

    itemsize, values = np.dtype(stats_dtype).itemsize, size(stats)
    of_first = 0
    if first:
        of_first = itemsize * size("structural") + model.layers * FILE_BYTES
    if stats in EVERY:
        values += model.config.hidden_size * (model.config.hidden_size + 1)  # of the last stream
    kept_inputs = attention[0] * attention[1] * model.config.hidden_size * 4
    per_layer = FILE_BYTES + kept_inputs
    # For the tokens to fit and those held out.
    return of_first + 2 * (values * itemsize + model.layers * per_layer)


def hidden_bytes(model: Model, samples: int, length: int) -> int:
    """Bytes of the residual stream, two generations of it."""
    return 2 * samples * length * model.config.hidden_size * 4


def gradient_bytes(
    model: Model,
    sequences: int,
    length: int,
    stats: str,
    stream_dtype: str,
    stats_dtype: str,
    labels: str = MODEL,
) -> int:
    """Bytes of the streams kept for a backward pass, two gradients, and its sums."""
    if not sequences:
        return 0
    stream = sequences * length * model.config.hidden_size * np.dtype(stream_dtype).itemsize
    values = sum(
        math.prod(extent)
        for shape in model.config.layer_shapes
        for extent in gradient_shapes(model.config, shape, labels, stats).values()
    )
    sums = values * np.dtype(stats_dtype).itemsize + model.layers * FILE_BYTES
    return (model.layers + 3) * stream + sums


def units_bytes(model: Model) -> int:
    """Bytes of the units' scores and of the files of kept units."""
    # A score, one to compare, a loss and whether it stays; for each count of KV groups, which go.
    return sum(
        25 * (shape.kv_heads + shape.channels) + shape.kv_heads**2 + FILE_BYTES
        for shape in model.config.layer_shapes
    )


def masks_bytes(model: Model, parts: tuple[str, ...], *, by_loss: bool) -> int:
    """Bytes of the masks of these matrices, new values of q and k included.

    Args:
      model: the checkpoint.
      parts: the matrices.
      by_loss: the losses of their weights are counted, to share the sparsity out.
    """
    total = model.layers * (4 * BINS * len(parts) + FILE_BYTES) if by_loss else 0
    for shape in model.config.layer_shapes:
        sizes = {part: int(np.prod(part_shapes(model.config, shape)[part])) for part in parts}
        total += sum(size // 8 + (4 * size if part in "qk" else 0) for part, size in sizes.items())
    return total


def basis_bytes(model: Model, *, by_norm: bool) -> int:
    """Upper bound on the bytes of the basis of the hidden dimensions, or of one for each norm."""
    count = 2 * model.layers if by_norm else 1
    return count * (4 * model.config.hidden_size**2 + FILE_BYTES) + 16 * model.layers


def refit_bytes(model: Model, layers: int, kept: float = 1.0) -> int:
    """Upper bound on the bytes of the refitted weights of some layers."""
    sizes = (
        sum(input_sizes(model.config, shape).values())
        for shape in model.config.layer_shapes[:layers]
    )
    return int(4 * model.config.hidden_size * kept * sum(sizes))


def layer_bytes(model: Model) -> int:
    """Bytes of the largest layer as stored."""
    sizes = [model.layer_parameters(shape) for shape in model.config.layer_shapes]
    return max(sizes) * np.dtype(model.dtype).itemsize


def cache_bytes(model: Model, length: int) -> int:
    """Bytes of the keys and values of one sequence, in all layers, float32."""
    config = model.config
    return 2 * model.layers * config.widest.kv_heads * config.head_dim * length * 4


def weights_bytes(model: Model, dtype: str) -> int:
    """Bytes of the whole model in the dtype of the products, layers padded to the widest."""
    config = model.config
    ends = config.vocab_size * config.hidden_size * (1 if config.tied else 2)
    in_layers = model.layers * model.layer_parameters(config.widest)
    return (in_layers + ends) * np.dtype(dtype).itemsize


def self_text_memory(model: Model, length: int, width: int, dtype: str) -> int:
    """Peak bytes while the model writes its own text, ``width`` sequences at a time."""
    config = model.config
    V, D = config.vocab_size, config.hidden_size
    # The embedding as stored, two layers read ahead; scores and their exponentials.
    memory = WITH_JAX + weights_bytes(model, dtype) + width * cache_bytes(model, length)
    memory += V * D * np.dtype(model.dtype).itemsize + 2 * layer_bytes(model) + 16 * V * width
    return int(1.1 * memory)


def calibrate(
    model: Model,
    samples: int,
    length: int,
    batch: int,
    stats: str,
    stats_dtype: str,
    gradients: int = 0,
    first: int = 0,
) -> Need:
    """Needs of calibrate: one process with one device, ``batch`` sequences at a time.

    Args:
      model: the checkpoint.
      samples, length: number of sequences, and tokens in each.
      batch, stats, stats_dtype: as of the command.
      gradients: sequences that also run backward, their streams kept in bfloat16.
      first: as many tokens as in so many sequences also run as texts of one token.
    """
    D, T = model.config.hidden_size, batch * length
    widest = model.config.widest
    squares = sum(size**2 for size in input_sizes(model.config, widest).values())
    of_stream = sum(not site.of_units and site.is_kept(stats) for site in SITES.values())
    squares = squares * (2 if stats == "token" else 1) + of_stream * D**2
    # Three copies of the weights (read, in use, on the device), sums in float64 and packed; per
    # token, gate and up in tiles and joined, and their product, in float32 and rounded.
    memory = WITH_JAX + 3 * layer_bytes(model) + squares * 4
    memory += squares // 2 * np.dtype(stats_dtype).itemsize + T * (22 * widest.channels + 24 * D)
    tokens, products = (samples + first) * length, 0.0
    for shape in model.config.layer_shapes:
        features = input_sizes(model.config, shape).values()
        products += 2 * tokens * model.layer_parameters(shape)
        products += 2 * tokens * length * shape.heads * model.config.head_dim  # causal
        products += tokens * sum(size * (size + 1) for size in features)
        products += tokens * of_stream * D * (D + 1)
    disk = hidden_bytes(model, samples + first, length)
    disk += stats_bytes(model, stats, (0, 0), stats_dtype, first=first > 0)
    if gradients:
        back = backward(model, gradients, length, batch, stats, stats_dtype)
        memory, disk = max(memory, back.memory), disk + back.disk
        products += back.products
    # Measured at 7B and 135M: the allocator takes up to a tenth more.
    return Need(int(1.1 * memory), disk, products)


def backward(
    model: Model, sequences: int, length: int, batch: int, stats: str, stats_dtype: str
) -> Need:
    """Needs of calibrate's backward pass over some sequences; as in `calibrate`."""
    config = model.config
    D, V, T = config.hidden_size, config.vocab_size, batch * length
    itemsize = np.dtype(model.dtype).itemsize
    # As XLA says of the compiled layer: in addition to the forward's, all matrices transposed; per
    # token, gradients where the forward has values, and at the ends. And the sums of o and down.
    layer = 4 * layer_bytes(model) + T * (22 * config.widest.channels + 40 * D)
    layer += 2 * D**2 * 4 + D**2 * np.dtype(stats_dtype).itemsize
    # The head, twice more to be multiplied from its other side, and four arrays of logits.
    top = 3 * V * D * itemsize + 16 * V * min(length, LOGIT_TOKENS)
    tokens = sequences * length
    products = tokens * 4.0 * V * D  # the logits, and the gradient before them
    for shape in config.layer_shapes:
        # The layer again, but for down's product; and those from its outputs to its inputs.
        products += tokens * (4 * model.layer_parameters(shape) - 2 * D * shape.channels)
        # Forward twice, once of them block by block, and back.
        products += 4 * 2 * tokens * length * shape.heads * config.head_dim
        products += tokens * 2 * D * (D + 1)
    disk = gradient_bytes(model, sequences, length, stats, "bfloat16", stats_dtype)
    return Need(WITH_JAX + max(layer, top), disk, products)


def score(model: Model, stats_dtype: str) -> Need:
    """Needs of score by default: greedy, by loss."""
    D = model.config.hidden_size
    size = max(input_sizes(model.config, model.config.widest).values())
    packed = size * (size + 1) // 2
    # The inverse, and what is left of it, copied once; W C three times, and the metric's root.
    memory = WITHOUT + 16 * size**2 + packed * (8 + np.dtype(stats_dtype).itemsize)
    memory += size * D * (24 + np.dtype(model.dtype).itemsize) + 8 * D**2
    solves = 0.0
    for shape in model.config.layer_shapes:
        for n in input_sizes(model.config, shape).values():
            # The metric's root and W C; the inverse, its updates, and the factor of the curve.
            solves += D**3 / 3 + n * D**2 + n**3 * (1 + 2 / 3 + 1 / 3) + 2 * n**2 * D
    # Products of few rows, and passes over memory: measured at 1536 and at 4096 channels.
    return Need(memory, units_bytes(model), solves=solves, speed=1 / 3)


def compensate(model: Model, sparsity: float, dampings: int) -> Need:
    """Needs of compensate with this many dampings tried on held-out tokens."""
    D = model.config.hidden_size
    kept = 1 - sparsity
    size = max(input_sizes(model.config, model.config.widest).values())
    k = kept * size
    blocks = k**2 + k * (size - k) + (size - k) ** 2
    memory = int(WITHOUT + 16 * blocks + 32 * k * D + 8 * size * D)
    solves = 0.0
    for shape in model.config.layer_shapes:
        for n in input_sizes(model.config, shape).values():
            m = kept * n
            tried = min(D, CHOICE_OUTPUTS)
            solves += (dampings + 1) * m**3 / 3 + (dampings * tried + D) * 4 * m**2
            solves += 2 * m * (n - m) * (2 * tried + 2 * D)
    return Need(memory, refit_bytes(model, model.layers, kept), solves=solves)


def recover(model: Model, sparsity: float, samples: int, held_out: int, length: int) -> Need:
    """Needs of recover: one epoch, on all that is kept.

    Args:
      model: the dense checkpoint.
      sparsity: fraction of the layers' parameters that was removed.
      samples, held_out: sequences to train on, and that only measure.
      length: tokens in each.
    """
    config = model.config
    D, V = config.hidden_size, config.vocab_size
    kept = [int((1 - sparsity) * model.layer_parameters(shape)) for shape in config.layer_shapes]
    part = max(math.prod(extent) for extent in part_shapes(config, config.widest).values())
    itemsize = np.dtype(model.dtype).itemsize
    # A layer as read, in float32; two for the products, and its matrices transposed; of one part
    # the weights and moments, before and after. Values of a layer and the head as in `backward`,
    # with the logits of both models. Measured at 7B and 135M: a tenth more.
    layer = max(kept) * (4 + 3 * itemsize) + length * (22 * config.widest.channels + 40 * D)
    head = 3 * V * D * itemsize + 32 * V * min(length, LOGIT_TOKENS)
    memory = int(1.1 * (WITH_JAX + max(layer + 24 * part, head)))
    tokens = samples * length
    # Once forward for the loss, again and back with two products each; and the head's logits twice
    # and back once. Held out sequences are measured `MEASURED` times and once before.
    products = (2.0 * sum(kept) * 4 + 2.0 * V * D * 4) * tokens
    products += (2.0 * sum(kept) + 4.0 * V * D) * held_out * length * 5
    dense = sum(map(model.layer_parameters, config.layer_shapes))
    products += 2.0 * dense * (samples + held_out) * length
    stream = length * D * 4
    disk = 16 * sum(kept) + 12 * max(kept) + (2 * (samples + held_out) + model.layers + 3) * stream
    return Need(memory, disk, products)


def export(model: Model, sparsity: float) -> Need:
    """Needs of export with really smaller matrices."""
    in_layers = sum(model.layer_parameters(shape) for shape in model.config.layer_shapes)
    parameters = model.parameters() - sparsity * in_layers
    ends = model.config.vocab_size * model.config.hidden_size * (1 if model.config.tied else 2)
    itemsize = np.dtype(model.dtype).itemsize
    memory = WITHOUT + max(3 * layer_bytes(model), ends * itemsize)
    return Need(memory, int(parameters * itemsize))

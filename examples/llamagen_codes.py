"""Ids for `calibrate --tokens` from the ImageNet codes that LlamaGen's training extracts.

    python llamagen_codes.py imagenet384_codes imagenet384_labels ids.npy --count 1000

Both directories hold N.npy: codes (1, augmentations, G²), of which the first is taken, and a label
(1,). The pictures are drawn at random, by --seed.
"""

import argparse
from pathlib import Path

import numpy as np

CODEBOOK = 16384


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("codes", "labels", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = sorted(path.name for path in given.codes.glob("*.npy"))
    if len(names) < given.count:
        parser.exit(1, f"{given.codes} has {len(names)} of {given.count} pictures\n")
    chosen = np.random.default_rng(given.seed).choice(names, given.count, replace=False)
    rows = [
        [CODEBOOK + int(np.load(given.labels / name).item()), *np.load(given.codes / name)[0, 0]]
        for name in chosen
    ]
    np.save(given.out, np.array(rows, np.int32))


if __name__ == "__main__":
    main()

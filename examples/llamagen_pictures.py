"""Pictures from the codes that `prunetool sample` writes, by LlamaGen's own tokenizer.

    cd LlamaGen    # a checkout of github.com/FoundationVision/LlamaGen, with torch and Pillow
    python llamagen_pictures.py codes.npy vq_ds16_c2i.pt OUT              # OUT/00000-class207.png …
    python llamagen_pictures.py codes.npy vq_ds16_c2i.pt samples.npz      # for ADM's evaluator

An .npz holds all pictures in one array, 256 pixels across, as LlamaGen measures FID: made at their
own size, resized by bicubic interpolation, uint8. Its evaluator (Inception, 50,000 pictures) is
guided-diffusion's evaluator.py, which needs TensorFlow and its reference batch.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

BATCH = 8
MEASURED = 256  # pixels
CODEBOOK, WIDTH = 16384, 8


def decoder(path):
    """LlamaGen's tokenizer, from the checkout in the current directory."""
    sys.path.insert(0, ".")
    from tokenizer.tokenizer_image.vq_model import VQ_models

    model = VQ_models["VQ-16"](codebook_size=CODEBOOK, codebook_embed_dim=WIDTH)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    return model.eval()


@torch.no_grad()
def pictures(model, codes, size=None):
    """uint8 arrays of codes (n, G²), (n, pixels, pixels, 3)."""
    grid = math.isqrt(codes.shape[1])
    for start in range(0, len(codes), BATCH):
        batch = torch.from_numpy(codes[start : start + BATCH].astype(np.int64))
        x = model.decode_code(batch, [len(batch), WIDTH, grid, grid])  # in [-1, 1]
        if size:
            x = interpolate(x, size=(size, size), mode="bicubic")
        yield torch.clamp(127.5 * x + 128, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("codes", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    ids = np.load(given.codes)
    classes, codes = ids[:, 0] - CODEBOOK, ids[:, 1:]
    model = decoder(given.tokenizer)
    if given.out.suffix == ".npz":
        made = np.concatenate(list(pictures(model, codes, MEASURED)))
        np.savez(given.out, made)
        print(f"{len(made)} pictures in {given.out}")
        return
    given.out.mkdir(exist_ok=True)
    made = (picture for batch in pictures(model, codes) for picture in batch)
    for n, (chosen, picture) in enumerate(zip(classes, made, strict=True)):
        Image.fromarray(picture).save(given.out / f"{n:05d}-class{chosen}.png")
    print(f"{len(codes)} pictures in {given.out}")


if __name__ == "__main__":
    main()

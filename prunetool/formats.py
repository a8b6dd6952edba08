"""The formats of ``prunetool export``: one row each, named nowhere else.

To add one, write a function that makes OUT of a checkpoint, and its row.
"""

from pathlib import Path
from typing import NamedTuple


class Format(NamedTuple):
    """What export writes.

    Attributes:
      help: what it is.
      dense: the original shapes, with zeros.
      suffix: OUT is a file whose name ends so; empty: the directory of a checkpoint.
      check: ``module:function`` in prunetool of the model, whose tokenizer goes along, and of the
        config to be written. It raises ConfigError if the format cannot hold them; called before
        anything is written.
      finish: the function that makes OUT of the checkpoint, which is written beside it first. It
        takes the model and OUT; a name, the limit of a file's bytes, and whether to overwrite.
    """

    help: str
    dense: bool = False
    suffix: str = ""
    check: str = ""
    finish: str = ""

    def directory(self, out: Path) -> Path:
        """Where the checkpoint is written: OUT, or beside it if OUT is a file."""
        return out.with_name(f"{out.name}.checkpoint") if self.suffix else out

    def wrong_name(self, out: Path) -> str:
        """What is wrong with OUT's name; empty if nothing is."""
        if not self.suffix or (out.suffix == self.suffix and out.stem):
            return ""
        return f"this --format writes a file: name it {out.name}{self.suffix}"


# The first row is the default.
FORMATS = {
    "auto": Format(
        "smaller matrices, as a stock architecture if the layers are alike, else with a loader file"
    ),
    "dense": Format("the original shapes with zeros, which loads as MODEL does", dense=True),
    "gguf": Format(
        "a file OUT.gguf for llama.cpp, f16; convert has other types",
        suffix=".gguf",
        check="steps.gguf:check",
        finish="steps.gguf:convert_checkpoint",
    ),
}

"""Write two disjoint halves of Python's language reference, to calibrate on and to measure on.

python examples/topics.py DIRECTORY
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics


def paragraphs(name: str) -> list[str]:
    return topics[name].strip("\n").split("\n\n")


names = sorted(topics)
measure = "\n".join(topics[name] for name in names[1::2])
# Topics repeat one another: paragraphs to measure on stay out of the other half.
measured = {part.strip() for name in names[1::2] for part in paragraphs(name)}
calibrate = "\n\n".join(
    part for name in names[::2] for part in paragraphs(name) if part.strip() not in measured
)
for half, text in (("calibrate", calibrate), ("measure", measure)):
    (Path(sys.argv[1]) / f"topics.{half}.txt").write_text(text, encoding="utf-8")

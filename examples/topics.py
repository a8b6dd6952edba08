"""Write two disjoint halves of Python's language reference, to calibrate on and to measure on.

python examples/topics.py DIRECTORY
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

names = sorted(topics)
for half, name in enumerate(("calibrate", "measure")):
    text = "\n".join(topics[topic] for topic in names[half::2])
    (Path(sys.argv[1]) / f"topics.{name}.txt").write_text(text, encoding="utf-8")

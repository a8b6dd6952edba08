"""Items with four choices, made of any text: which words go on after these?

    python examples/cloze.py wiki.test.raw cloze.jsonl
    prunetool evaluate OUT --against MODEL --text wiki.test.raw --choices cloze.jsonl > all.json

The right choice is what follows in the text. The wrong ones are as many words, from the same place
of the nearest other paragraphs, so that topic and style do not tell. Chance is a quarter.
"""

import argparse
import json
import random
from pathlib import Path

CONTEXT, CHOICE, WRONG = 32, 8, 3  # words of each, and how many wrong choices
NEAR = 6  # paragraphs before and after, from which they come


def items(text: str, count: int, seed: int) -> list[dict]:
    """Up to ``count`` items from paragraphs that are long enough."""
    paragraphs = [line.split() for line in text.splitlines()]
    paragraphs = [words for words in paragraphs if len(words) >= CONTEXT + CHOICE]
    if len(paragraphs) <= WRONG:
        raise SystemExit(f"{len(paragraphs)} paragraphs of {CONTEXT + CHOICE} words: too few")
    draw = random.Random(seed)
    places = list(range(len(paragraphs)))
    draw.shuffle(places)
    made = []
    for place in places[:count]:
        near = range(max(0, place - NEAR), min(len(paragraphs), place + NEAR + 1))
        others = draw.sample([other for other in near if other != place], WRONG)
        choices = [paragraphs[n][CONTEXT : CONTEXT + CHOICE] for n in (place, *others)]
        order = list(range(WRONG + 1))
        draw.shuffle(order)
        made.append(
            {
                "context": " ".join(paragraphs[place][:CONTEXT]),
                "choices": [" " + " ".join(choices[n]) for n in order],
                "answer": order.index(0),
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = items(given.text.read_text("utf-8"), given.items, given.seed)
    given.out.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in made))
    print(f"{len(made)} items in {given.out}")


if __name__ == "__main__":
    main()

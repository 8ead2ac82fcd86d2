"""A task that needs no download: how does a held-out passage of the embedded corpus go on?

The model reads 60 words of a chapter that it was not trained on and chooses between the 15 that
follow and 15 from each of three other held-out chapters of the same translation, which follow 60
words there. The rows are a function of the corpus alone. Chance is 25 %.
"""

import random
import re

from data.sources import corpus
from eval.tasks.rows import Row

CONTEXT_WORDS, ENDING_WORDS = 60, 15
CANDIDATES = 4
PASSAGES = 300


def passages() -> list[Row]:
    """context, endings, gold: PASSAGES rows, spread evenly over the held-out chapters.

    Raises:
      ValueError: the packages of the corpus are not installed.
    """
    cut = [
        (chapter.translation, number, context, ending)
        for number, chapter in enumerate(
            chapter for chapter in corpus.chapters() if chapter.held_out
        )
        for context, ending in _cut(chapter.text)
    ]
    draw = random.Random(0)
    rows = []
    for i in range(PASSAGES):
        translation, number, context, ending = cut[i * len(cut) // PASSAGES]
        others = [
            text for other, chapter, _, text in cut if other == translation and chapter != number
        ]
        endings = [ending, *draw.sample(others, CANDIDATES - 1)]
        draw.shuffle(endings)
        rows.append({"context": context, "endings": endings, "gold": endings.index(ending)})
    return rows


def _cut(text: str) -> list[tuple[str, str]]:
    """(context, ending) of each stretch of the chapter, without its heading."""
    body = text.partition("\n\n")[2]
    words = list(re.finditer(r"\S+", body))
    length = CONTEXT_WORDS + ENDING_WORDS
    pairs = []
    for start in range(0, len(words) - length + 1, length):
        middle, stop = start + CONTEXT_WORDS, start + length
        context = body[words[start].start() : words[middle - 1].end()]
        pairs.append((context, body[words[middle].start() : words[stop - 1].end()]))
    return pairs

"""Scores of answers and captions: exact match, BLEU-4, CIDEr-D, nats, each with a bootstrap interval over images.

Not METEOR or SPICE (they need Java). Text is lower-cased, punctuation is dropped and words are split at spaces: close
to the Penn Treebank tokenizer of the COCO caption scripts but not the same, so compare only with numbers made here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = re.compile(r"[^\w\s']|_")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _PUNCTUATION.sub(" ", text.lower()).split()


def same_answer(prediction: str, answer: str) -> bool:
    """Exact match of the words."""
    return words(prediction) == words(answer)


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu_statistics(prediction: str, references: Sequence[str]) -> np.ndarray:
    """Ten numbers to be summed over a corpus: matches and totals for n = 1..4, prediction and closest reference length.

    Papineni et al. 2002, section 2: clipped counts, closest reference length (the shorter one on a tie).
    """
    predicted, written = words(prediction), [words(r) for r in references]
    counts: list[int] = []
    for n in range(1, 5):
        ours, most = ngrams(predicted, n), Counter[tuple[str, ...]]()
        for reference in written:
            most |= ngrams(reference, n)
        counts += [sum((ours & most).values()), max(0, len(predicted) - n + 1)]
    closest = min((abs(len(r) - len(predicted)), len(r)) for r in written)[1]
    return np.array([*counts, len(predicted), closest], dtype=np.float64)


def bleu4(statistics: np.ndarray) -> float:
    """BLEU-4 of a corpus from the sum (10,) of `bleu_statistics`."""
    matches, totals = statistics[0:8:2], statistics[1:8:2]
    if matches.min() == 0:
        return 0.0
    brevity = min(0.0, 1.0 - statistics[9] / statistics[8])
    return float(math.exp(brevity + np.log(matches / totals).mean()))


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D of each prediction, (n,) float64, on the usual scale where human captions are near 1.

    Vedantam et al. 2015 (arXiv:1411.5726), section 4 with the changes "-D": counts clipped to the reference's and a
    Gaussian penalty on length; document frequencies from `references`; mean over n = 1..4, times 10.
    """
    written = [[words(r) for r in texts] for texts in references]
    totals = np.zeros(len(predictions))
    for n in range(1, 5):
        counts = [[ngrams(tokens, n) for tokens in texts] for texts in written]
        documents: Counter[tuple[str, ...]] = Counter()
        for texts in counts:
            documents.update(set().union(*texts))
        for i, prediction in enumerate(predictions):
            tokens = words(prediction)
            ours = _tf_idf(ngrams(tokens, n), documents, len(written))
            for reference, gram in zip(written[i], counts[i], strict=True):
                gap = len(tokens) - len(reference)
                near = _clipped_cosine(ours, _tf_idf(gram, documents, len(written)))
                totals[i] += near * math.exp(-(gap**2) / (2 * sigma**2)) / len(written[i])
    return totals * 10 / 4


def _tf_idf(grams: Counter, documents: Counter, num_documents: int) -> dict[tuple[str, ...], float]:
    log_documents = math.log(max(1, num_documents))
    return {gram: count * (log_documents - math.log(max(1, documents[gram]))) for gram, count in grams.items()}


def _clipped_cosine(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    norms = math.sqrt(sum(v * v for v in ours.values())) * math.sqrt(sum(v * v for v in theirs.values()))
    if norms == 0:
        return 0.0
    return sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs) / norms


def mean_interval(values: np.ndarray, groups: np.ndarray, seed: int, draws: int = 1000) -> tuple[float, list[float]]:
    """Mean of `values` (n,) and its 95% bootstrap interval, redrawing whole groups (images), not single answers."""
    _, inverse = np.unique(groups, return_inverse=True)
    sums = np.bincount(inverse, weights=values)
    counts = np.bincount(inverse).astype(np.float64)
    weights = _redraws(len(sums), seed, draws)
    means = (weights @ sums) / np.maximum(weights @ counts, 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), [float(low), float(high)]


def bleu4_interval(statistics: np.ndarray, seed: int, draws: int = 1000) -> tuple[float, list[float]]:
    """BLEU-4 of a corpus and its 95% bootstrap interval; statistics (n, 10), one row per image."""
    redrawn = _redraws(len(statistics), seed, draws) @ statistics
    low, high = np.quantile([bleu4(row) for row in redrawn], [0.025, 0.975])
    return bleu4(statistics.sum(0)), [float(low), float(high)]


def _redraws(n: int, seed: int, draws: int) -> np.ndarray:
    """(draws, n): how often each of n groups occurs in each bootstrap sample."""
    generator = np.random.default_rng([seed, 0xB007])
    return generator.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)

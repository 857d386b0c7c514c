"""Caption and answer scores against their formulas written as plain loops over dense vectors."""

import itertools
import math

import numpy as np
import pytest

from sslvit.vlm.score import (
    bleu4,
    bleu4_interval,
    bleu_statistics,
    cider_d,
    mean_interval,
    same_answer,
    words,
)

WORDS = ["a", "the", "dog", "cat", "runs", "on", "green", "grass", "two", "men", "play", "ball"]


def sentences(count, seed, low=4, high=11):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(low, high))) for _ in range(count)]


def noisy(text, seed):
    generator = np.random.default_rng(seed)
    return " ".join(w if generator.random() < 0.8 else str(generator.choice(WORDS)) for w in text.split())


REFERENCES = [sentences(3, seed) for seed in range(20)]
PREDICTIONS = [noisy(texts[0], seed) for seed, texts in enumerate(REFERENCES)]


def runs(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def plain_bleu4(predictions, references):
    """Papineni et al. 2002, equations of section 2.3, one loop for each sum."""
    log_precision = 0.0
    for n in range(1, 5):
        matched = total = 0
        for prediction, texts in zip(predictions, references, strict=True):
            grams = runs(prediction.split(), n)
            total += len(grams)
            for gram in set(grams):
                most = max(runs(text.split(), n).count(gram) for text in texts)
                matched += min(grams.count(gram), most)
        log_precision += math.log(matched / total) / 4
    c = r = 0
    for prediction, texts in zip(predictions, references, strict=True):
        length = len(prediction.split())
        c += length
        r += sorted((abs(len(text.split()) - length), len(text.split())) for text in texts)[0][1]
    return (1.0 if c > r else math.exp(1 - r / c)) * math.exp(log_precision)


def plain_cider_d(predictions, references):
    """Vedantam et al. 2015, equations 1 to 3 with CIDEr-D's clipping and length penalty, over dense tf-idf vectors."""
    scores = np.zeros(len(predictions))
    for n in range(1, 5):
        everything = [text for texts in references for text in texts] + predictions
        vocabulary = sorted(set(itertools.chain(*(runs(text.split(), n) for text in everything))))
        frequency = [
            max(1, sum(any(gram in runs(t.split(), n) for t in texts) for texts in references)) for gram in vocabulary
        ]
        idf = np.log(len(references) / np.array(frequency, dtype=np.float64))

        def vector(text, n=n, vocabulary=vocabulary, idf=idf):
            grams = runs(text.split(), n)
            return np.array([grams.count(gram) for gram in vocabulary]) * idf

        for i, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
            g = vector(prediction)
            for text in texts:
                h = vector(text)
                norm = np.linalg.norm(g) * np.linalg.norm(h)
                near = (np.minimum(g, h) * h).sum() / norm if norm else 0.0
                gap = len(prediction.split()) - len(text.split())
                scores[i] += near * math.exp(-(gap**2) / 72) / len(texts) * 10 / 4
    return scores


def test_bleu4():
    statistics = np.stack([bleu_statistics(p, r) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)])
    assert bleu4(statistics.sum(0)) == pytest.approx(plain_bleu4(PREDICTIONS, REFERENCES), abs=1e-12)
    value, (low, high) = bleu4_interval(statistics, seed=0)
    assert low < value < high


def test_bleu4_of_short_predictions_pays_for_brevity():
    short = [" ".join(p.split()[:4]) for p in PREDICTIONS]
    statistics = sum(bleu_statistics(p, r) for p, r in zip(short, REFERENCES, strict=True))
    assert bleu4(statistics) == pytest.approx(plain_bleu4(short, REFERENCES), abs=1e-12)
    assert bleu4(bleu_statistics("dog", ["the dog runs"])) == 0.0


def test_cider_d():
    np.testing.assert_allclose(cider_d(PREDICTIONS, REFERENCES), plain_cider_d(PREDICTIONS, REFERENCES), atol=1e-12)
    assert cider_d(["", "x"], [["a dog"], ["a cat"]]).tolist() == [0.0, 0.0]


def test_cider_d_prefers_the_right_caption():
    right = cider_d([texts[0] for texts in REFERENCES], REFERENCES).mean()
    wrong = cider_d([texts[0] for texts in REFERENCES[1:] + REFERENCES[:1]], REFERENCES).mean()
    assert right > 3 * wrong


def test_words_and_exact_match():
    assert words("A dog's ball, on_the  Grass!") == ["a", "dog's", "ball", "on", "the", "grass"]
    assert same_answer(" Red.", "red") and not same_answer("dark red", "red") and not same_answer("", "red")


def test_interval_redraws_images_not_answers():
    """Ten answers that always agree within an image carry no more information than one."""
    right = np.repeat(np.arange(40) % 2, 10).astype(float)
    images = np.repeat(np.arange(40), 10)
    value, (low, high) = mean_interval(right, images, seed=0)
    expected = 1.96 * 0.5 / math.sqrt(40)
    assert value == 0.5
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    _, (low_apart, high_apart) = mean_interval(right, np.arange(400), seed=0)
    assert high_apart - low_apart < 0.5 * (high - low)

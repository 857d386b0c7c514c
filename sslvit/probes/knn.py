"""Weighted k-nearest-neighbour classification on frozen features (DINO, arXiv:2104.14294, section 4.2; Wu et al. 2018).

Cosine similarity; each of the k nearest training images votes for its class with exp(similarity / .07). faiss searches
blocks of the training set, so memory stays near that of the features. Not an approximate search: every answer equals
brute force, ties included.

Order and ties, so that a plain loop can repeat every prediction: neighbours are ordered by similarity (in float64,
to 9 decimals), then by training index; classes by votes (as shares of all votes, to 9 decimals), then by label. faiss
answers in float32; queries for which that could matter (near-ties) are answered again in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
import torch

from sslvit.errors import InputError

PROTOCOL = "k-NN (DINO): cosine, votes exp(sim/.07)"
NUM_NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07

# Rows normalised and searched at a time: under 100 MB in all.
TRAIN_BLOCK, QUERY_BLOCK = 25_000, 1000
EXACT_TRAIN_BLOCK, EXACT_QUERY_BLOCK = 16_384, 256
SPARE = 8  # neighbours fetched beyond k, so that a tie at the border is seen
NEAR = 2e-6  # float32 similarities nearer than this may be out of order
NEAR_SHARES = 2e-5  # likewise for shares of votes: exp(. / .07) magnifies by 14


def normalised(features: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """A copy of the rows (n, D) at unit length in float32 or `dtype`; a zero row stays zero."""
    features = np.array(features, dtype=dtype, order="C")
    features /= np.maximum(np.sqrt(np.einsum("nd,nd->n", features, features)), 1e-12)[:, None]
    return features


def check_features(*arrays: np.ndarray) -> None:
    """InputError when there is nothing to compare or a feature is not finite."""
    for values in arrays:
        if len(values) == 0:
            raise InputError("a probe needs at least one training and one validation image; one of the sets is empty")
        bad = ~np.isfinite(values.sum(axis=1, dtype=np.float64))
        if bad.any():
            raise InputError(
                f"{bad.sum()} of {len(values)} feature rows hold NaN or infinity; the encoder's weights are damaged "
                "or diverged: use an earlier checkpoint or precision=fp32"
            )


def knn(
    train: np.ndarray,
    train_labels: np.ndarray,
    queries: np.ndarray,
    *,
    ks: Sequence[int] = NUM_NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, np.ndarray]:
    """Rank the classes of `queries` (m, D) by their neighbours in `train` (n, D), for each k (at most n are used).

    k -> labels (m, r), the likeliest first, r = min(5, k, number of classes); classes without votes fill up the places
    in order of label. `train_labels` (n,) are any integers.
    """
    check_features(train, queries)
    classes, ids = np.unique(train_labels, return_inverse=True)
    ranking = {k: np.empty((len(queries), min(5, k, len(classes))), dtype=classes.dtype) for k in ks}
    for start in range(0, len(queries), QUERY_BLOCK):
        asked = queries[start : start + QUERY_BLOCK]
        similarities, neighbours = nearest(train, asked, max(ks), borders=ks)
        for k, ranked in ranking.items():
            ranked[start : start + QUERY_BLOCK] = _vote(
                similarities[:, :k], neighbours[:, :k], train, ids, classes, asked, ranked.shape[1], temperature
            )
    return ranking


def nearest(
    train: np.ndarray, queries: np.ndarray, k: int, borders: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """The min(k, n) rows of `train` (n, D) most like each row of `queries` (m, D): similarities and indices (m, k).

    Which rows are among the first k is exact, ties included, also for the smaller numbers of neighbours in `borders`.
    """
    k = min(k, len(train))
    borders = sorted({b for b in [*borders, k] if b < len(train)})
    similarities = np.empty((len(queries), k), dtype=np.float32)
    indices = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        block = normalised(queries[start : start + QUERY_BLOCK])
        best, where = _search(train, block, min(k + SPARE, len(train)))
        near_tie, run_off = _doubtful(best, borders, len(train))
        for q in np.flatnonzero(near_tie & ~run_off):
            best[q], where[q] = _reorder(train, queries[start + q], where[q])
        far = np.flatnonzero(run_off)
        for part in (far[i : i + EXACT_QUERY_BLOCK] for i in range(0, len(far), EXACT_QUERY_BLOCK)):
            best[part], where[part] = _search_exact(train, queries[start + part], best.shape[1])
        similarities[start : start + len(block)] = best[:, :k]
        indices[start : start + len(block)] = where[:, :k]
    return similarities, indices


def _search(train: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 search of unit queries, train block by train block: (m, k) each, by similarity, then index."""
    best = torch.empty((len(queries), 0))
    where = torch.empty((len(queries), 0), dtype=torch.int64)
    for start in range(0, len(train), TRAIN_BLOCK):
        rows = normalised(train[start : start + TRAIN_BLOCK])
        found, index = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        del rows  # before the next ones are made
        best = torch.cat([best, torch.from_numpy(found)], dim=1)
        where = torch.cat([where, torch.from_numpy(index).add_(start)], dim=1)
        del found, index
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    similarities, indices = best.numpy(), where.numpy()
    for q in np.flatnonzero((similarities[:, 1:] == similarities[:, :-1]).any(axis=1)):
        indices[q] = indices[q, np.lexsort((indices[q], -similarities[q]))]
    return similarities, indices


def _doubtful(best: np.ndarray, borders: Sequence[int], num_train: int) -> tuple[np.ndarray, np.ndarray]:
    """(m,) bool twice: could float32 noise move a neighbour across a border; does that tie run off what was fetched."""
    near_tie = np.zeros(len(best), dtype=bool)
    run_off = np.zeros(len(best), dtype=bool)
    for k in borders:
        near_tie |= best[:, k - 1] - best[:, k] < NEAR
        if best.shape[1] < num_train:
            run_off |= best[:, k - 1] - best[:, -1] < NEAR
    return near_tie, run_off


def _reorder(train: np.ndarray, query: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fetched neighbours of one query (D,), in their exact order."""
    exact = _exact_similarity(train, query, where)
    order = np.lexsort((where, -exact))
    return exact[order].astype(np.float32), where[order]


def _exact_similarity(train: np.ndarray, query: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Cosine of one query (D,) with the rows `where` of train: (k,) float64, to 9 decimals."""
    rows, unit = normalised(train[where], np.float64), normalised(query[None], np.float64)[0]
    return np.round(rows @ unit, 9)


def _search_exact(train: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 search of a few queries. One integer key holds similarity and index, so that no tie is left."""
    unit = normalised(queries, np.float64)
    keys = np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(train), EXACT_TRAIN_BLOCK):
        rows = normalised(train[start : start + EXACT_TRAIN_BLOCK], np.float64)
        billionths = np.rint(unit @ rows.T * 1e9).astype(np.int64)
        index = np.arange(start, start + len(rows))
        keys = np.concatenate([keys, (-billionths << 32) + index], axis=1)
        if keys.shape[1] > k:
            keys = np.partition(keys, k - 1, axis=1)[:, :k]
    keys = np.sort(keys, axis=1)
    where = keys & 0xFFFFFFFF
    return (-((keys - where) >> 32) / 1e9).astype(np.float32), where


def vote_shares(similarities: np.ndarray, temperature: float = TEMPERATURE) -> np.ndarray:
    """Share (m, k) float64 of each neighbour in the votes of its query, the nearest first; rows sum to 1."""
    weights = np.exp((similarities.astype(np.float64) - similarities[:, :1]) / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


def _vote(
    similarities: np.ndarray,
    neighbours: np.ndarray,
    train: np.ndarray,
    ids: np.ndarray,
    classes: np.ndarray,
    queries: np.ndarray,
    places: int,
    temperature: float,
) -> np.ndarray:
    """Labels (m, places) by the votes of (m, k) neighbours; near-ties are counted again in float64."""
    near = ids[neighbours]
    ranked, shares = _rank_classes(similarities.astype(np.float64), near, temperature)
    for q in np.flatnonzero(_near_shares(ranked, shares)):
        exact = _exact_similarity(train, queries[q], neighbours[q])
        ranked[q] = _rank_classes(exact[None], near[q][None], temperature)[0][0]
    return classes[_fill(ranked, len(classes), places)]


def _rank_classes(similarities: np.ndarray, ids: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (m, k) by share of the votes, then id, and the shares; places beyond the voted classes hold -1 and 0.

    There is no (m, number of classes) table: the k votes of a query are sorted by class and summed run by run.
    """
    weights = torch.from_numpy(vote_shares(similarities, temperature))
    voted, order = torch.from_numpy(ids).sort(dim=1, stable=True)
    opens_run = torch.ones(voted.shape, dtype=torch.bool)
    opens_run[:, 1:] = voted[:, 1:] != voted[:, :-1]
    shares = torch.zeros_like(weights)
    shares[opens_run] = torch.bincount(opens_run.flatten().cumsum(0) - 1, weights.gather(1, order).flatten())
    shares = (shares / shares.sum(dim=1, keepdim=True)).round(decimals=9)
    voted = voted.where(shares > 0, -1)
    shares, order = shares.sort(dim=1, descending=True, stable=True)  # stable: equal shares stay in order of id
    return voted.gather(1, order).numpy(), shares.numpy()


def _near_shares(ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(m,) bool: for which queries noise could change the order of the first five classes."""
    close = (ids[:, 1:6] >= 0) & (shares[:, :5][:, : shares.shape[1] - 1] - shares[:, 1:6] < NEAR_SHARES)
    return close.any(axis=1)


def _fill(ids: np.ndarray, num_classes: int, places: int) -> np.ndarray:
    """The first `places` class ids (m, places); -1 gives way to the classes without votes, lowest id first."""
    ids = ids[:, :places]
    spare = np.arange(min(2 * places, num_classes))  # holds enough: at most `places` of them have votes
    unvoted = ~(ids[:, :, None] == spare).any(axis=1)
    order = np.argsort(~unvoted, axis=1, kind="stable")  # of each row: unvoted ids, in order
    filled = ids.copy()
    if filled.shape[1] < places:
        filled = np.concatenate([filled, np.full((len(ids), places - ids.shape[1]), -1)], axis=1)
    empty = filled < 0
    nth = np.cumsum(empty, axis=1) - 1
    return np.where(empty, np.take_along_axis(order, nth.clip(min=0), axis=1), filled)

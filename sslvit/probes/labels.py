"""Labels that two sets share, read alike: one kind and one numbering, decided on both sets together. No probe is here.

A set alone cannot tell whether 1 and 2 are classes or numbers, nor what another set calls its class 3. So numbers with
a decimal point in either set make both numbers, lists in either make several classes at once in both, and as soon as
one set names its classes all are matched by name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sslvit.data.records import UNKNOWN, as_classes, number_in_text
from sslvit.data.sources import Source
from sslvit.errors import InputError
from sslvit.probes.label_file import Labelled

UNSEEN = -2  # and below, one for each class that the training set does not hold: always wrong, but told apart


class Column(NamedTuple):
    """One label of one set: values as in `Source.labels`, names of its classes ([] where it has none), whose it is."""

    values: np.ndarray
    names: list[str]
    owner: str

    @property
    def are_several(self) -> bool:
        """Whether an image may be in several classes at once."""
        return self.values.ndim == 2


Pair = tuple[Column, Column, str]  # of train, of val, and what is to be said about it ("" for nothing)


def agree(train: Source, val: Source) -> tuple[Source, Source, list[str]]:
    """Both sets with their shared labels of one kind, in train's numbering, and lines for the user.

    InputError for a label that cannot be one thing in both.
    """
    pairs: dict[str, Pair] = {}
    for label in train.labels:
        if label in val.labels:
            pairs[label] = _agree(label, *(_column(source, label) for source in (train, val)))
    lines = [words for _, _, words in pairs.values() if words]
    return (
        _with(train, {k: pair[0] for k, pair in pairs.items()}),
        _with(val, {k: p[1] for k, p in pairs.items()}),
        lines,
    )


def _column(source: Source, label: str) -> Column:
    return Column(np.asarray(source.labels[label]), list(source.class_names.get(label, [])), source.spec)


def _with(source: Source, columns: dict[str, Column]) -> Source:
    """The source with these labels; itself where they are its own."""
    if all(_is_same(_column(source, label), column) for label, column in columns.items()):
        return source
    labels = dict(source.labels) | {label: column.values for label, column in columns.items()}
    named = {label: column.names for label, column in columns.items()}
    class_names = {k: names for k, names in (dict(source.class_names) | named).items() if names}
    return Labelled(source, labels, class_names)


def _is_same(one: Column, other: Column) -> bool:
    same = one.values.dtype == other.values.dtype and np.array_equal(one.values, other.values, equal_nan=True)
    return same and one.names == other.names


def _agree(label: str, train: Column, val: Column) -> Pair:
    if train.are_several or val.are_several:
        return _as_presence(label, train, val)
    if train.names or val.names:
        return _by_name(label, train, val)
    whole = [as_classes(train.values), as_classes(val.values)]
    if any(values.dtype.kind == "f" for values in whole):
        return _as_numbers(label, train, val)
    words = ""
    if train.values.dtype.kind == val.values.dtype.kind == "f":
        words = (
            f"label {label!r}: all numbers are whole in both sets, so they are taken as {len(np.unique(whole[0]))} "
            "classes; for numbers (R2), give them with a decimal point in a label_file"
        )
    return train._replace(values=whole[0]), val._replace(values=whole[1]), words


def _as_numbers(label: str, train: Column, val: Column) -> Pair:
    """Float64, NaN where unknown."""
    said, pair = [], []
    for one in (train, val):
        values = one.values
        if values.dtype.kind != "f":
            unknown = values == UNKNOWN
            values = np.where(unknown, np.nan, values.astype(np.float64))
            if unknown.any():
                said.append(f"label {label!r} of {one.owner}: {unknown.sum()} times -1 is taken as unknown")
        pair.append(one._replace(values=values))
    return pair[0], pair[1], "; ".join(said)


def _by_name(label: str, train: Column, val: Column) -> Pair:
    """Classes matched by what they are called: the number 10 is the class "10"."""
    if train.names == val.names and all(_in_range(one) for one in (train, val)):
        return train, val, ""
    known, asked = _named(train), _named(val)
    words, table = "", _table(asked.names, known.names)
    if not _meet(known, asked, table):
        if bool(train.names) != bool(val.names):
            known, asked, words = _by_number(label, train, val)
            table = _table(asked.names, known.names)
        else:
            words = f"label {label!r}: {train.owner} and {val.owner} have no class in common"
    values = np.where(asked.values < 0, UNKNOWN, table[asked.values.clip(min=0)]) if len(table) else asked.values
    return known, val._replace(values=values, names=known.names), words


def _meet(known: Column, asked: Column, table: np.ndarray) -> bool:
    """Whether any class that val shows is one that train shows; also when either shows none."""
    shown = np.unique(asked.values[asked.values >= 0])
    return not len(shown) or bool(np.isin(table[shown], known.values).any()) or not (known.values >= 0).any()


def _by_number(label: str, train: Column, val: Column) -> Pair:
    """One set names its classes, the other numbers them in the order of those names, as class folders are numbered."""
    named, numbered = (train, val) if train.names else (val, train)
    values = as_classes(numbered.values)
    if values.dtype.kind == "f" or values.max(initial=0) >= len(named.names) or values.min(initial=0) < UNKNOWN:
        raise InputError(
            f"label {label!r}: {named.owner} names its classes ({', '.join(named.names[:3])}, ...), {numbered.owner} "
            f"has numbers ({values[values != UNKNOWN][0]:g}, ...) that are none of these names; give both the same "
            "ones, for example by label_file=CSV"
        )
    as_names = numbered._replace(values=values, names=named.names)
    words = (
        f"label {label!r}: {numbered.owner} has numbers and {named.owner} names, so 0 is taken for {named.names[0]!r}, "
        f"and so on up to {len(named.names) - 1} for {named.names[-1]!r}"
    )
    return (named, as_names, words) if train.names else (as_names, named, words)


def _as_presence(label: str, train: Column, val: Column) -> Pair:
    """0 and 1 for each class (n, C), -1 where unknown; the classes of both sets, train's first."""
    for one, other in ((train, val), (val, train)):
        if as_classes(one.values).dtype.kind == "f":
            raise InputError(
                f"label {label!r} has numbers with a decimal point in {one.owner} and several classes at once in "
                f"{other.owner}; give both of one kind, for example by label_file=CSV"
            )
    known, asked = _several(train), _several(val)
    table = _table(asked.names, known.names)
    names = [*known.names, *(name for name, place in zip(asked.names, table, strict=True) if place < 0)]
    if names == known.names == asked.names:
        return known, asked, ""
    place = np.where(table >= 0, table, len(known.names) + UNSEEN - table)
    pair = []
    for one, columns in ((known, np.arange(len(known.names))), (asked, place)):
        values = np.zeros((len(one.values), len(names)), np.int8)
        values[:, columns] = one.values
        values[one.values.min(axis=1, initial=0) < 0] = UNKNOWN
        pair.append(one._replace(values=values, names=names))
    return pair[0], pair[1], ""


def _several(column: Column) -> Column:
    """A label of one class per image as (n, C) of 0 and 1; one of several as it is."""
    if column.are_several:
        return column if column.names else column._replace(names=[str(i) for i in range(column.values.shape[1])])
    named = _named(column)
    values = (named.values[:, None] == np.arange(len(named.names))).astype(np.int8)
    values[named.values < 0] = UNKNOWN
    return named._replace(values=values)


def _in_range(column: Column) -> bool:
    return column.values.dtype.kind != "f" and column.values.max(initial=0) < len(column.names)


def _named(column: Column) -> Column:
    """Every class with a name: its own, else the number as text. The numbering of the names that are there stays."""
    values = as_classes(column.values)
    unknown = np.isnan(values) if values.dtype.kind == "f" else values == UNKNOWN
    if values.dtype.kind != "f" and column.names:
        known = (values >= 0) & (values < len(column.names))
    else:
        known = np.zeros(len(values), bool)
    further, place = np.unique(values[~unknown & ~known], return_inverse=True)
    codes = np.where(unknown, UNKNOWN, np.where(known, values, 0)).astype(np.int64)
    codes[~unknown & ~known] = len(column.names) + place
    return column._replace(values=codes, names=[*column.names, *(f"{value.item()!r}" for value in further)])


def _table(asked: list[str], known: list[str]) -> np.ndarray:
    """Where each name of val stands among train's, (len(asked),): exactly so written, else the same number (07 and 7).

    UNSEEN, UNSEEN - 1, ... for the others.
    """
    exact = {name: place for place, name in reversed(list(enumerate(known)))}
    same = {number_in_text(name): place for name, place in exact.items()}
    found = [exact.get(name, same.get(number_in_text(name))) for name in asked]
    table, unseen = np.empty(len(asked), np.int64), UNSEEN
    for i, place in enumerate(found):
        table[i] = unseen if place is None else place
        unseen -= place is None
    return table

"""Filters of subjects, such as those of consumers: which ones match the same subjects.

Filters of topics (see `natsrt.wire.subjects.Filter`) never overlap only in part: each is a number of tokens, followed
by ``*`` or by ``*.>``. So of two of them, one covers the other, or they have nothing in common.
"""

from __future__ import annotations

from collections.abc import Iterable


def covers(wide: str, narrow: str) -> bool:
    """True if every subject that ``narrow`` matches is one that ``wide`` matches. Both may have wildcards."""
    wide_tokens, narrow_tokens = wide.split("."), narrow.split(".")
    for place, token in enumerate(wide_tokens):
        if place >= len(narrow_tokens):
            return False
        if token == ">":
            return True
        if narrow_tokens[place] == ">" or (token != "*" and token != narrow_tokens[place]):
            return False
    return len(wide_tokens) == len(narrow_tokens)


def intersects(one: str, other: str) -> bool:
    """True if a subject matches both patterns. Both may have wildcards."""
    first, second = one.split("."), other.split(".")
    for mine, theirs in zip(first, second, strict=False):
        if ">" in (mine, theirs):
            return True
        if mine != theirs and "*" not in (mine, theirs):
            return False
    return len(first) == len(second)


def common(one: str, other: str) -> str | None:
    """The filter of topics that both match; None if they have nothing in common."""
    if covers(one, other):
        return other
    return one if covers(other, one) else None


def widest(filters: Iterable[str]) -> tuple[str, ...]:
    """The filters without those that others cover, because JetStream accepts no filters that overlap."""
    kept: list[str] = []
    for subject in filters:
        if not any(covers(other, subject) for other in kept):
            kept = [other for other in kept if not covers(subject, other)]
            kept.append(subject)
    return tuple(sorted(kept))

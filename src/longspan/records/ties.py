"""Which subjects the data cannot tell apart: the one rule behind tie letters, leading groups and the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def tie_groups(order: Sequence[str], told_apart: Callable[[str, str], bool]) -> list[tuple[str, ...]]:
    """Groups such that two subjects share one exactly where they cannot be told apart.

    No two members of a group are told apart, no further subject fits into it, and a subject that differs from all
    others is a group of its own. Groups overlap where a ties with b and b with c, but a beats c.

    Args:
        order: the subjects, best first.
        told_apart: whether two of them differ beyond doubt.

    Returns:
        the groups, members best first, in the order of their best members.
    """
    tied = [[i == j or not told_apart(a, b) for j, b in enumerate(order)] for i, a in enumerate(order)]
    groups: list[list[int]] = []
    covered: set[tuple[int, int]] = set()
    for i in range(len(order)):
        # With i itself last, so that who ties with nobody gets a group too.
        for j in (*range(i + 1, len(order)), i):
            if not tied[i][j] or (i, j) in covered:
                continue
            group = sorted({i, j})
            for k in range(len(order)):
                if k not in group and all(tied[k][member] for member in group):
                    group.append(k)
            group.sort()
            groups.append(group)
            covered.update((a, b) for a in group for b in group)
    return [tuple(order[i] for i in group) for group in sorted(groups)]


def ranked_groups(order: Sequence[str], told_apart: Callable[[str, str], bool]) -> list[list[str]]:
    """Every subject in one group, best group first: a group is its best subject and all that cannot be told from it."""
    ties = tie_groups(order, told_apart)
    rest = list(order)
    ranked: list[list[str]] = []
    while rest:
        near = {subject for group in ties if rest[0] in group for subject in group}
        ranked.append([subject for subject in rest if subject in near])
        rest = [subject for subject in rest if subject not in near]
    return ranked

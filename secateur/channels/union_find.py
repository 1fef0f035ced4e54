"""Disjoint sets of numbers (union-find with path halving)."""


class UnionFind:
    """Numbers from 0 in disjoint sets; the smallest number of a set is its canonical number."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def add(self, count: int) -> range:
        """New numbers, each in its own set."""
        fresh = range(len(self.parent), len(self.parent) + count)
        self.parent.extend(fresh)
        return fresh

    def find(self, x: int) -> int:
        """The canonical number of the set that contains `x`."""
        parent = self.parent
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def union(self, a: int, b: int) -> None:
        """Unite two sets."""
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)

    def canonical(self) -> list[int]:
        """The canonical number for every number."""
        found: list[int] = []
        for x, parent in enumerate(self.parent):
            found.append(x if parent == x else found[parent])  # a parent is smaller
        return found

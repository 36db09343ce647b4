"""Estimate when a stage will end, from its steps so far."""

from __future__ import annotations


class Eta:
    """Estimates the seconds left of `total` steps; the caller passes the current time.

    A step's time includes its share of the clean pass that ends an epoch, so whole epochs count
    once there are any. After the second, the first is ignored, as the machine warms up in it. Until
    then time counts from the end of the first step: much may be prepared before it.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._ends: list[tuple[int, float]] = []  # of the first step, then of each epoch

    def advance(self, steps: int, now: float) -> None:
        self._done += steps
        if not self._ends:
            self._ends.append((self._done, now))

    def epoch_ended(self, now: float) -> None:
        self._ends.append((self._done, now))

    def seconds(self, now: float) -> float | None:
        """Return the seconds left; None until two steps are done."""
        if not self._ends:
            return None
        if len(self._ends) == 1:
            (first, began), (last, ended) = self._ends[0], (self._done, now)
        else:
            (first, began), (last, ended) = self._ends[min(1, len(self._ends) - 2)], self._ends[-1]
        if last == first:
            return None
        finish = ended + (self._total - last) * (ended - began) / (last - first)
        return max(finish - now, 0.0)

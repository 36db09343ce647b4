"""When a stage will be over, from its steps so far."""

from __future__ import annotations


class Eta:
    """Seconds left of `total` steps; the caller says what time it is.

    A step's time includes its share of what an epoch ends with (the clean pass), which only whole
    epochs show: once there are two, the first, in which the machine warms up, is forgotten.
    """

    def __init__(self, total: int, done: int, now: float) -> None:
        self._total, self._done = total, done
        self._ends = [(done, now)]  # where it began, and the end of each epoch

    def advance(self, steps: int) -> None:
        self._done += steps

    def epoch_ended(self, now: float) -> None:
        self._ends.append((self._done, now))

    def seconds(self, now: float) -> float | None:
        """None before there is anything to go by."""
        if len(self._ends) == 1:
            (first, began), (last, ended) = self._ends[0], (self._done, now)
        else:
            (first, began), (last, ended) = self._ends[min(1, len(self._ends) - 2)], self._ends[-1]
        if last == first:
            return None
        finish = ended + (self._total - last) * (ended - began) / (last - first)
        return max(finish - now, 0.0)

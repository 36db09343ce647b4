"""Errors a person can mend: shown as one line, exit status 2, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """What was asked cannot be done; the message names what is wrong and how to mend it."""


class TrainingError(Exception):
    """A run that started well and cannot go on (a NaN loss, say); exit status 1."""

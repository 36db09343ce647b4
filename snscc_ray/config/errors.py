"""Errors that a user can fix: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A request cannot be met; the message says why and how to fix it. Exit status 2."""


class TrainingError(Exception):
    """A run that started cannot continue (a NaN loss, for example). Exit status 1."""

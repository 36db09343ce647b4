"""Runs with frozen encoders, with real published weights, as a person starts them."""

from __future__ import annotations

"""The ways a command can end other than well."""

from __future__ import annotations


class UsageError(Exception):
    """The command was called wrongly (exit code 2); the message says what was expected."""


class LearnerError(Exception):
    """The learner's code failed (exit code 1); the cause is what it raised."""

"""The error of a plan."""

from scheduler.config_errors import UsageError


class PlanError(UsageError):
    """The plan's inputs cannot be used; the message names the option, the value and what is allowed."""

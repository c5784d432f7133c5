"""What the link to Redis counts: plain integers, so that counting costs nothing on the hot way."""

from __future__ import annotations


class Counts:
    """One link's counters; every field is a row of ``statistics()``."""

    __slots__ = (
        "call_failures",
        "callback_failures",
        "calls",
        "commands",
        "connect_failures",
        "connects",
        "error_replies",
        "losses",
        "messages",
        "overflows",
        "probes",
        "refused_subscriptions",
        "reloads",
        "restarts",
        "silences",
        "unanswered",
    )

    def __init__(self) -> None:
        self.commands = 0
        """Commands taken for the hot lane."""
        self.messages = 0
        """Messages handed on from subscriptions."""
        self.calls = 0
        self.call_failures = 0
        """Calls that ended with an error or without an answer."""
        self.callback_failures = 0
        """Callbacks that raised, which none may."""
        self.error_replies = 0
        """Errors that Redis answered on hot lanes."""
        self.unanswered = 0
        """Commands that were taken and then lost with their connection: executed or not, nobody knows."""
        self.overflows = 0
        """Commands not taken because too many waited already."""
        self.reloads = 0
        """Times that Redis had forgotten our scripts."""
        self.connects = 0
        self.connect_failures = 0
        self.losses = 0
        """Connections that broke or were given up."""
        self.silences = 0
        """Of these, the ones given up because nothing was heard for too long."""
        self.probes = 0
        self.refused_subscriptions = 0
        """Channels that Redis would not let us hear (ACL)."""
        self.restarts = 0
        """Times that the bridge itself failed and was started again."""

    def as_dict(self) -> dict[str, int]:
        """All of them by name."""
        return {name: getattr(self, name) for name in self.__slots__}

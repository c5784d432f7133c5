"""The centre: rooms, members, fan-out, presence. Synchronous, without IO."""

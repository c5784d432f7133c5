"""The wire, without IO: frames, messages, codecs, outbox, filters."""

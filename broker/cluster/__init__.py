"""Many nodes on one Redis: the link, the streams, who is where, and what backends say."""

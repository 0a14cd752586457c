"""Rows become commits: planning, the log on disk, feeds, and the actor that owns them."""

"""Queries: built as data, answered incrementally, kept live."""

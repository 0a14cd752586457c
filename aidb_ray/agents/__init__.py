"""Agents: who works, on which session, and what one generation does."""

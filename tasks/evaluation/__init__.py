"""Asking a model every item of a frozen set, and scoring what it answers."""

"""The model registry: who is champion, and how a candidate that was promoted becomes it."""

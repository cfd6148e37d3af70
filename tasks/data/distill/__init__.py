"""Answers of training rows rewritten by a teacher, kept beside the originals."""

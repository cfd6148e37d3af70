"""Specs that people set, references that stages hand on, and the rows, prompts and errors that all rooms share.

Imports nothing heavy: no torch, no transformers, no vLLM, no Great Expectations, no Prefect.
"""

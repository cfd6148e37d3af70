"""Base models, QLoRA training in a process of its own, and the merge."""

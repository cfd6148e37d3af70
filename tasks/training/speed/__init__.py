"""What makes a training fast without changing what is learned: flat batches, exact attention over them, fused steps."""

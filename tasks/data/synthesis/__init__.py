"""Examples that a teacher writes, and the filters that few of them survive."""

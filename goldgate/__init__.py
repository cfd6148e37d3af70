"""The command line, and the servers that it starts."""

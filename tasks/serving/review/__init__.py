"""Answers on their way to people and back: put aside at the gateway, sent to a queue, read back as rows."""

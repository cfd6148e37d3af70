"""Registered versions as running engines, and the gateway in front of them."""

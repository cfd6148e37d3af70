"""The gate: from two models' outcomes on the same items to promote, reject or inconclusive, with reasons."""

"""From a source of rows to a train and a dev split, and the golden set that training never sees."""

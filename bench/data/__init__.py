"""How much the data room sees, how wrong it is, how long it takes and how much memory; beside datatrove and semhash."""

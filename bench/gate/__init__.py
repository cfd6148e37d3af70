"""How often the gate is wrong, how much it sees, and how long it takes; beside two packages that do the like."""

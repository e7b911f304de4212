"""The decision core: owns all state, does no I/O, is told the time."""

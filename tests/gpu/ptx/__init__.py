"""PTX text to programs of the machine in tests/gpu/engine."""

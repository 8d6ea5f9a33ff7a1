"""The commands of `pisa-sr`, one module each."""

"""The page `pisa-sr app`: live scales, comparison, painted scale maps."""

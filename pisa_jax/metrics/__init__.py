"""Image quality metrics, the pairing of result files with ground truths, and reports."""

"""Training data: sources of images, synthetic degradation, and the batch loader."""

"""Infrastructure without knowledge of the method: files, parameter trees, devices, checkpoints, logs."""

"""Infrastructure that is independent of the method: files, parameter trees, devices, checkpoints, logs."""

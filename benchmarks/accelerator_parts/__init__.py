"""The parts of benchmarks/accelerator.py: each is a module with `run(rows, size)`, run in a process of its own."""

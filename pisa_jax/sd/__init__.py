"""Stable Diffusion 2.1-base: diffusers' Flax modules, their corrections, and checkpoints."""

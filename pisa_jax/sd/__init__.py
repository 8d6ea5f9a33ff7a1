"""Stable Diffusion 2.1: diffusers' Flax modules with corrections, VAE tiles, checkpoints, random models."""

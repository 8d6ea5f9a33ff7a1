"""Large images in bounded memory: overlapping windows for the UNet, tiles for the VAE."""

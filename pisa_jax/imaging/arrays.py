"""Array types of images."""

import numpy as np
from jaxtyping import UInt8

# An RGB image of 8 bits per channel.
RGB8 = UInt8[np.ndarray, "_ _ 3"]

"""Labeled contact sheets."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.image_reading import from_pil
from pisa_jax.imaging.ranges import unit_to_uint8

MARGIN, CAPTION = 8, 26


def contact_sheet(cells: Sequence[tuple[str, Image.Image]], columns: int, longest: int = 512) -> Image.Image:
    """Draw all cells (label, image) row by row in one sRGB image; images over `longest` pixels a side are downscaled.

    Transparent parts of images are drawn over white. The profiles of images, in their `info`, are applied.
    """
    images = []
    for _, image in cells:
        image = Image.fromarray(_srgb_over_white(image))
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        images.append(image)
    width = max(image.width for image in images) + MARGIN
    height = max(image.height for image in images) + MARGIN + CAPTION
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for index, ((label, _), image) in enumerate(zip(cells, images, strict=True)):
        x, y = MARGIN + index % columns * width, MARGIN + index // columns * height
        draw.text((x, y + 2), label, fill="black", font=font)
        sheet.paste(image, (x, y + CAPTION))
    return sheet


def _srgb_over_white(image: Image.Image) -> RGB8:
    decoded = from_pil(image)
    if decoded.alpha is None:
        return unit_to_uint8(decoded.rgb)
    opacity = decoded.alpha[..., None]
    return unit_to_uint8(decoded.rgb * opacity + 1 - opacity)

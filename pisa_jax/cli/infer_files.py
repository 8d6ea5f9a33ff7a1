"""Upscale image files: reading, batching by size, writing, and one report per input file."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pisa_jax.cli.infer_names import output_stems, scale_marks
from pisa_jax.config import Scales
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.imaging.image_data import ImageData, to_pil
from pisa_jax.imaging.image_reading import from_pil, read_image
from pisa_jax.imaging.image_writing import output_suffix, write_image
from pisa_jax.inference import Upscaler
from pisa_jax.runtime.messages import error_text
from pisa_jax.tiling.memory import is_out_of_memory


@dataclass(frozen=True)
class UpscaleOptions:
    """Options of `upscale_files`."""

    # Output folder.
    output: Path
    # Upscale factor.
    scale: float = 4.0
    # Pairs (pix, sem); every input gets one output file per pair.
    scales: tuple[Scales, ...] = ((1.0, 1.0),)
    # Seed with which the latent is sampled; None: its mean.
    seed: int | None = None
    # Images of equal size per call of the model.
    batch_size: int = 1
    # "auto" (the format of the input if it can hold the result), "png", "jpg", "webp" or "tiff".
    ext: str = "auto"
    # Text appended to the stems of output files.
    suffix: str = ""
    # Skip inputs whose output files exist.
    skip_existing: bool = False
    # Also write a labeled contact sheet of the input and the results at all pairs of scales.
    grid: bool = False


@dataclass
class FileReport:
    """Outcome of one input file; an entry of the file that `--json` writes. Sizes are (width, height)."""

    input: str
    # "ok", "skipped" or "failed"
    outcome: str = "failed"
    outputs: list[str] = field(default_factory=list)
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    scale: float | None = None
    scales: list[Scales] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _PendingFile:
    """A decoded input file that waits for its batch."""

    report: FileReport
    image: ImageData
    outputs: list[Path]
    sheet: Path | None


def upscale_files(
    inputs: Sequence[Path],
    upscaler: Upscaler,
    options: UpscaleOptions,
    on_report: Callable[[FileReport], None] = lambda report: None,
) -> list[FileReport]:
    """Upscale `inputs` into `options.output` and return a report per input, in order.

    `on_report` is called with every report as soon as it is final. A file that fails does not stop the others.
    """
    protected = {path.resolve() for path in inputs}
    reports, batches = [], defaultdict(list)
    for path, stem in zip(inputs, output_stems(inputs), strict=True):
        report = FileReport(str(path), scale=options.scale, scales=list(options.scales))
        reports.append(report)
        pending = _read(path, stem, report, options, protected)
        if pending is None:
            on_report(report)
            continue
        batch = batches[pending.image.rgb.shape]
        batch.append(pending)
        if len(batch) == options.batch_size:
            _upscale_batch(batch, upscaler, options, on_report)
            batch.clear()
    for batch in batches.values():
        if batch:
            _upscale_batch(batch, upscaler, options, on_report)
    return reports


def count_outcomes(reports: Sequence[FileReport]) -> dict[str, int]:
    """Count the reports of each outcome."""
    counts = Counter(report.outcome for report in reports)
    return {outcome: counts[outcome] for outcome in ("ok", "skipped", "failed")}


def _read(
    path: Path, stem: str, report: FileReport, options: UpscaleOptions, protected: set[Path]
) -> _PendingFile | None:
    """Read an input and choose its output files; None, with the reason in `report`, if it fails or is skipped."""
    try:
        image = read_image(path)
        report.input_size = (image.rgb.shape[1], image.rgb.shape[0])
        report.notes += image.notes
        ending = options.suffix + output_suffix(image, options.ext)
        outputs = [options.output / f"{stem}{mark}{ending}" for mark in scale_marks(options.scales)]
        sheet = options.output / f"{stem}_grid{options.suffix}.png" if options.grid else None
        written = [*outputs, sheet] if sheet else outputs
        for output in written:
            if output.resolve() in protected:
                raise ValueError(f"{output} is an input and would be overwritten; give another --output or a --suffix")
    except (OSError, ValueError) as error:
        report.error = error_text(error)
        return None
    if options.skip_existing and all(output.exists() for output in written):
        report.outcome, report.outputs = "skipped", [str(output) for output in outputs]
        return None
    return _PendingFile(report, image, outputs, sheet)


def _upscale_batch(
    batch: Sequence[_PendingFile],
    upscaler: Upscaler,
    options: UpscaleOptions,
    on_report: Callable[[FileReport], None],
) -> None:
    """Upscale images of equal size, write the results and complete the reports."""
    start = time.perf_counter()
    try:
        adjustable = any(pair != (1.0, 1.0) for pair in options.scales)
        session = upscaler.open_all([pending.image for pending in batch], options.scale, options.seed, adjustable)
        results = [session.render_all(*pair) for pair in options.scales]
    except (ValueError, MemoryError, RuntimeError) as error:  # jax raises RuntimeError if the device memory is full
        for pending in batch:
            pending.report.error = _explain(error)
    else:
        for index, pending in enumerate(batch):
            _write(pending, [images[index] for images in results], options)
    for pending in batch:
        pending.report.seconds = round((time.perf_counter() - start) / len(batch), 3)
        on_report(pending.report)


def _write(pending: _PendingFile, results: Sequence[ImageData], options: UpscaleOptions) -> None:
    """Write the results of one input, one per pair of scales, and its contact sheet."""
    report = pending.report
    try:
        for path, image in zip(pending.outputs, results, strict=True):
            report.notes += [note for note in write_image(path, image) if note not in report.notes]
            report.outputs.append(str(path))
        if pending.sheet:
            sheet = _contact_sheet(pending.image, results, options.scales)
            write_image(pending.sheet, from_pil(sheet))
            report.outputs.append(str(pending.sheet))
    except (OSError, ValueError) as error:
        report.error = error_text(error)
        return
    height, width = results[0].rgb.shape[:2]
    report.outcome, report.output_size = "ok", (width, height)


def _contact_sheet(source: ImageData, results: Sequence[ImageData], pairs: Sequence[Scales]) -> Image.Image:
    size = results[0].rgb.shape[1::-1]
    bicubic = to_pil(source).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    labels = [f"pix {pix:g}  sem {sem:g}" for pix, sem in pairs]
    cells = [("input, bicubic", bicubic), *zip(labels, map(to_pil, results), strict=True)]
    return contact_sheet(cells, columns=min(len(cells), 4))


def _explain(error: BaseException) -> str:
    text = error_text(error)
    if is_out_of_memory(error):
        return f"out of memory; try a smaller --batch-size, --vae-tile or --scale, or --dtype bfloat16 ({text[:120]})"
    return text

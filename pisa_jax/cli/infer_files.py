"""Upscale image files: reading, batching by size or bucket, writing, and one report per input file."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pisa_jax.cli.infer_plan import Plan, PlannedFile, UpscaleOptions, result_suffix
from pisa_jax.cli.scale_map_files import read_scale_map
from pisa_jax.config import Scales
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.imaging.image_data import ImageData, to_pil
from pisa_jax.imaging.image_reading import from_pil, read_image
from pisa_jax.imaging.image_writing import output_suffix, write_image
from pisa_jax.imaging.scale_maps import Map, ScaleOrMap, are_one
from pisa_jax.inference import Upscaler
from pisa_jax.runtime.messages import error_text, number_text
from pisa_jax.tiling.memory import is_out_of_memory


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
    # Files of scale maps, by adapter.
    maps: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _PendingFile:
    """A decoded input file that waits for its batch."""

    file: PlannedFile
    report: FileReport
    image: ImageData
    # Scale maps with values in [0, 1], by adapter.
    maps: dict[str, Map]


def upscale_files(
    plan: Plan, upscaler: Upscaler, on_report: Callable[[FileReport], None] = lambda report: None
) -> list[FileReport]:
    """Upscale the files of a plan and return a report per input, in order.

    `on_report` is called with every report as soon as it is final. Whatever error one file raises, it is that file's
    failure, and the others are upscaled.
    """
    options, reports, queue = plan.options, [], []
    for file in plan.files:
        report = FileReport(str(file.input), scale=options.scale, scales=list(options.scales), error=file.problem)
        report.maps = {name: str(path) for name, path in file.maps.items()}
        reports.append(report)
        if file.problem:
            on_report(report)
        elif file.skipped:
            on_report(_skip(file, report))
        else:
            queue.append((file, report))
    upscaler.plan_buckets([file.shape for file, _ in queue if file.shape], options.scale)

    def key_of(shape: tuple[int, int] | None) -> Hashable:
        return shape and upscaler.batch_key(shape, options.scale)

    if options.batch_size > 1:  # files of one batch one after the other: full batches, and few images that wait
        order = {key: index for index, key in enumerate(dict.fromkeys(key_of(file.shape) for file, _ in queue))}
        queue.sort(key=lambda pair: order[key_of(pair[0].shape)])
    for batch in _batches(_decoded(queue, plan, on_report), options.batch_size, key_of):
        _upscale_batch(batch, plan, upscaler)
        for pending in batch:
            on_report(pending.report)
        batch.clear()  # before the next images are decoded
    return reports


def count_outcomes(reports: Sequence[FileReport]) -> dict[str, int]:
    """Count the reports of each outcome."""
    counts = Counter(report.outcome for report in reports)
    return {outcome: counts[outcome] for outcome in ("ok", "skipped", "failed")}


def _decoded(
    queue: Sequence[tuple[PlannedFile, FileReport]], plan: Plan, on_report: Callable[[FileReport], None]
) -> Iterator[_PendingFile]:
    """Read the files one after the other; those that cannot be read are reported and left out."""
    for file, report in queue:
        try:
            image = read_image(file.input)
            height, width = image.rgb.shape[:2]
            report.input_size = (width, height)
            report.notes += image.notes
            suffix = output_suffix(image, plan.options.ext)
            plan.set_suffix(file, result_suffix(suffix, (width, height), plan.options))
            maps = {}
            for name, path in file.maps.items():
                maps[name], notes = read_scale_map(path, (width, height))
                report.notes += notes
        except Exception as error:
            report.error = _explain(error)
            on_report(report)
            continue
        if file.skipped:
            on_report(_skip(file, report))
        else:
            yield _PendingFile(file, report, image, maps)
        del image, maps


def _skip(file: PlannedFile, report: FileReport) -> FileReport:
    report.outcome, report.outputs = "skipped", [str(output) for output in file.outputs]
    return report


def _batches(
    files: Iterable[_PendingFile], batch_size: int, key_of: Callable[[tuple[int, int]], Hashable]
) -> Iterator[list[_PendingFile]]:
    """Group images whose shapes have equal keys; fewer than 2 * batch_size images wait for their batch at any time."""
    waiting: dict[Hashable, list[_PendingFile]] = defaultdict(list)
    for file in files:
        key = key_of(file.image.rgb.shape[:2])
        waiting[key].append(file)
        del file
        if len(waiting[key]) == batch_size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= 2 * batch_size:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


def _upscale_batch(batch: Sequence[_PendingFile], plan: Plan, upscaler: Upscaler, fill: bool = True) -> None:
    """Upscale the images of a batch, write the results and complete the reports."""
    start = time.perf_counter()
    options, last = plan.options, batch[-1]
    copies = upscaler.filling(len(batch), options.batch_size, last.image.rgb.shape[:2], options.scale) if fill else 0
    computed = [*batch, *[last] * copies]
    results, error = _compute(computed, options, upscaler)
    if results is None and len(computed) > 1:
        # One image, or the size of the batch, must not be the failure of the others.
        for pending in batch:
            _upscale_batch([pending], plan, upscaler, fill=False)
        return
    for index, pending in enumerate(batch):
        pending.report.error = error
        if results is not None:
            _write(pending, [images[index] for images in results], options)
        pending.report.seconds = round((time.perf_counter() - start) / len(batch), 3)


def _compute(
    batch: Sequence[_PendingFile], options: UpscaleOptions, upscaler: Upscaler
) -> tuple[list[list[ImageData]] | None, str | None]:
    """Return the results of a batch for each pair of scales, or None and the reason of the failure."""
    try:
        settings = [_with_maps(scales, batch, upscaler) for scales in options.scales]
        adjustable = not all(map(are_one, settings))
        images = [pending.image for pending in batch]
        session = upscaler.open_all(images, options.scale, options.seed, adjustable)
        return [session.render_all(*scales) for scales in settings], None
    except Exception as error:
        return None, _explain(error)


def _with_maps(scales: Scales, batch: Sequence[_PendingFile], upscaler: Upscaler) -> list[ScaleOrMap]:
    """Multiply the scales of adapters that have maps with the map of each image: white is the scale, black is 0."""
    if not batch[0].maps:  # all files of a run have maps of the same adapters
        return list(scales)
    return [
        [np.float32(scale) * pending.maps[name] for pending in batch] if name in batch[0].maps else scale
        for name, scale in zip(upscaler.adapter_names, scales, strict=True)
    ]


def _write(pending: _PendingFile, results: Sequence[ImageData], options: UpscaleOptions) -> None:
    """Write the results of one input, one per pair of scales, and its contact sheet."""
    report, file = pending.report, pending.file
    try:
        for path, image in zip(file.outputs, results, strict=True):
            report.notes += [note for note in write_image(path, image) if note not in report.notes]
            report.outputs.append(str(path))
        if file.sheet:
            sheet = sheet_of_results(pending.image, results, options.scales, mapped=bool(pending.maps))
            write_image(file.sheet, from_pil(sheet))
            report.outputs.append(str(file.sheet))
    except Exception as error:
        report.error = _explain(error)
        return
    height, width = results[0].rgb.shape[:2]
    report.outcome, report.output_size = "ok", (width, height)


def sheet_of_results(
    source: ImageData, results: Sequence[ImageData], pairs: Sequence[Scales], mapped: bool = False
) -> Image.Image:
    """Draw a labeled contact sheet of an image, upscaled bicubically, and its results at the scales `pairs`.

    With `mapped`, the labels tell that scale maps multiply the scales.
    """
    size = results[0].rgb.shape[1::-1]
    bicubic = to_pil(source).resize(size, Image.Resampling.BICUBIC)
    names = ("pix ", "sem ") if len(pairs[0]) == 2 else ("",) * len(pairs[0])
    labels = ["  ".join(map("{}{}".format, names, map(number_text, scales))) + "  x map" * mapped for scales in pairs]
    cells = [("input, bicubic", bicubic), *zip(labels, map(to_pil, results), strict=True)]
    return contact_sheet(cells, columns=min(len(cells), 4))


def _explain(error: BaseException) -> str:
    text = error_text(error)
    if is_out_of_memory(error):
        return f"out of memory; try a smaller --batch-size, --vae-tile or --scale, or --dtype bfloat16 ({text[:120]})"
    return text

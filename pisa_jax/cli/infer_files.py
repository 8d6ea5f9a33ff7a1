"""Files in, files out: what `infer.py` does around an `Upscaler`."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pisa_jax.imaging import image_io
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.inference import Upscaler
from pisa_jax.tiling.memory import is_out_of_memory

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")

Pair = tuple[float, float]


@dataclass(frozen=True)
class Options:
    """What is written where."""

    output: Path
    scale: float = 4.0
    # (pix, sem), each an output file of every input.
    pairs: tuple[Pair, ...] = ((1.0, 1.0),)
    # Sample the latent with this seed; None: its mean.
    seed: int | None = None
    # Pictures of equal size that share a call of the model.
    batch_size: int = 1
    # "auto" keeps the input's format where it can hold the result; else "png", "jpg", "webp", "tiff".
    ext: str = "auto"
    suffix: str = ""
    skip_existing: bool = False
    # Also write one labelled sheet of all pairs beside the input.
    grid: bool = False


@dataclass
class Record:
    """What became of one input; `as_json` is a line of `--json`."""

    input: str
    outcome: str = "failed"
    outputs: list[str] = field(default_factory=list)
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    scale: float | None = None
    scales: list[Pair] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Job:
    record: Record
    picture: image_io.Picture
    outputs: list[Path]
    sheet: Path | None


def find_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, and the pictures directly inside the folders named, in order, each once.

    A path that does not exist stays in the list: reading it reports it.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES) if path.is_dir() else [path]
        found |= dict.fromkeys(inside)
    return list(found)


def output_stems(inputs: Sequence[Path]) -> list[str]:
    """A file name, without ending, for each input: its stem, and its format or folder where stems are shared."""
    for name in (
        lambda p: p.stem,
        lambda p: p.name.replace(".", "_"),
        lambda p: f"{p.resolve().parent.name}_{p.name.replace('.', '_')}",
    ):
        stems = [name(path) for path in inputs]
        if max(Counter(stems).values(), default=1) == 1:
            return stems
    return [f"{index:04d}_{stem}" for index, stem in enumerate(stems)]


def run(
    inputs: Sequence[Path], upscaler: Upscaler, options: Options, done: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Upscale `inputs` into `options.output`; every one gets a record, which `done` sees as soon as it is final.

    A file that fails does not stop the others.
    """
    protected = {path.resolve() for path in inputs}
    records, waiting = [], defaultdict(list)
    for path, stem in zip(inputs, output_stems(inputs), strict=True):
        record = Record(str(path), scale=options.scale, scales=list(options.pairs))
        records.append(record)
        try:
            job = _prepare(path, stem, record, options, protected)
        except (OSError, ValueError) as error:
            record.error = _one_line(error)
            done(record)
            continue
        if record.outcome == "skipped":
            done(record)
            continue
        group = waiting[job.picture.rgb.shape]
        group.append(job)
        if len(group) == options.batch_size:
            _flush(group, upscaler, options, done)
    for group in waiting.values():
        if group:
            _flush(group, upscaler, options, done)
    return records


def _prepare(path: Path, stem: str, record: Record, options: Options, protected: set[Path]) -> _Job:
    picture = image_io.read_picture(path)
    record.input_size = (picture.rgb.shape[1], picture.rgb.shape[0])
    record.notes += picture.notes
    ending = image_io.output_suffix(picture, options.ext)
    labels = [f"_p{pix:g}_s{sem:g}" for pix, sem in options.pairs] if len(options.pairs) > 1 else [""]
    outputs = [options.output / f"{stem}{label}{options.suffix}{ending}" for label in labels]
    sheet = options.output / f"{stem}_grid{options.suffix}.png" if options.grid else None
    for output in [*outputs, sheet] if sheet else outputs:
        if output.resolve() in protected:
            raise ValueError(f"{output} is an input and would be overwritten; give another --output or a --suffix")
    if options.skip_existing and all(output.exists() for output in [*outputs, *([sheet] if sheet else [])]):
        record.outcome, record.outputs = "skipped", [str(output) for output in outputs]
    return _Job(record, picture, outputs, sheet)


def _flush(jobs: list[_Job], upscaler: Upscaler, options: Options, done: Callable[[Record], None]) -> None:
    start = time.perf_counter()
    try:
        adjustable = any(tuple(pair) != (1.0, 1.0) for pair in options.pairs)
        session = upscaler.open_all([job.picture for job in jobs], options.scale, options.seed, adjustable)
        results = [session.render_all(*pair) for pair in options.pairs]
    except (ValueError, MemoryError, RuntimeError) as error:  # jax reports a full device as a RuntimeError
        for job in jobs:
            job.record.error = _explain(error)
    else:
        for index, job in enumerate(jobs):
            _write(job, [pictures[index] for pictures in results], options)
    for job in jobs:
        job.record.seconds = round((time.perf_counter() - start) / len(jobs), 3)
        done(job.record)
    jobs.clear()


def _write(job: _Job, results: list[image_io.Picture], options: Options) -> None:
    record = job.record
    try:
        for path, picture in zip(job.outputs, results, strict=True):
            record.notes += [note for note in image_io.write_picture(path, picture) if note not in record.notes]
            record.outputs.append(str(path))
        if job.sheet:
            _write_sheet(job, results, options)
            record.outputs.append(str(job.sheet))
    except (OSError, ValueError) as error:
        record.error = _one_line(error)
        return
    height, width = results[0].rgb.shape[:2]
    record.outcome, record.output_size = "ok", (width, height)


def _write_sheet(job: _Job, results: list[image_io.Picture], options: Options) -> None:
    size = results[0].rgb.shape[1::-1]
    enlarged = image_io.to_pil(job.picture).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    labels = [f"pix {pix:g}  sem {sem:g}" for pix, sem in options.pairs]
    cells = [("input, bicubic", enlarged), *zip(labels, map(image_io.to_pil, results), strict=True)]
    sheet = contact_sheet(cells, columns=min(len(cells), 4))
    image_io.write_picture(job.sheet, image_io.from_pil(sheet))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _explain(error: BaseException) -> str:
    text = _one_line(error)
    if is_out_of_memory(error):
        return f"out of memory; try a smaller --batch-size, --vae-tile or --scale, or --dtype bfloat16 ({text[:120]})"
    return text


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """How many records have each outcome."""
    return Counter(record.outcome for record in records)

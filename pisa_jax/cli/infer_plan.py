"""The output files of a run of `pisa-sr infer`, all of them known and checked before anything is computed.

The name of an output file depends on its input and on the options, and on no other file of the run.
"""

import os
import stat
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image

from pisa_jax.cli.infer_names import scale_marks
from pisa_jax.cli.scale_map_files import check_aspect_ratio, map_finder
from pisa_jax.config import Scales
from pisa_jax.imaging.decode_tiff import is_tiff
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.image_files import readable_formats
from pisa_jax.imaging.image_writing import LARGEST_SIDE, SUFFIXES, WRITABLE
from pisa_jax.runtime.file_identity import NameProbe, file_id, probe_names
from pisa_jax.runtime.messages import error_text


@dataclass(frozen=True)
class UpscaleOptions:
    """Options of a run."""

    # Output folder.
    output: Path
    # Upscale factor.
    scale: float = 4.0
    # Pairs (pix, sem); every input gets one output file per pair.
    scales: tuple[Scales, ...] = ((1.0, 1.0),)
    # Scale maps {name of the adapter: file, or folder with a file for each input}; they multiply all pairs.
    maps: Mapping[str, Path] = field(default_factory=dict)
    # Seed with which the latent is sampled; None: its mean.
    seed: int | None = None
    # Images per call of the model, of equal size or of one bucket.
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
class PlannedFile:
    """An input, its output files, and the reason why it cannot be upscaled."""

    input: Path
    # One file per pair of scales, and the contact sheet if there is one.
    outputs: list[Path] = field(default_factory=list)
    sheet: Path | None = None
    # (width, height) in the file's header, before the orientation is applied; None if the header is unreadable.
    size: tuple[int, int] | None = None
    # (height, width) of the decoded image, if the header is readable.
    shape: tuple[int, int] | None = None
    # Scale maps {name of the adapter: file}.
    maps: dict[str, Path] = field(default_factory=dict)
    # All output files exist and are to be kept.
    skipped: bool = False
    problem: str | None = None

    @property
    def written(self) -> list[Path]:
        """All output files."""
        return [*self.outputs, self.sheet] if self.sheet else self.outputs


class Plan:
    """The planned files of a run, and the files that its outputs must not replace: {file_id: description}."""

    def __init__(self, files: Sequence[PlannedFile], protected: Mapping[tuple[int, int], str], options: UpscaleOptions):
        self.files, self.options, self._protected = files, options, protected
        self._names = {_folded(path) for file in files for path in file.written}

    def set_suffix(self, file: PlannedFile, suffix: str) -> None:
        """Rename the outputs of a file whose content needs another format than its header announced.

        Raises:
            ValueError: a new name belongs to another file.
        """
        outputs = _result_paths(file.input, suffix, self.options)
        if outputs == file.outputs:
            return
        for path in outputs:
            # The folder's own rules are not asked again: a name that any file system takes for another one is refused.
            if _folded(path) in self._names or file_id(path) in self._protected:
                raise ValueError(f"{path} is another file of this run; give another --ext, --suffix or --output")
        self._names |= {_folded(path) for path in outputs}
        file.outputs = outputs
        file.skipped = _is_done(file, self.options)


def make_plan(inputs: Sequence[Path], options: UpscaleOptions, report: Path | None = None) -> Plan:
    """Name the output files of all inputs; `PlannedFile.problem` says which inputs cannot be upscaled.

    No output may replace an input, a scale map, the file `report` of the run, or an output of another input. The file
    system itself is asked which names and files are equal.

    Raises:
        OSError: nothing can be written to the output folder, or the file or folder of scale maps does not exist.
    """
    finders = {name: map_finder(path) for name, path in options.maps.items()}
    files = [_plan_file(path, options, finders) for path in inputs]
    kept = dict.fromkeys([path for file in files for path in file.maps.values()], "a scale map")
    kept |= dict.fromkeys(inputs, "an input") | ({report: "the report of this run"} if report else {})
    protected = {identity: text for path, text in kept.items() if (identity := file_id(path))}
    with probe_names(options.output) as probe:
        for path, text in kept.items():
            if probe.is_folder_of(path):
                probe.take(path.name, text)
        for file in files:
            if not file.problem:
                _check_outputs(file, probe, protected)
    return Plan(files, protected, options)


def result_suffix(suffix: str, size: tuple[int, int], options: UpscaleOptions) -> str:
    """Return `suffix`, or ".png" if --ext is auto and the format of `suffix` does not allow a result of this size.

    Raises:
        ImageError: the format of --ext does not allow it.
    """
    kind, side = WRITABLE[suffix], round(max(size) * options.scale)
    limit = LARGEST_SIDE.get(kind, side)
    if side <= limit:
        return suffix
    if options.ext == "auto":
        return ".png"
    raise ImageError(f"{kind} allows at most {limit} pixels per side, not {side}; use --ext png or tiff")


def _plan_file(path: Path, options: UpscaleOptions, finders: Mapping[str, Callable[[Path], Path]]) -> PlannedFile:
    """Name the outputs of one input from its name and the header of its content."""
    file = PlannedFile(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path} is not a regular file")  # reading a pipe would wait for its writer
        image_format, file.size, file.shape = _read_header(path)
        suffix = SUFFIXES.get(image_format if options.ext == "auto" else options.ext, ".png")
        if file.size:
            suffix = result_suffix(suffix, file.size, options)
        for name, find in finders.items():
            file.maps[name] = find(path)
            _check_map(file.maps[name], file.size)
    except Exception as error:  # such as the OverflowError of an enormous --scale
        file.problem = error_text(error)
        return file
    file.outputs = _result_paths(path, suffix, options)
    file.sheet = options.output / f"{path.stem}_grid{options.suffix}.png" if options.grid else None
    file.skipped = _is_done(file, options)
    return file


def _check_map(path: Path, image_size: tuple[int, int] | None) -> None:
    """Compare the sizes in the headers of a map and its image; the orientation of either may turn it by 90 degrees."""
    _, size, _ = _read_header(path)
    if size and image_size:
        check_aspect_ratio(path, size, image_size, turned=True)


def _is_done(file: PlannedFile, options: UpscaleOptions) -> bool:
    return options.skip_existing and all(path.exists() for path in file.written)


def header_shape(path: Path) -> tuple[int, int] | None:
    """Read the (height, width) of an image without its pixels; None if its header is unreadable."""
    try:
        return _read_header(path)[2]
    except (OSError, ImageError):
        return None


def _read_header(path: Path) -> tuple[str, tuple[int, int] | None, tuple[int, int] | None]:
    """Read the format of an image, its (width, height), and the (height, width) of the oriented image.

    Does not read the pixels; "" and None are what only the decoder can tell.

    Raises ImageError for an image of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=readable_formats()) as image:
                shape = image.size if _is_turned(image) else image.size[::-1]
                return {"MPO": "jpeg"}.get(image.format, image.format.lower()), image.size, shape
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error} Use --max-megapixels to allow more.") from None
    except Exception:  # Pillow raises arbitrary exceptions on damaged data, and the decoder explains them better
        with path.open("rb") as file:
            return "tiff" if is_tiff(file.read(4)) else "", None, None  # the decoder reads more layouts than Pillow


def _is_turned(image: Image.Image) -> bool:
    """Return True if the EXIF data of an opened image turn it by 90 degrees; False if they are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # Pillow raises arbitrary exceptions on damaged data
        return False


def _result_paths(path: Path, suffix: str, options: UpscaleOptions) -> list[Path]:
    ending = options.suffix + suffix
    return [options.output / f"{path.stem}{mark}{ending}" for mark in scale_marks(options.scales)]


def _check_outputs(file: PlannedFile, probe: NameProbe, protected: Mapping[tuple[int, int], str]) -> None:
    """Note a problem if an output file of `file` cannot be written, or is a file that must not be replaced."""
    for path in file.written:
        try:
            owner = probe.take(path.name, file) or protected.get(file_id(path))
        except OSError as error:
            file.problem = error_text(error)
            continue
        if isinstance(owner, PlannedFile):
            inputs = " and ".join(dict.fromkeys([str(owner.input), str(file.input)]))
            file.problem = owner.problem = (
                f"{path} would be written more than once, for {inputs}; upscale each in a run of its own with another "
                "--output or --suffix"
            )
        elif owner and not file.skipped:
            file.problem = f"{path} is {owner} and would be overwritten; give another --output or a --suffix"
        elif path.is_dir():
            file.problem = f"{path} is a folder; give another --output or a --suffix"


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", path.name).casefold()

"""Reading and writing of tfds data sets in array_record format, without TensorFlow; the only importer of tfds."""

import contextlib
import functools
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pisa_jax.data.contents import digest_files, file_sizes
from pisa_jax.data.sources import SourceImage, decode_rgb, match_size

logger = logging.getLogger(__name__)

VERSION = "1.0.0"
# `TfdsSource.paths` begins with about this many records at even distances.
FIRST_PATHS = 1000


@dataclass(frozen=True)
class TfdsSource:
    """A split of a prepared tfds data set; `gt_key` and `lq_key` are its image features."""

    directory: str
    split: str
    gt_key: str
    lq_key: str | None
    count: int
    # The files of the split.
    files: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    @property
    def paired(self) -> bool:
        return self.lq_key is not None

    @property
    def identity(self) -> str:
        return f"{'/'.join(Path(self.directory).parts[-2:])}/{self.split}"

    def contents(self) -> str:
        return digest_files(self.files, file_sizes(self.files))

    def paths(self) -> Iterator[str]:
        stride = -(-self.count // FIRST_PATHS)
        for start in range(stride):
            for index in range(start, self.count, stride):
                yield self._path(self._read(index), index)

    @functools.cached_property
    def _examples(self):
        import tensorflow_datasets as tfds

        # Read the encoded bytes: the decoder of tfds returns palette indices for palette PNGs and ignores EXIF.
        keys = [key for key in (self.gt_key, self.lq_key) if key]
        return tfds.builder_from_directory(self.directory).as_data_source(
            self.split, decoders={key: tfds.decode.SkipDecoding() for key in keys}
        )

    def __getstate__(self) -> dict:
        # An open reader cannot be sent to another process; every worker opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "_examples"}

    def _read(self, index: int) -> Mapping[str, Any]:
        try:
            return self._examples[index]
        except Exception as error:  # of several libraries: a missing file, a damaged block, a malformed record
            text = " ".join(str(error).split())[:200]
            raise OSError(f"{self.directory}: record {index} of {self.split} cannot be read: {text}") from error

    def _path(self, example: Mapping[str, Any], index: int) -> str:
        return os.fsdecode(example["path"]) if "path" in example else f"{self.split}/{index}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SourceImage:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is not in 0..{self.count - 1}")
        example = self._read(index)
        path = self._path(example, index)
        image = decode_rgb(example[self.gt_key], path)
        if self.lq_key is None:
            return SourceImage(image, path)
        return SourceImage(image, path, match_size(decode_rgb(example[self.lq_key], path), image, path))


def _open_builder(name_or_dir: str):
    """Open the builder of a folder with one data set, or of a data set by its name in the data folder of tfds."""
    import tensorflow_datasets as tfds

    if not Path(name_or_dir).is_dir():
        try:
            return tfds.builder(name_or_dir)
        except ValueError as error:
            raise ValueError(f"{name_or_dir} is neither a folder nor the name of a tfds data set") from error
    found = sorted(
        info.parent
        for info in Path(name_or_dir).rglob("dataset_info.json")
        if not any(part.startswith(".") for part in info.relative_to(name_or_dir).parts)  # left by a killed `prepare`
    )
    if not found:
        raise ValueError(f"{name_or_dir} has no dataset_info.json; create a data set with pisa-sr prepare")
    if len(found) > 1:
        raise ValueError(f"{name_or_dir} has {len(found)} data sets; give one of {[str(path) for path in found]}")
    try:
        return tfds.builder_from_directory(found[0])
    except Exception as error:  # of the parsers of several libraries
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"dataset_info.json or features.json in {found[0]} cannot be used ({text}); restore them, or create the "
            "data set again with pisa-sr prepare"
        ) from error


def tfds_source(name_or_dir: str | os.PathLike, split: str = "train") -> TfdsSource:
    """Open a split of a tfds data set in array_record format.

    `name_or_dir` is a folder with one prepared data set (as written by `pisa-sr prepare`), or the name of a data set
    in the data folder of tfds. Its features are `gt` and `lq` (pairs), or `image`; an optional feature `path` is the
    key of the prompts.

    Raises:
        ValueError: there is no such folder, feature or split, the set has another format, or the split is empty.
        FileNotFoundError: files of the split are missing.
    """
    import tensorflow_datasets as tfds

    builder = _open_builder(os.fspath(name_or_dir))
    keys, splits = set(builder.info.features), builder.info.splits
    if not {"gt", "lq"} <= keys and "image" not in keys:
        raise ValueError(f"{name_or_dir} has the features {sorted(keys)}; expected 'image', or 'gt' and 'lq'")
    if split not in splits:
        raise ValueError(f"{name_or_dir} has no split {split!r}, only {sorted(splits)}")
    formats = builder.info.available_file_formats()
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        raise ValueError(
            f"{name_or_dir} has the format {', '.join(sorted(found.value for found in formats)) or 'unknown'}; "
            "array_record is needed: create it with pisa-sr prepare, or with "
            'tfds.builder(...).download_and_prepare(file_format="array_record")'
        )
    count, files = splits[split].num_examples, tuple(os.fspath(path) for path in splits[split].filepaths)
    if not count:
        raise ValueError(f"the split {split!r} of {name_or_dir} has no images")
    missing = [file for file, size in zip(files, file_sizes(files), strict=True) if size < 0]
    if missing and os.path.isdir(builder.data_dir):  # else the set is in a storage that the system does not mount
        raise FileNotFoundError(f"{len(missing)} of {len(files)} files of a data set are missing, e.g. {missing[0]}")
    logger.info("%s: %d images (split %s)", name_or_dir, count, split)
    gt_key, lq_key = ("gt", "lq") if {"gt", "lq"} <= keys else ("image", None)
    return TfdsSource(str(builder.data_dir), split, gt_key, lq_key, count, files)


def write_tfds(
    folder: str | os.PathLike, name: str, split: str, examples: Iterable[Mapping[str, bytes | str]], paired: bool
) -> Path:
    """Write examples to folder/name/1.0.0 in array_record format; returns that folder.

    An example is {"image": encoded file, "path": file name}, or {"gt", "lq", "path"} if paired. The encoded files are
    stored unchanged. tfds shuffles the examples by a hash of the path. Raises OSError if the disk is full.
    """
    import tensorflow_datasets as tfds

    image_keys = ("gt", "lq") if paired else ("image",)

    class Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            features = {key: tfds.features.Image() for key in image_keys} | {"path": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            for example in examples:
                yield example["path"], dict(example)

    Images.name = name
    builder = Images(data_dir=os.fspath(folder), file_format="array_record")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints a message about a download, and there is none
            builder.download_and_prepare(file_format="array_record")
    except RuntimeError as error:  # of the writer of array_record files
        raise OSError(" ".join(str(error).split())) from error
    return Path(builder.data_dir)

"""Documents to a TFDS directory of `array_record` files, pictures inside: one thing to move, and fast at random."""

import base64
import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from l4jax.data.schema import NAMES, Document

PICTURE_FORMAT = "PNG"  # of pictures that are no file yet; files keep their bytes


class Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One split of documents, each as the JSON of the schema."""

    name = "documents"
    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)  # TFDS finds it through importlib_resources, which it does not install

    def __init__(self, *, documents: Iterable[Document], split: str, **kwargs):
        self._documents, self._split = documents, split
        super().__init__(file_format="array_record", **kwargs)  # the default format needs TensorFlow

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"document": tfds.features.Text()}), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for key, document in enumerate(self._documents):
            yield key, {"document": json.dumps(to_json(document), ensure_ascii=False)}


def write_tfds(documents: Iterable[Document], directory: Path, split: str = "train") -> Path:
    """Writes documents, in their order, and returns the directory for `open_source`.

    Raises:
        FileExistsError: there are documents in `directory` already.
        ValueError: a picture cannot be read.
    """
    if any(directory.glob("*/*/dataset_info.json")):
        raise FileExistsError(f"{directory} holds a TFDS data set already; choose another directory")
    tfds.disable_progress_bar()
    builder = Documents(documents=documents, split=split, data_dir=directory)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as nothing:
        builder.download_and_prepare(download_dir=nothing)  # TFDS announces a download, and there is none
    return Path(builder.data_dir)


def to_json(document: Document) -> dict[str, Any]:
    """Returns a document as an object of the schema that JSON takes, its pictures as base64."""
    data = {name: value for name in NAMES if (value := getattr(document, name)) is not None} | document.extra
    if document.content is not None:
        return data | {"content": [_item(item) for item in document.content]}
    messages = [message | {"content": [_item(item) for item in message["content"]]} for message in document.messages]
    return data | {"messages": messages}


def _item(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "image":
        return {"type": "image", "b64": _base64(item["image"])}
    if item["type"] == "video":
        return item | {"frames": [{"b64": _base64(frame)} for frame in item["frames"]]}
    return item


def _base64(picture: Path | bytes | Image.Image) -> str:
    if isinstance(picture, Path):
        picture = picture.read_bytes()
    elif isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, PICTURE_FORMAT)
        picture = file.getvalue()
    return base64.b64encode(picture).decode()

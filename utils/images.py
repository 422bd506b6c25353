"""Own images: folders of files, as torchvision's ImageFolder has them, or a .npz of arrays."""

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import Settings
from .errors import BadInput, one_line
from .examples import Source, source_of_arrays
from .files import atomic_write
from .terminal import bar, say

# The folder, beside those of the classes, of images without a label, in both spellings.
UNLABELLED = ("unlabelled", "unlabeled")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CACHE_SECONDS = 10              # of loading, from which on a cache is worth its place


def load_folder(settings: Settings) -> Source:
    """The images in settings.data_root: train/CLASS/*, train/unlabelled/* and test/CLASS/*, also in
    folders within these. A class is a folder of train; they are in alphabetical order.

    settings: data_root; image_size; test, without which there are no test images; supervised, with
        0 their classes do not matter; pretrained, with which nothing is written

    Images are grey if all of them are, or have three equal channels; else they have three channels.
    What takes more than CACHE_SECONDS is kept in a cache in the folder of runs. Raises BadInput if
    a folder has no images, or an image cannot be read, has transparent pixels or 16 bits, or
    another size than the others.
    """
    root = Path(settings.data_root)
    train, test = _files(root / "train"), _files(root / "test") if settings.test else {}
    classes = [name for name in train if name.lower() not in UNLABELLED]
    unknown = [name for name in test if name not in classes and name.lower() not in UNLABELLED]
    if classes and unknown and settings.supervised:
        raise BadInput(f"{root / 'test'} has a class {unknown[0]}, and {root / 'train'} has none")
    number = {name: k for k, name in enumerate(classes)}
    paths = [path for part in (train, test) for files in part.values() for path in files]
    images = _read_cached(paths, root, settings)
    y = torch.tensor([number.get(name, -1) for part in (train, test)
                      for name, files in part.items() for _ in files])
    n = sum(map(len, train.values()))
    return Source(images[:n], y[:n], images[n:], y[n:], tuple(classes))


def _files(folder: Path) -> dict[str, list[Path]]:
    """{class: its images}, both sorted, of the folders in `folder`."""
    from torchvision.datasets.folder import IMG_EXTENSIONS  # imported here as it takes a second

    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: data folder takes train/CLASS, "
                       f"train/{UNLABELLED[0]} and, without --test false, test/CLASS in data_root, "
                       "with images in each")

    def is_image(name: str) -> bool:
        return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")

    def fail(error: OSError) -> None:
        raise error
    found = {}
    for place in sorted(folder.iterdir()):
        name = place.name
        if not place.is_dir() or name.startswith("."):
            if is_image(name):
                raise BadInput(f"{place} is in no folder of a class, nor in "
                               f"{folder / UNLABELLED[0]}")
            continue
        if not name.isprintable():
            raise BadInput(f"{folder} has a class whose name cannot be shown, {name!r}: rename it")
        files: list[Path] = []
        seen = set()
        for parent, below, names in os.walk(place, followlinks=True, onerror=fail):
            seen.add(os.path.realpath(parent))          # links can lead back
            below[:] = sorted(b for b in below if not b.startswith(".")
                              and os.path.realpath(os.path.join(parent, b)) not in seen)
            files += [Path(parent, file) for file in sorted(names) if is_image(file)]
        if not files and name.lower() in UNLABELLED:
            continue
        if not files:
            raise BadInput(f"there are no images in {place}: {', '.join(IMG_EXTENSIONS)}")
        found[name] = files
    if not found:
        raise BadInput(f"there are no folders of classes in {folder}")
    return found


def _read_cached(paths: list[Path], root: Path, settings: Settings) -> Tensor:
    """The images, (N, 1 or 3, H, W), from the cache if no file has changed since it was written."""
    started, key = time.monotonic(), hashlib.sha256()
    for path in paths:
        status = path.stat()
        key.update(os.fsencode(path) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    place = hashlib.sha256(os.fsencode(os.path.abspath(root))
                           + f"{settings.image_size} {settings.test}".encode())
    cache = Path("logs", "exman-train-flow-ssl.py", "cache", f"{place.hexdigest()[:16]}.npz")
    try:
        with open(cache, "rb") as file, np.load(file) as kept:
            if str(kept["key"]) == key.hexdigest():
                return torch.from_numpy(kept["images"])
    except Exception:           # there is none, or it is damaged
        pass
    images = _read_all(paths, settings.image_size)
    if time.monotonic() - started > CACHE_SECONDS and not settings.pretrained:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache, "wb") as f:
                np.savez(f, key=key.hexdigest(), images=images.numpy())
            say("Cache", f"of {len(images):,} images: {cache}")
        except OSError as e:
            say("Cache", f"none, of {len(images):,} images: {one_line(e)}")
    return images


def _read_all(paths: list[Path], image_size: int) -> Tensor:
    """The images, (N, 1 or 3, H, W)."""
    first = _read(paths[0], image_size)
    images = torch.empty(len(paths), *first.shape, dtype=torch.uint8)
    for i, path in enumerate(bar(paths, "loading images")):
        image = _read(path, image_size)
        if image.shape[:2] != first.shape[:2]:
            (height, width), (height1, width1) = image.shape[:2], first.shape[:2]
            raise BadInput(f"{path} has {width} x {height} pixels, and {paths[0]} {width1} x "
                           f"{height1}: give them one size, or set image_size, to crop and resize")
        if image.shape[2] > images.shape[3]:            # the first one in colour
            images = images.expand(-1, -1, -1, 3).clone()
        images[i] = torch.from_numpy(image)
    return images.permute(0, 3, 1, 2).contiguous()


def _read(path: Path, image_size: int) -> np.ndarray:
    """An image, (H, W, 1 or 3), cropped to a square and resized if image_size is positive."""
    from PIL import Image, ImageOps     # imported here because few need it

    try:
        with Image.open(path) as file:
            layouts = str([tile[3] for tile in getattr(file, "tile", [])])
            if file.mode.startswith(("I", "F")) or ";16" in layouts:
                raise BadInput(f"{path} has more than 8 bits a channel: convert it")
            upright = ImageOps.exif_transpose(file)     # as cameras mean it
            if (upright.has_transparency_data
                    and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255):
                raise BadInput(f"{path} has transparent pixels: put it on a background")
            image = upright.convert("RGB")
        if image_size:
            image = ImageOps.fit(image, (image_size, image_size))
    except (BadInput, MemoryError):
        raise
    except Exception as e:  # damaged files raise errors of many types
        raise BadInput(f"{path} is not an image that can be read ({type(e).__name__})") from None
    array = np.array(image)
    return array[..., :1] if (array == array[..., :1]).all() else array


def load_arrays(settings: Settings) -> Source:
    """The arrays in the .npz file settings.data_root: x_train, y_train and, with settings.test,
    x_test and y_test, as in `source_of_arrays`. Raises BadInput for anything else."""
    path, names = settings.data_root, ARRAYS if settings.test else ARRAYS[:2]
    try:
        with open(path, "rb") as f, np.load(f) as file:
            arrays = {name: file[name] for name in names if name in file}
    except MemoryError:
        raise
    except Exception as e:      # damaged files raise errors of many types
        reason = one_line(e) if isinstance(e, OSError) else type(e).__name__
        raise BadInput(f"{path}, the data_root of data npz, is no .npz file that can be read "
                       f"({reason})") from None
    if missing := [name for name in names if name not in arrays]:
        raise BadInput(f"{path} has no {missing[0]}: data npz takes {', '.join(names)}"
                       f"{' (--test false: the first two)' * settings.test}")
    try:
        return source_of_arrays(**arrays)
    except ValueError as e:
        raise BadInput(f"{path}: {e}") from None

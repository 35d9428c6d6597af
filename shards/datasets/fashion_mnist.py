"""Fashion-MNIST, whole, from its four IDX files."""

from pathlib import Path

from shards.datasets import Dataset
from shards.sources import Arrays, Origin, idx
from shards.storage import Folder

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PUBLIC = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

# By split: the two files and the sha256 of each, decompressed (Debian compresses them anew).
FILES = {
    "train": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    },
    "test": {
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}


def read(split: str, origin: Origin) -> Arrays:
    """The pictures of `train` or `test`: from the given source, Debian's package or the public address."""
    (pictures, of_pictures), (labels, of_labels) = FILES[split].items()
    folder = _folder(split, origin)
    pixels, classes = idx.pair(folder, pictures, labels, digests=(of_pictures, of_labels))
    return Arrays([f"{split}-{number:05}" for number in range(len(pixels))], pixels, classes)


def _folder(split: str, origin: Origin) -> Folder:
    if origin.source:
        return Folder(origin.source)
    if DEBIAN.is_dir():
        return Folder(str(DEBIAN))
    return download(Folder(PUBLIC), [f"{name}.gz" for name in FILES[split]], origin.downloads / "fashion_mnist")


def download(web: Folder, names: list[str], kept: Folder) -> Folder:
    """Fetch into `kept` what of `names` is not there yet."""
    for name in names:
        if not kept.exists(name):
            print(f"fetching {web.absolute}/{name}", flush=True)
            kept.write(name, web.read(name))
    return kept


DATASET = Dataset(
    name="fashion_mnist",
    what="articles of clothing, 28 x 28, grey",
    licence="MIT",
    citation="Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    splits={"train": 60_000, "test": 10_000},
    read=read,
)

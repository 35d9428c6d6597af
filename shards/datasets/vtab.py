"""The 19 tasks of VTAB-1k (Zhai et al. 2019, arXiv:1910.04867), from the data as published or by the community's lists.

VTAB trains on the first 800 pictures of a training split as TensorFlow Datasets keeps it, chooses by the first 200 of a
validation split, and tests on a whole test split. The community's copy `vtab-1k` lists those pictures. From the data as
they were published that order is worked out (`shards.sources.tfds`): the same pictures, as long as TensorFlow Datasets
gave them these names; `docs/shards.md` says where that is in doubt. The copy may hold them encoded anew, and smaller.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from shards.datasets import Dataset, cifar100, dsprites, flowers, pets, smallnorb, svhn
from shards.sources import Origin, Pictures, Ranges, camelyon, clevr, kitti, lists, records, retinopathy, sprites
from shards.sources.classed import aerial, caltech, satellites, scenes, textures
from shards.sources.names import CALTECH, DTD, EUROSAT, RESISC, SUN
from shards.sources.tfds import Named
from shards.storage import Folder

TRAIN, CHOOSE, TEST = "train800", "val200", "test"
LEARNT, CHOSEN = 800, 200
"""Pictures to train on while choosing, and to choose by."""

Part = tuple[str, int, int | None]
"""Split of TensorFlow Datasets, first picture, and the one behind the last."""


@dataclass(frozen=True)
class Rule:
    """Which pictures are in a split of a task."""

    counts: Mapping[str, int]
    """Pictures of the splits of TensorFlow Datasets that they are taken from."""
    parts: Mapping[str, Part]
    """By split of the task."""

    def count(self, split: str) -> int:
        """Pictures of a split of the task."""
        whole, first, last = self.parts[split]
        return len(range(self.counts[whole])[first:last])


def native(train: int, validation: int, test: int) -> Rule:
    """Where all three splits are published."""
    parts: dict[str, Part] = {TRAIN: ("train", 0, LEARNT), CHOOSE: ("validation", 0, CHOSEN), TEST: ("test", 0, None)}
    return Rule({"train": train, "validation": validation, "test": test}, parts)


def carved(share: int, train: int, test: int, tested: str = "test") -> Rule:
    """Where what comes behind `share` of a hundred of the training pictures is to choose by."""
    first = train * share // 100
    chosen = ("train", first, first + CHOSEN)
    return Rule({"train": train, tested: test}, {TRAIN: ("train", 0, LEARNT), CHOOSE: chosen, TEST: (tested, 0, None)})


def divided(share: int, behind: int, count: int) -> Rule:
    """Where one split is divided: `share` of a hundred to train on, up to `behind` to choose by, the others to test."""
    first = count * share // 100
    chosen, tested = ("train", first, first + CHOSEN), ("train", count * behind // 100, None)
    return Rule({"train": count}, {TRAIN: ("train", 0, LEARNT), CHOOSE: chosen, TEST: tested})


def halved(train: int, test: int) -> Rule:
    """Where the first half of the test pictures is to choose by."""
    parts: dict[str, Part] = {TRAIN: ("train", 0, LEARNT), CHOOSE: ("test", 0, CHOSEN), TEST: ("test", test // 2, None)}
    return Rule({"train": train, "test": test}, parts)


@dataclass(frozen=True)
class Original:
    """How a task is made of its data as they were published."""

    source: str
    """What the folder `--source` has to hold, and how large it is; the folder of what it unpacks to will do as well."""
    read: Callable[[str, Origin], Named]
    """All pictures of a split of TensorFlow Datasets."""
    rule: Rule

    def pictures(self, split: str, origin: Origin) -> Pictures:
        """The pictures of a split of the task; ValueError where there are not as many as published."""
        whole, first, last = self.rule.parts[split]
        found, expected = self.read(whole, origin), self.rule.counts[whole]
        if len(found.pictures) != expected:
            there = f"{len(found.pictures):,} pictures in what TensorFlow Datasets calls {whole}"
            raise ValueError(f"{origin.source} has {there}, {expected:,} expected")
        return found.part(whole, first, last)


def numbered(read: Callable[[str, Origin], Pictures], split: str, origin: Origin) -> Named:
    """Pictures that are called by their number in the file."""
    found = read(split, origin)
    return Named(found, range(len(found)))


def by_file(read: Callable[[str, Origin], Ranges], theirs: Mapping[str, str], split: str, origin: Origin) -> Named:
    """Pictures that are called by their file, without the folder; `theirs` says what a split is called there."""
    found = read(theirs.get(split, split), origin)
    files = [name.rpartition("/")[2] for name in found.files.to_pylist()]
    return Named(found, [files[number] for number in found.table["file"].to_pylist()])


_NAMED = {
    "pets": partial(by_file, pets.read, {"train": "trainval"}),
    "flowers": partial(by_file, flowers.read, {"validation": "val"}),
    "location": partial(numbered, partial(dsprites.every, sprites.location)),
    "orientation": partial(numbered, partial(dsprites.every, sprites.orientation)),
    "azimuth": partial(numbered, partial(smallnorb.read, smallnorb.azimuth)),
    "elevation": partial(numbered, partial(smallnorb.read, smallnorb.elevation)),
    "count": partial(clevr.scenes, clevr.count),
    "distance": partial(clevr.scenes, clevr.distance),
}
_CAMELYON = "camelyonpatch_level_2_split_train_x.h5.gz and the other five (8 GB)"
_CIFAR = "cifar-100-python.tar.gz or cifar-100-binary.tar.gz (170 MB)"
_CLEVR = "CLEVR_v1.0.zip (18 GB)"
_EYES = "train and test, unpacked (89 GB), trainLabels.csv and retinopathy_solution.csv"
_FLOWERS = "102flowers.tgz (350 MB), imagelabels.mat and setid.mat"
_KITTI = "data_object_image_2.zip (12 GB), data_object_label_2.zip and devkit_object.zip"
_NORB = "smallnorb-…-training-dat.mat.gz and the other three (250 MB)"
_PETS = "images.tar.gz and annotations.tar.gz (800 MB)"
_SUN = "SUN397.tar.gz (39 GB), sun397_tfds_tr.txt, …_va.txt and …_te.txt"
_SVHN = "train_32x32.mat and test_32x32.mat (250 MB)"

_NORB_RULE, _CLEVR_RULE = halved(24_300, 24_300), carved(90, 70_000, 15_000, "validation")
_SPRITES_RULE = divided(80, 90, dsprites.COUNT)

# Sizes of splits as in google-research/task_adaptation, and of downloads about.
ORIGINALS = {
    "caltech101": Original("caltech-101.zip (140 MB)", caltech, carved(90, 3_060, 6_084)),
    "cifar100": Original(_CIFAR, partial(numbered, cifar100.read), carved(90, 50_000, 10_000)),
    "dtd": Original("dtd-r1.0.1.tar.gz (600 MB)", textures, native(1_880, 1_880, 1_880)),
    "flowers": Original(_FLOWERS, _NAMED["flowers"], native(1_020, 1_020, 6_149)),
    "pets": Original(_PETS, _NAMED["pets"], carved(80, 3_680, 3_669)),
    "sun397": Original(_SUN, scenes, native(76_128, 10_875, 21_750)),
    "svhn": Original(_SVHN, partial(numbered, svhn.read), carved(90, 73_257, 26_032)),
    "camelyon": Original(_CAMELYON, camelyon.patches, native(262_144, 32_768, 32_768)),
    "eurosat": Original("EuroSAT.zip (90 MB)", satellites, divided(60, 80, 27_000)),
    "resisc45": Original("NWPU-RESISC45, unpacked (430 MB)", aerial, divided(60, 80, 31_500)),
    "retinopathy": Original(_EYES, retinopathy.retinas, native(35_126, 10_906, 42_670)),
    "clevr_count": Original(_CLEVR, _NAMED["count"], _CLEVR_RULE),
    "clevr_distance": Original(_CLEVR, _NAMED["distance"], _CLEVR_RULE),
    "dmlab": Original(f"{records.ARCHIVE} (3 GB)", records.mazes, native(65_550, 22_628, 22_735)),
    "kitti": Original(_KITTI, kitti.vehicles, native(6_347, 423, 711)),
    "dsprites_location": Original(f"{sprites.FILE} (27 MB)", _NAMED["location"], _SPRITES_RULE),
    "dsprites_orientation": Original(f"{sprites.FILE} (27 MB)", _NAMED["orientation"], _SPRITES_RULE),
    "smallnorb_azimuth": Original(_NORB, _NAMED["azimuth"], _NORB_RULE),
    "smallnorb_elevation": Original(_NORB, _NAMED["elevation"], _NORB_RULE),
}

RESEARCH = "not stated; research"
CLEVR = "Johnson et al. 2017, arXiv:1612.06890"
DSPRITES = "Matthey et al. 2017, github.com/google-deepmind/dsprites-dataset"
EYES = "Kaggle and EyePACS 2015, Diabetic Retinopathy Detection"
NORB = "LeCun, Huang and Bottou 2004, CVPR"

COUNTS = tuple(f"{count} objects" for count in clevr.COUNTS)
DISTANCES = (*(f"up to {edge:g}" for edge in clevr.NEAR[1:-1]), f"over {clevr.NEAR[-2]:g}")
GRADES = ("none", "mild", "moderate", "severe", "proliferative")
METRES = (*(f"up to {edge:g} m" for edge in kitti.FAR[1:-1]), f"over {kitti.FAR[-2]:g} m", "no vehicle")
TISSUES = ("no metastasis", "metastasis")
DIGITS, MAZES = tuple("0123456789"), tuple("012345")

# Name, folder in vtab-1k, what is told, classes in the order of the labels, licence, citation.
TASKS = (
    ("caltech101", "caltech101", "objects", CALTECH, "CC BY 4.0", "Fei-Fei, Fergus and Perona 2004, CVPR workshop"),
    ("cifar100", "cifar", "objects, 32 x 32", cifar100.CLASSES, RESEARCH, "Krizhevsky 2009, technical report, Toronto"),
    ("dtd", "dtd", "textures", DTD, "research purposes", "Cimpoi et al. 2014, arXiv:1311.3618"),
    ("flowers", "oxford_flowers102", "flowers", flowers.NAMES, RESEARCH, "Nilsback and Zisserman 2008, ICVGIP"),
    ("pets", "oxford_iiit_pet", "breeds of pets", pets.BREEDS, "CC BY-SA 4.0", "Parkhi et al. 2012, CVPR"),
    ("sun397", "sun397", "scenes", SUN, RESEARCH, "Xiao et al. 2010, CVPR"),
    ("svhn", "svhn", "digits of house numbers", DIGITS, "non-commercial use", "Netzer et al. 2011, NIPS workshop"),
    ("camelyon", "patch_camelyon", "metastases", TISSUES, "CC0 1.0", "Veeling et al. 2018, arXiv:1806.03962"),
    ("eurosat", "eurosat", "land use, from satellites", EUROSAT, "MIT", "Helber et al. 2019, arXiv:1709.00029"),
    ("resisc45", "resisc45", "land use, from the air", RESISC, RESEARCH, "Cheng et al. 2017, arXiv:1703.00121"),
    ("retinopathy", "diabetic_retinopathy", "grades of retinopathy", GRADES, RESEARCH, EYES),
    ("clevr_count", "clevr_count", "number of objects", COUNTS, "CC BY 4.0", CLEVR),
    ("clevr_distance", "clevr_dist", "distance of the nearest object", DISTANCES, "CC BY 4.0", CLEVR),
    ("dmlab", "dmlab", "distance of things in a maze", MAZES, RESEARCH, "Beattie et al. 2016, arXiv:1612.03801"),
    ("kitti", "kitti", "distance of the nearest vehicle", METRES, "CC BY-NC-SA 3.0", "Geiger et al. 2013, IJRR 32(11)"),
    ("dsprites_location", "dsprites_loc", "x of a sprite", dsprites.PLACES, "zlib/libpng", DSPRITES),
    ("dsprites_orientation", "dsprites_ori", "turn of a sprite", dsprites.ANGLES, "zlib/libpng", DSPRITES),
    ("smallnorb_azimuth", "smallnorb_azi", "azimuth of a toy", smallnorb.AZIMUTHS, "research purposes", NORB),
    ("smallnorb_elevation", "smallnorb_ele", "elevation of a toy", smallnorb.ELEVATIONS, "research purposes", NORB),
)


def read(folder: str, classes: int, original: Original, split: str, origin: Origin) -> Pictures:
    """The pictures of `train800`, `val200` or `test`: by the list where the source is vtab-1k or the task's folder in
    it, in the order of the list, else from the data as they were published."""
    name, source = f"{split}.txt", Folder(origin.source)
    if (source / folder).exists(name):
        return lists.read(origin, name, folder=folder, count=classes)
    if source.exists(name):
        return lists.read(origin, name, count=classes)
    try:
        return original.pictures(split, origin)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; and of vtab-1k there is neither {folder}/{name} nor {name}") from error


DATASETS = tuple(
    Dataset(
        name=f"vtab_{name}",
        what=f"{what} (VTAB-1k)",
        licence=licence,
        citation=f"{citation}; Zhai et al. 2019, arXiv:1910.04867",
        classes=classes,
        splits={split: ORIGINALS[name].rule.count(split) for split in (TRAIN, CHOOSE, TEST)},
        read=partial(read, folder, len(classes), ORIGINALS[name]),
        source=f"the folder vtab-1k, or {folder} in it; or the folder that holds {ORIGINALS[name].source}",
    )
    for name, folder, what, classes, licence, citation in TASKS
)

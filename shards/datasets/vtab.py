"""The 19 tasks of VTAB-1k (Zhai et al. 2019, arXiv:1910.04867), by the lists of the community's copy `vtab-1k`.

VTAB draws its 1,000 training pictures by the order in which TensorFlow Datasets keeps them, so outside of it these
lists are what says which pictures they are. `test` is all of a task's own test set.
"""

from functools import partial

from shards.datasets import Dataset
from shards.sources import Origin, Ranges, lists
from shards.storage import Folder

RESEARCH = "not stated; research"
CLEVR = "Johnson et al. 2017, arXiv:1612.06890"
DSPRITES = "Matthey et al. 2017, github.com/google-deepmind/dsprites-dataset"
EYES = "Kaggle and EyePACS 2015, Diabetic Retinopathy Detection"
NORB = "LeCun, Huang and Bottou 2004, CVPR"

# Name, folder in vtab-1k, what is told, classes, pictures of the test set (both as in google-research/task_adaptation),
# licence, citation.
TASKS = (
    ("caltech101", "caltech101", "objects", 102, 6_084, "CC BY 4.0", "Fei-Fei, Fergus and Perona 2004, CVPR workshop"),
    ("cifar100", "cifar", "objects, 32 x 32", 100, 10_000, RESEARCH, "Krizhevsky 2009, technical report, Toronto"),
    ("dtd", "dtd", "textures", 47, 1_880, "research purposes", "Cimpoi et al. 2014, arXiv:1311.3618"),
    ("flowers", "oxford_flowers102", "flowers", 102, 6_149, RESEARCH, "Nilsback and Zisserman 2008, ICVGIP"),
    ("pets", "oxford_iiit_pet", "breeds of cats and dogs", 37, 3_669, "CC BY-SA 4.0", "Parkhi et al. 2012, CVPR"),
    ("sun397", "sun397", "scenes", 397, 21_750, RESEARCH, "Xiao et al. 2010, CVPR"),
    ("svhn", "svhn", "digits of house numbers", 10, 26_032, "non-commercial use", "Netzer et al. 2011, NIPS workshop"),
    ("camelyon", "patch_camelyon", "metastases", 2, 32_768, "CC0 1.0", "Veeling et al. 2018, arXiv:1806.03962"),
    ("eurosat", "eurosat", "land use, from satellites", 10, 5_400, "MIT", "Helber et al. 2019, arXiv:1709.00029"),
    ("resisc45", "resisc45", "land use, from the air", 45, 6_300, RESEARCH, "Cheng et al. 2017, arXiv:1703.00121"),
    ("retinopathy", "diabetic_retinopathy", "grades of retinopathy", 5, 42_670, RESEARCH, EYES),
    ("clevr_count", "clevr_count", "number of objects", 8, 15_000, "CC BY 4.0", CLEVR),
    ("clevr_distance", "clevr_dist", "distance of the nearest object", 6, 15_000, "CC BY 4.0", CLEVR),
    ("dmlab", "dmlab", "distance of things in a maze", 6, 22_735, RESEARCH, "Beattie et al. 2016, arXiv:1612.03801"),
    ("kitti", "kitti", "distance of the nearest vehicle", 4, 711, "CC BY-NC-SA 3.0", "Geiger et al. 2013, IJRR 32(11)"),
    ("dsprites_location", "dsprites_loc", "x of a sprite", 16, 73_728, "zlib/libpng", DSPRITES),
    ("dsprites_orientation", "dsprites_ori", "turn of a sprite", 16, 73_728, "zlib/libpng", DSPRITES),
    ("smallnorb_azimuth", "smallnorb_azi", "azimuth of a toy", 18, 12_150, "research purposes", NORB),
    ("smallnorb_elevation", "smallnorb_ele", "elevation of a toy", 9, 12_150, "research purposes", NORB),
)


def read(folder: str, classes: int, split: str, origin: Origin) -> Ranges:
    """The pictures of `train800`, `val200` or `test`, in the order of the list; the source is vtab-1k or the task's
    folder in it."""
    name = f"{split}.txt"
    inside = (Folder(origin.source) / folder).exists(name)
    return lists.read(origin, name, folder=folder if inside else "", count=classes)


DATASETS = tuple(
    Dataset(
        name=f"vtab_{name}",
        what=f"{what} (VTAB-1k)",
        licence=licence,
        citation=f"{citation}; Zhai et al. 2019, arXiv:1910.04867",
        classes=classes,
        splits={"train800": 800, "val200": 200, "test": test},
        read=partial(read, folder, classes),
        source=f"the folder vtab-1k, or {folder} in it",
    )
    for name, folder, what, classes, test, licence, citation in TASKS
)

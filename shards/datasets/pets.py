"""The Oxford-IIIT Pets, whole, with their breeds as classes; the splits are the official ones."""

from shards.datasets import Dataset
from shards.sources import Origin, Ranges, annotated

# In the order of the annotations' numbers and in their spelling, where cats have capitals.
_LISTED = """
Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer
British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees
havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland Persian pomeranian pug Ragdoll
Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese Sphynx staffordshire_bull_terrier
wheaten_terrier yorkshire_terrier
"""
BREEDS = tuple(_LISTED.split())


def read(split: str, origin: Origin) -> Ranges:
    """The pictures of `trainval` or `test`, of many sizes."""
    return annotated.pets(origin, split, BREEDS)


DATASET = Dataset(
    name="pets",
    what="cats and dogs by breed, colour",
    licence="CC BY-SA 4.0; the pictures remain their owners'",
    citation="Parkhi, Vedaldi, Zisserman and Jawahar 2012, Cats and Dogs, CVPR",
    classes=BREEDS,
    splits={"trainval": 3680, "test": 3669},
    read=read,
    source="the folder that holds images.tar.gz and annotations.tar.gz, or what they unpack to",
)

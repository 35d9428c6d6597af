"""CIFAR-100 with its 100 fine labels, whole, from its python or binary archive; the splits are the official ones."""

from shards.datasets import Dataset
from shards.sources import Arrays, Origin, cifar

_LISTED = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
CLASSES = tuple(_LISTED.split())


def read(split: str, origin: Origin) -> Arrays:
    """The pictures of `train` or `test`, 32 x 32."""
    return cifar.read(origin.source, split, cifar.HUNDRED, CLASSES)


DATASET = Dataset(
    name="cifar100",
    what="objects, animals and people, 32 x 32, colour",
    licence="not stated; its authors ask to be cited",
    citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images, chapter 3",
    classes=CLASSES,
    splits={"train": 50_000, "test": 10_000},
    read=read,
    source=f"{cifar.HUNDRED.python.archive} or {cifar.HUNDRED.binary.archive}, or the folder of it or of its files",
)

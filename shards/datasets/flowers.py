"""The Oxford Flowers-102, whole; the splits are the official ones."""

from shards.datasets import Dataset
from shards.sources import Origin, Ranges, annotated

# In the order of the labels' numbers.
_LISTED = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily,
pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian,
artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly,
ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily,
poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy,
primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia,
cautleya spicata, japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus,
bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory,
passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow,
magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia,
mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""
NAMES = tuple(name.strip() for name in _LISTED.split(","))
SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


def read(split: str, origin: Origin) -> Ranges:
    """The pictures of `train`, `val` or `test`, of many sizes."""
    return annotated.flowers(origin, SPLITS[split])


DATASET = Dataset(
    name="flowers",
    what="flowers of Britain by kind, colour",
    licence="not stated; research",
    citation="Nilsback and Zisserman 2008, Automated Flower Classification over a Large Number of Classes, ICVGIP",
    classes=NAMES,
    splits={"train": 1020, "val": 1020, "test": 6149},
    read=read,
    source="the folder that holds imagelabels.mat, setid.mat, and 102flowers.tgz or the folder jpg that it unpacks to",
)

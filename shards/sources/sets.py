"""The pictures of a shard set: to make another of them, or to hold a corpus against them."""

import pyarrow as pa

from shards.manifest import ShardSet
from shards.sources import LISTING, Ranges


def read(shards: ShardSet) -> Ranges:
    """All pictures of a set, in the order of its index."""
    tables = [
        pa.Table.from_arrays(
            [
                table["key"],
                pa.array([number] * len(table), pa.int32()),
                table["offset"],
                table["size"].cast(pa.int64()),
                table["labels"],
            ],
            schema=LISTING,
        )
        for number, table in enumerate(map(shards.rows, range(len(shards.manifest.shards))))
    ]
    files = pa.array([shard.name for shard in shards.manifest.shards], pa.string())
    table = pa.concat_tables([LISTING.empty_table(), *tables]).combine_chunks()
    return Ranges(shards.tars.absolute, files, table, shards.manifest.classes)

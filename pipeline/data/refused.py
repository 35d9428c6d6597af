"""Pictures of a run that could not be used: named, counted once, and no more of them than a limit."""

import json
from collections.abc import Callable
from threading import Lock

from shards.storage import Folder


class Refused:
    """Names in `folder`, where there is one, a file a picture: what a restart finds there counts, too."""

    def __init__(self, folder: Folder | None, limit: int, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.limit, self.say = folder, limit, say
        self._one_at_a_time = Lock()
        self._names = set(folder.sizes()) if folder else set()

    @property
    def count(self) -> int:
        """Pictures refused so far, as far as this process knows."""
        return len(self._names)

    def add(self, sample: int, key: str, shard: str, reason: str) -> None:
        """Name a picture; ValueError where there are more than the limit."""
        name = f"{sample:012}.json"
        with self._one_at_a_time:
            if name in self._names:
                return
            if self.folder:
                about = {"sample": sample, "key": key, "shard": shard, "reason": reason}
                self.folder.create(name, json.dumps(about).encode())
                self._names.update(self.folder.sizes())  # other processes' too
            self._names.add(name)
            told = f"picture {key} of {shard} cannot be used ({reason})"
            if self.count > self.limit:
                where = f"; {self.folder.absolute} names them" if self.folder else ""
                many = f"with it {self.count} pictures are refused, more than data.refused_limit {self.limit}"
                raise ValueError(f"{told}; {many}{where}")
            self.say(f"{told}; it is left out: {self.count} of at most {self.limit}")

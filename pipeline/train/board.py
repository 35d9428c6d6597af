"""Where the processes of a run and whoever started it leave word for each other; a process of its own imports it."""

# Why processes stop after a step: of several reasons the last counts.
REASONS = ("", "there is room for more processes", "a process was told to end", "a machine is about to go", "on demand")
MORE, TERMINATED, LEAVING, DEMANDED = range(1, len(REASONS))


class Board:
    """Where the processes of a run and whoever started it leave word for each other."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.hopeless = ""
        self.starts = 0
        self.stop = 0
        self.at_work = False

    def say(self, line: str) -> None:
        """Leave a line."""
        self.lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        taken, self.lines = self.lines, []
        return taken

    def give_up(self, why: str, start: int = 0) -> None:
        """Say that another start would fail as this one has; not heard of one that is not the last."""
        if start in (0, self.starts):
            self.hopeless = self.hopeless or why

    def why_given_up(self) -> str:
        """What was said so first, empty where nothing was."""
        return self.hopeless

    def ask_to_stop(self, reason: int) -> bool:
        """Have the processes stop after a step, for one of `REASONS`; whether any is at work."""
        self.stop = max(self.stop, reason)
        return self.at_work

    def stop_asked(self) -> int:
        """The reason for which the processes are to stop, 0 for none."""
        return self.stop

    def begin(self, first: bool) -> int:
        """The number of this start, told its first process and then the others; 0 where they are not to work."""
        self.starts += first
        # What a start before was asked for another reason is done by its end, whatever that was.
        self.stop = DEMANDED if self.stop == DEMANDED else 0
        self.at_work = not self.hopeless and not self.stop
        return max(1, self.starts) if self.at_work else 0

    def leave(self) -> None:
        """The processes have come to an end: of the run, or because they were asked."""
        self.at_work = False

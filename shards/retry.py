"""Which faults of a store pass, how long they are waited for, and what is said of those that do not."""

import math
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import TypeVar
from urllib.parse import urlsplit

Found = TypeVar("Found")


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for."""

    seconds: float = 120.0
    """Since the first of the faults that follow each other; three tries are made even where they take longer."""
    first: float = 0.25
    """Seconds before the second try; each further wait is twice as long, and is shortened at random by up to half."""
    longest: float = 20.0
    """Seconds that a wait has at most."""
    connect: float = 10.0
    """Seconds for a connection to be made."""
    silence: float = 30.0
    """Seconds in which a server must send something while an answer is due."""
    requests: int = 2
    """Tries of a single request within one try of an operation, which may consist of many."""
    pace: float = 250_000.0
    """Bytes a second that an upload must reach; a server that no longer takes any is not noticed otherwise."""

    def upload(self, size: int) -> float:
        """Seconds after which an upload of `size` bytes is broken off."""
        return self.requests * (self.connect + self.silence) + size / self.pace


PATIENCE = Patience()
"""What every store is treated with, from when it is first used."""


def wait_for(seconds: float) -> None:
    """Wait for every store so long from now on (`Patience.seconds`); ValueError unless it is more than 0 and finite."""
    global PATIENCE
    if not 0 < seconds < math.inf:
        raise ValueError(f"a store cannot be waited for {seconds:g} seconds: give a number above 0, such as 120")
    PATIENCE = replace(PATIENCE, seconds=seconds)


_LEAST = 3

# Error codes of S3 (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html) and of stores that are like it. An
# upload in parts is unknown where the answer to its completion was lost; the file is then put once more.
_PASSING = frozenset(
    (
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "ServiceUnavailable",
        "InternalError",
        "InternalFailure",
        "RequestTimeout",
        "Throttling",
        "ThrottlingException",
        "RequestThrottled",
        "RequestLimitExceeded",
        "TooManyRequestsException",
        "OperationAborted",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "NoSuchUpload",
        "408",
        "409",
        "425",
        "429",
        "500",
        "502",
        "503",
        "504",
    )
)
_EXPIRED = frozenset(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"))
_DENIED = frozenset(
    ("AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "InvalidPayer", "NotSignedUp", "401", "403")
)
_REFUSED = frozenset(
    (
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "InvalidSecurity",
        "AuthorizationHeaderMalformed",
        "RequestTimeTooSkewed",
    )
)
_ABSENT = frozenset(("404", "NoSuchKey", "NoSuchVersion"))
_TAKEN = frozenset(("PreconditionFailed", "412"))
_BEYOND = frozenset(("InvalidRange", "416"))

# Classes of the clients' exceptions, by name: importing the clients takes a second that local folders need not spend.
_BROKEN = frozenset(
    (
        "ConnectionError",
        "TimeoutError",
        "HTTPClientError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ResponseParserError",
        "IncompleteReadError",
        "IncompleteRead",
        "FlexibleChecksumError",
        "CredentialRetrievalError",
        "MetadataRetrievalError",
    )
)
_NAMELESS = frozenset(("NoCredentialsError", "PartialCredentialsError"))
_CLIENTS = ("botocore", "aiobotocore", "aiohttp")

_RIGHTS = {"read": "s3:GetObject", "write": "s3:PutObject", "list": "s3:ListBucket", "remove": "s3:DeleteObject"}


class _Total:
    def __init__(self) -> None:
        self.total, self._lock = 0, Lock()

    def add(self) -> None:
        with self._lock:
            self.total += 1


_repeated = _Total()

# Waits decide no result, and must not move the state that `random.seed` of a program has set.
_jitter = random.Random()


class Unfinished(ConnectionError):
    """What was done is not what there is: bytes are missing, or files are still there. It is done again."""


def persist(attempt: Callable[[], Found], where: str, doing: str, renew: Callable[[], None]) -> Found:
    """What `attempt` gives, tried again while its faults can pass; `renew` is called where credentials have expired.

    OSError of one line, naming the place `where`, when patience ends (PermissionError if the credentials have expired
    and nobody has renewed them), and at once for what will not pass:
    FileNotFoundError for a name or a bucket that is not there, PermissionError for a right that is lacking (`doing`
    is read, write, list or remove) and for wrong credentials. What no store has raised goes through as it is.
    """
    failed: float | None = None
    for tried in count(1):
        try:
            return attempt()
        except Exception as error:
            if not passes(error):
                final = told(error, where, doing)
                if final is error:
                    raise
                raise final from error
            failed = failed or time.monotonic()
            pause = min(PATIENCE.longest, PATIENCE.first * 2 ** (tried - 1)) * _jitter.uniform(0.5, 1)
            if tried >= _LEAST and time.monotonic() + pause > failed + PATIENCE.seconds:
                raise _given_up(error, where, tried) from error
            _repeated.add()
            time.sleep(pause)
            if code(error) in _EXPIRED:
                renew()
    raise AssertionError("count() has no end")


def again() -> int:
    """How often this process has made a request once more."""
    return _repeated.total


def _given_up(error: Exception, where: str, tried: int) -> OSError:
    """What a person is told of a fault that could have passed."""
    if code(error) in _EXPIRED:
        return PermissionError(
            f"the credentials for {where} have expired and were not renewed ({tried} tries): {reason(error)}; use a "
            "role or a profile that renews itself, or new keys, and start again: the work goes on from where it was"
        )
    return OSError(f"{where} cannot be reached: {reason(error)} ({tried} tries)")


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if found := code(error):
        return found in _PASSING or found in _EXPIRED
    chain = list(_chain(error))
    if any(isinstance(each, socket.gaierror) and each.errno == socket.EAI_NONAME for each in chain):
        return False  # a name that no name server knows
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    return any(_BROKEN & {kind.__name__ for kind in type(each).__mro__} for each in chain)


def absent(error: BaseException) -> bool:
    """Whether an error says that there is no such file or folder, in a bucket that is there."""
    found = code(error)
    return found in _ABSENT or (isinstance(error, FileNotFoundError) and not found and not passes(error))


def taken(error: BaseException) -> bool:
    """Whether an error says that a name which was to be created is there already."""
    return isinstance(error, FileExistsError) or code(error) in _TAKEN or "pre-condition" in str(error).lower()


def beyond(error: BaseException) -> bool:
    """Whether an error says that a range begins behind the end of the file."""
    return code(error) in _BEYOND


def unexplained(error: BaseException) -> bool:
    """Whether an error is a refusal without a reason, as every answer to HEAD is."""
    return code(error) in {"400", "403"}


def code(error: BaseException) -> str:
    """The store's code for an error, or the status of its answer; empty where no store has answered."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", ""))
        status = getattr(each, "status", None)
        if isinstance(status, int):
            return str(status)
    return ""


def told(error: Exception, where: str, doing: str) -> Exception:
    """What a person is told of an error that does not pass: one line with the place; the error itself where it is
    none of a store's."""
    found, store, said = code(error), urlsplit(where).netloc, reason(error)
    if found == "NoSuchBucket":
        return FileNotFoundError(f"there is no bucket {store}: {where}")
    if absent(error):
        return FileNotFoundError(f"{where} does not exist")
    if found in _DENIED:
        right = f" ({_RIGHTS[doing]})" if where.startswith("s3") else ""
        return PermissionError(f"{store} gives no permission to {doing}{right}: {where}: {said}")
    if found in _REFUSED:
        return PermissionError(f"the credentials for {where} are refused: {said}")
    if type(error).__name__ in _NAMELESS:
        return PermissionError(f"no credentials for {where}: {said}; AWS_ACCESS_KEY_ID or a profile gives them")
    if found or type(error).__module__.startswith(_CLIENTS):
        return OSError(f"{where} cannot be reached: {said}")
    return error


def reason(error: BaseException) -> str:
    """An error in one line, with the store's code."""
    said, found = " ".join(str(error).split()) or type(error).__name__, code(error)
    return said if found in said else f"{found}: {said}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what had happened when it was raised."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__

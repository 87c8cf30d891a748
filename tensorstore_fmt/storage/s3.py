"""Amazon S3 and what speaks its language, through the client that s3fs sets up.

s3fs makes the connection and reads the options. The requests are our own: its methods send
further ones (a HEAD for a missing key), hide failures of deletes, and retry out of sight.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import aiohttp
import s3fs
from aiobotocore.session import AioSession  # type: ignore[import-untyped]  # the same
from botocore import exceptions as boto  # type: ignore[import-untyped]  # the same
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]  # the same

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.storage.base import FileInfo, StoreNotFoundError, without_credentials
from tensorstore_fmt.storage.ranged import (
    UNSATISFIABLE,
    Answer,
    take_prefix,
    take_range,
    truncated,
)
from tensorstore_fmt.storage.remote import ObjectStore, OpenStore, WritableStore, check_options
from tensorstore_fmt.storage.retry import TransientError
from tensorstore_fmt.storage.s3_clients import Client, Clients, shared_clients

T = TypeVar("T")

_OURS: Final = {"self", "kwargs", "asynchronous", "loop"}
_PUT_ID: Final = "tensorstore-fmt-put"  # user metadata that tells our put from another's
_MOST_ROUNDS: Final = 4  # for which a client has connections at once: of runs that share it
_DELETE_KEYS: Final = 1000  # the most that one request takes

_TRANSIENT_CODES: Final = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
}
_TRANSIENT_STATUS: Final = {408, 409, 425, 429, 500, 502, 503, 504}
_DENIED_CODES: Final = {
    "AccessDenied",
    "AccountProblem",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_DENIED_STATUS: Final = {401, 403}
_NOT_FOUND: Final = 404
_EXISTS: Final = 412
_NOT_IMPLEMENTED: Final = 501
_NO_CREDENTIALS: Final = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
)
_NETWORK: Final = (
    boto.ConnectionError,  # also what a reset becomes, while the answer is waited for
    boto.FlexibleChecksumError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,  # overloaded servers send pages that are no XML
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)

_TIMEOUTS: Final = (TimeoutError, boto.ConnectTimeoutError, boto.ReadTimeoutError)


def s3_opener(url: str, options: Mapping[str, object]) -> OpenStore:
    """Check URL and options, and give what opens the store."""
    where = without_credentials(url)
    known = {*_parameters(s3fs.S3FileSystem), *_parameters(AioSession)} - _OURS
    check_options(options, known, where)
    if not url.partition("://")[2].strip("/"):
        raise ArgumentError(f"{where} names no bucket")
    config = options.get("config_kwargs") or {}
    if not isinstance(config, Mapping):
        raise ArgumentError(f"{where}: config_kwargs is {config!r}, expected a mapping")
    # Retries are counted above; ours must be the only ones, or 30 s become minutes.
    config = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "max_pool_connections": _MOST_ROUNDS * ObjectStore.max_in_flight,
        **config,
    }

    def open_store(loop: asyncio.AbstractEventLoop) -> ObjectStore:
        clients = shared_clients()
        try:
            client = clients.lease(loop, {**options, "config_kwargs": config})
        except (TypeError, ValueError, KeyError) as error:
            raise ArgumentError(f"{where}: {error}") from error
        bucket, key, _ = client.filesystem.split_path(url)
        return S3Store(clients, client, bucket, key.strip("/"), where)

    return open_store


def _parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]  # a class's own


class S3Store(WritableStore):
    """Single requests to one bucket."""

    def __init__(
        self, clients: Clients, client: Client, bucket: str, root: str, where: str
    ) -> None:
        self._clients = clients
        self._leased = client
        self._fs = client.filesystem
        self._bucket = bucket
        self._prefix = f"{root}/" if root else ""
        self._where = where
        self._has_conditions: bool | None = None  # not known yet
        self._ignored = False  # a condition, by a store that then put nevertheless

    async def read(self, path: str, start: int, stop: int) -> bytes:
        """Get exactly these bytes: one GET."""
        try:
            return await self._get(path, start, stop, lambda got: take_range(got, start, stop))
        except _UnsatisfiableError:
            raise truncated(self._name(path), None, stop) from None

    async def read_prefix(self, path: str, nbytes: int) -> tuple[bytes, int | None]:
        """Get the first bytes: one GET, whose answer tells the length."""
        try:
            return await self._get(path, 0, nbytes, lambda got: take_prefix(got, nbytes))
        except _UnsatisfiableError:
            return b"", 0  # only an empty object has no first byte

    async def _get(
        self, path: str, start: int, stop: int, take: Callable[[Answer], Awaitable[T]]
    ) -> T:
        reply = await self._call(
            "get_object", path, Key=self._prefix + path, Range=f"bytes={start}-{stop - 1}"
        )
        body = reply["Body"]
        try:
            return await take(
                Answer(
                    where=self._name(path),
                    status=reply["ResponseMetadata"]["HTTPStatusCode"],
                    content_range=reply.get("ContentRange"),
                    nbytes=reply.get("ContentLength"),
                    encoding=reply.get("ContentEncoding"),
                    read=body.read,
                )
            )
        except _NETWORK as error:
            raise TransientError(self._failed(path, error)) from error
        finally:
            body.close()

    async def list_page(
        self, directory: str, token: str | None
    ) -> tuple[list[FileInfo], str | None]:
        """Get up to 1,000 files of a directory: one LIST."""
        prefix = self._prefix + (f"{directory}/" if directory else "")
        more = {} if token is None else {"ContinuationToken": token}
        reply = await self._call("list_objects_v2", directory, Prefix=prefix, Delimiter="/", **more)
        if "IsTruncated" not in reply:
            # Neither an empty body nor a page of some proxy is a listing without files.
            raise TransientError(
                OSError(errno.EPROTO, "the store answered a listing with something else",
                        self._name(directory))
            )  # fmt: skip
        found = [
            FileInfo(row["Key"][len(prefix) :], row["Size"])
            for row in reply.get("Contents", ())
            if row["Key"] != prefix  # consoles make an empty object to show a folder
        ]
        if not reply.get("IsTruncated"):
            return found, None
        following = reply.get("NextContinuationToken")
        if not following or following == token:
            raise OSError(
                errno.EPROTO, "the store cut a listing short and does not go on", self._where
            )
        return found, following

    async def write(self, path: str, data: bytes, *, once: str | None, attempt: int) -> None:
        """Put a whole file: one PUT."""
        key = self._prefix + path
        if once is None:
            await self._call("put_object", path, Key=key, Body=data)
            return
        await self._check_can_put_once(path)
        if self._has_conditions is not False and await self._put_once(path, data, once, attempt):
            return
        if not await self._is_there(path, data, once, has_put=attempt > 0 or self._ignored):
            await self._put_with_id(path, data, once)
            if not await self._is_there(path, data, once, has_put=True):
                raise TransientError(OSError(errno.EIO, "what was put is gone", self._name(path)))

    async def _put_once(self, path: str, data: bytes, once: str, attempt: int) -> bool:
        """Put if it is absent; False: the store does not know how.

        Such a store is warned of. It gets a look before and after a plain put: of two who do this
        at the same moment, the one who put last has it, and the other may not notice.
        """
        try:
            await self._put_with_id(path, data, once, IfNoneMatch="*")
        except FileExistsError:
            self._has_conditions = True
            if not await self._is_there(path, data, once, has_put=attempt > 0):
                said = "the store says that it is there and that it is not"
                raise TransientError(OSError(errno.EIO, said, self._name(path))) from None
        except _NotImplementedByStoreError:
            self._has_conditions = False
        else:
            if self._has_conditions is None:
                # Some ignore the condition without a word: these put again what they have.
                try:
                    await self._put_with_id(path, data, once, IfNoneMatch="*")
                except FileExistsError:
                    self._has_conditions = True
                else:
                    self._has_conditions, self._ignored = False, True
        if not self._has_conditions:
            warnings.warn(
                f"{self._where}: this store does not know conditional writes (If-None-Match): two "
                "processes that create the same run at the same moment may not notice each other. "
                "Let only one create it (worker 0 does), and give every job a folder of its own",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._has_conditions

    async def _put_with_id(self, path: str, data: bytes, once: str, **condition: str) -> None:
        users = self._fs.s3_additional_kwargs.get("Metadata") or {}
        await self._call(
            "put_object",
            path,
            Key=self._prefix + path,
            Body=data,
            Metadata={**users, _PUT_ID: once},
            **condition,
        )

    async def _is_there(self, path: str, data: bytes, once: str, *, has_put: bool) -> bool:
        """Say whether our own put has arrived, perhaps an earlier one whose answer was lost.

        Asked also at the first attempt: aiohttp repeats a put by itself when the server had
        closed the connection. A store that drops metadata is believed only by the bytes.

        Raises
        ------
        FileExistsError
            Something else is there.
        """
        try:
            reply = await self._call("get_object", path, Key=self._prefix + path)
        except FileNotFoundError:
            return False
        try:
            if reply.get("Metadata", {}).get(_PUT_ID) == once:
                return True
            if has_put and reply.get("ContentLength") == len(data):
                found: bytes = await reply["Body"].read()
                if found == data:
                    return True
        except _NETWORK as error:
            raise TransientError(self._failed(path, error)) from error
        finally:
            reply["Body"].close()
        raise FileExistsError(errno.EEXIST, "somebody else has put it", self._name(path))

    async def _check_can_put_once(self, path: str) -> None:
        # s3fs silently drops parameters that an old botocore does not know
        client = await self._client()
        shape = client.meta.service_model.operation_model("PutObject").input_shape
        if "IfNoneMatch" not in shape.members:
            raise OSError(
                errno.ENOTSUP, "this botocore cannot put-if-absent; install botocore >= 1.35.21",
                self._name(path),
            )  # fmt: skip

    async def delete(self, paths: Sequence[str]) -> None:
        """Remove files: one request for each 1,000."""
        for first in range(0, len(paths), _DELETE_KEYS):
            keys = [{"Key": self._prefix + path} for path in paths[first : first + _DELETE_KEYS]]
            if len(keys) == 1:  # every store has this one
                await self._call("delete_object", paths[first], Key=keys[0]["Key"])
                continue
            reply = await self._call(
                "delete_objects", paths[first], Delete={"Objects": keys, "Quiet": True}
            )
            for row in reply.get("Errors", ()):
                code, text = str(row.get("Code")), str(row.get("Message"))
                if code != "NoSuchKey":
                    raise self._error(str(row.get("Key")), code, 0, text)

    async def close(self) -> None:
        """Give the client back, whose connections the next run may use."""
        await self._clients.give_back(self._leased)

    # --- requests and their failures ------------------------------------------
    def _name(self, path: str) -> str:
        return f"{self._where.rstrip('/')}/{path}"

    async def _client(self) -> Any:  # noqa: ANN401 - untyped
        try:
            return await self._fs.set_session()
        except (TypeError, ValueError, boto.BotoCoreError) as error:
            raise ArgumentError(f"{self._where}: {error}") from error

    async def _call(self, method: str, path: str, **kwargs: object) -> Any:  # noqa: ANN401 - untyped
        await self._client()
        try:
            return await self._fs._call_s3(method, Bucket=self._bucket, **kwargs)
        except Exception as error:
            # s3fs puts errors of its own around what the server said
            said = error if isinstance(error, boto.ClientError) else error.__cause__
            if isinstance(said, boto.ClientError):
                answer = said.response.get("Error", {})
                status = said.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                code, text = str(answer.get("Code", "")), str(answer.get("Message", ""))
                if "IfNoneMatch" in kwargs and (
                    status == _NOT_IMPLEMENTED or code == "NotImplemented"
                ):
                    raise _NotImplementedByStoreError from said
                raise self._error(path, code, status, text) from said
            if isinstance(error, boto.SSLError):  # a certificate does not get better
                raise self._failed(path, error) from error
            if isinstance(error, _NETWORK):
                raise TransientError(self._failed(path, error)) from error
            if isinstance(error, _NO_CREDENTIALS):
                self._clients.unshare(self._leased)
                raise PermissionError(
                    errno.EACCES, f"no credentials for the bucket {self._bucket}: {error}",
                    self._name(path),
                ) from error  # fmt: skip
            if isinstance(error, boto.ParamValidationError):
                raise ArgumentError(f"{self._where}: {error}") from error
            if isinstance(error, boto.BotoCoreError):
                raise self._failed(path, error) from error
            raise

    def _error(self, path: str, code: str, status: int, text: str) -> Exception:
        """Say what an error answer means: missing, denied, passing, or simply failed."""
        name = self._name(path)
        said = f"{text or 'no message'} ({code or status})"
        if status == UNSATISFIABLE or code == "InvalidRange":
            return _UnsatisfiableError()
        if code == "NoSuchBucket":
            return StoreNotFoundError(
                errno.ENXIO, f"the bucket {self._bucket} does not exist", self._where
            )
        if code in _DENIED_CODES or status in _DENIED_STATUS:
            self._clients.unshare(self._leased)
            return PermissionError(
                errno.EACCES, f"access to the bucket {self._bucket} was denied: {said}", name
            )
        if status == _EXISTS:
            return FileExistsError(errno.EEXIST, "somebody else has put it", name)
        if status == _NOT_FOUND:
            return FileNotFoundError(errno.ENOENT, "no such object", name)
        failure = OSError(errno.EIO, f"the store answered: {said}", name)
        if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
            return TransientError(failure)
        return failure

    def _failed(self, path: str, error: Exception) -> OSError:
        kind = TimeoutError if isinstance(error, _TIMEOUTS) else OSError
        number = errno.ETIMEDOUT if kind is TimeoutError else errno.EIO
        return kind(number, f"{type(error).__name__}: {error}", self._name(path))


class _NotImplementedByStoreError(Exception):
    """The store says that it does not know a header of the request."""


class _UnsatisfiableError(Exception):
    """The object ends before the range begins."""

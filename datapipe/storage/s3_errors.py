"""What botocore raises -> what the user reads, and whether another try may help."""

import email.utils
import math
import time
from typing import Any, NamedTuple

from botocore import exceptions
from botocore.parsers import ResponseParserError

from datapipe.core.errors import NotFoundError, RefusedError, StorageError
from datapipe.storage.retry import PassingFault

ERRORS = (exceptions.BotoCoreError, exceptions.ClientError, ResponseParserError, ConnectionError)
"""Everything a request can raise that is the store's or the network's doing."""
BROKEN = (
    exceptions.HTTPClientError,
    exceptions.ConnectionError,
    exceptions.IncompleteReadError,
    exceptions.FlexibleChecksumError,
    ConnectionError,
)
"""No answer, or not the whole one."""
UNREACHED = (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError)
FIRST_CONTACT_S = 10.0
"""An endpoint that has never answered is taken for a wrong one after so many seconds."""
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
PASSING_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
REFUSED_CODES = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
FRAMING_CODES = {"MissingContentLength", "XAmzContentSHA256Mismatch"}
TLS_MISMATCH = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
"""Failures of TLS that no further try mends: an unknown certificate, a server without TLS."""
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
ENDPOINT = "check the endpoint (--storage.endpoint-url or AWS_ENDPOINT_URL)"


class S3Address(NamedTuple):
    """What a request was about, for messages."""

    address: str
    bucket: str
    endpoint: str

    @property
    def where(self) -> str:
        return f"{self.address} at {self.endpoint}"


def status_of(error: Any) -> int:
    """HTTP status of a ClientError."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def code_of(error: Any) -> str:
    """S3's own error code; the status where there is none."""
    return str(error.response.get("Error", {}).get("Code") or status_of(error))


def refused_part(fault: dict[str, str], operation: str) -> exceptions.ClientError:
    """What an answer says of one of several objects, as an answer about that one alone would have said it."""
    code = fault.get("Code", "")
    status = 403 if code == "AccessDenied" else 503 if code in PASSING_CODES else 400
    about = {"Code": code, "Message": f"{fault.get('Message') or code} ({fault.get('Key', '')})"}
    return exceptions.ClientError({"Error": about, "ResponseMetadata": {"HTTPStatusCode": status}}, operation)


def explained(error: Exception, place: S3Address, answered: bool) -> Exception:
    """A PassingFault, or the StorageError that ends the request. `answered`: whether this endpoint ever did."""
    if isinstance(error, exceptions.ClientError):
        final = _refusal(error, place)
        passing = status_of(error) in PASSING_STATUS or code_of(error) in PASSING_CODES
        return PassingFault(final, after_s=_retry_after_s(error)) if passing else final
    if any(reason in str(error) for reason in TLS_MISMATCH):
        hint = "AWS_CA_BUNDLE names the file of its certificate authority; is it https:// that is spoken there?"
        return StorageError(f"no trusted connection: {error}", where=place.where, hint=hint)
    if isinstance(error, BROKEN):
        unreached = isinstance(error, UNREACHED)
        final = unanswered(str(error), place, what="cannot be reached" if unreached else "did not answer fully")
        return PassingFault(final, within_s=FIRST_CONTACT_S if unreached and not answered else math.inf)
    if isinstance(error, ResponseParserError):
        return _no_s3(place)
    if "redential" in str(error) or "profile" in str(error):
        return RefusedError(f"the request could not be made: {error}", where=place.where, hint=CREDENTIALS)
    hint = f"{ENDPOINT}, the region and the address"
    return StorageError(f"the request could not be made: {error}", where=place.where, hint=hint)


def unanswered(why: str, place: S3Address, *, what: str = "did not answer fully") -> StorageError:
    """Where there was no answer, or not the whole one."""
    return StorageError(f"the store {what}: {why}", where=place.where, hint=f"{ENDPOINT} and the network")


def _refusal(error: Any, place: S3Address) -> StorageError:
    status, code = status_of(error), code_of(error)
    if code == "NoSuchBucket":
        return StorageError(
            f"the bucket {place.bucket!r} does not exist",
            where=place.where,
            hint=f"check the bucket's name; {ENDPOINT}; buckets are not made here",
        )
    if status in (401, 403) or code in REFUSED_CODES:
        rights = f"{CREDENTIALS}; they need the rights to read, list and, for writing, to put and delete there"
        return RefusedError(f"the store refuses access ({code})", where=place.where, hint=rights)
    if status == 404 and error.operation_name in ("GetObject", "HeadObject"):
        return NotFoundError("the object does not exist", where=place.where, hint="check the address")
    if status == 404 and code == "404":
        return _no_s3(place)
    message = error.response["Error"].get("Message") or code  # some servers send no message
    hint = "a store that is busy or failing: run the same command again later"
    if status == 411 or code in FRAMING_CODES:
        hint = "an older server: try --storage.checksums when_required"
    elif status in (301, 307, 400):
        hint = f"{ENDPOINT}, the region (AWS_DEFAULT_REGION) and the address"
    return StorageError(f"the store answered {status} {code}: {message}", where=place.where, hint=hint)


def _no_s3(place: S3Address) -> StorageError:
    return StorageError("the server there does not answer as S3 does", where=place.where, hint=ENDPOINT)


def _retry_after_s(error: Any) -> float:
    """Seconds the store asked to wait: a number or a date (RFC 9110, 10.2.3); 0 where it did not."""
    text = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0

"""API keys as OpenAI clients send them: the operator's, and one for each tenant. No HTTP framework and no Ray.

With an operator's key, `/v1/*` and `/admin/*` ask for it. Tenants are configured by name, weight and where their key
is; a tenant's key is accepted on `/v1/*` only and gives a request its tenant. With tenants, `/admin/*` answers 401
unless an operator's key is set.

A key is in an environment variable, or in a file that another variable or the configuration names. A process that was
deployed from elsewhere knows it by its SHA-256 alone (`NAME_SHA256`), so that no key is in Ray's records or logs.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from router.refusal import Refusal
from router.tenants import TenantConfig

API_KEY_VARIABLE = "HEADRACE_API_KEY"
API_KEY_FILE_VARIABLE = "HEADRACE_API_KEY_FILE"
DIGEST_SUFFIX = "_SHA256"
OPERATOR, ANONYMOUS = "operator", "anonymous"
_FILE_KEPT_S = 1.0
_NO_KEY = "none"
"""The digest of a key that is named and missing: no key has it."""
_SEEN: set[str] = set()
"""Files of keys that this process has found: without such a file the digest sent at deployment holds no longer. It is
for a process that never finds the file, on another machine than the one that deployed."""


class Holder(NamedTuple):
    """Whose key a request has: a tenant's name, `operator` or `anonymous`."""

    name: str
    tenant: TenantConfig | None = None


class _Source:
    """Where one key is: a variable, a variable that names a file, or a file."""

    def __init__(self, variable: str | None, file_variable: str | None = None, file: str | None = None) -> None:
        self._variable, self._file_variable, self._file = variable, file_variable, file
        self._read: tuple[str, float, str] = ("", -1.0, _NO_KEY)

    @property
    def name(self) -> str:
        """The variable that carries this key's digest between machines, without its suffix."""
        return self._variable or "HEADRACE_FILE_" + hashlib.sha256(str(self._file).encode()).hexdigest()[:12].upper()

    def digest(self) -> str:
        """The SHA-256 of the key in hex; "" if there is none; a file that cannot be read, or that has been here and is
        gone, has a key that none matches."""
        file = self._file or os.environ.get(self._file_variable or "")
        if file and (file in _SEEN or _exists(file)):
            _SEEN.add(file)
            return self._digest_of(file)
        if sent := os.environ.get(self._sent):  # newer than a variable that the node was started with
            return sent
        if key := os.environ.get(self._variable or ""):
            return hashlib.sha256(key.encode()).hexdigest()
        return _NO_KEY if file else ""

    @property
    def _sent(self) -> str:
        return self.name + DIGEST_SUFFIX

    def _digest_of(self, file: str) -> str:
        name, at_s, digest = self._read
        if name != file or time.monotonic() - at_s > _FILE_KEPT_S:
            try:
                key = Path(file).read_text().strip()
            except (OSError, UnicodeDecodeError):
                key = ""
            digest = hashlib.sha256(key.encode()).hexdigest() if key else _NO_KEY
            self._read = (file, time.monotonic(), digest)
        return digest


def _exists(file: str) -> bool:
    try:
        return Path(file).exists()
    except OSError:  # in a folder that this process may not look into
        return False


def operators_key() -> _Source:
    """The operator's key."""
    return _Source(API_KEY_VARIABLE, API_KEY_FILE_VARIABLE)


class Keyring:
    """API keys and what each allows. Read anew while requests come: keys change without a restart."""

    def __init__(self, tenants: Sequence[TenantConfig] = ()) -> None:
        self._operator = operators_key()
        self._tenants = [(tenant, _Source(tenant.api_key_env, file=tenant.api_key_file)) for tenant in tenants]

    @property
    def is_open(self) -> bool:
        """Whether every request passes, since there is no key and no tenant."""
        return not self._tenants and not self._operator.digest()

    @property
    def tenants(self) -> list[str]:
        """The names of the tenants."""
        return [tenant.name for tenant, _ in self._tenants]

    def digests(self) -> dict[str, str]:
        """The digests of all keys, as environment variables for a process elsewhere that must know the keys."""
        sources = [self._operator, *(source for _, source in self._tenants)]
        return {source.name + DIGEST_SUFFIX: digest for source in sources if (digest := source.digest())}

    def require_operator(self, headers: Mapping[bytes, bytes]) -> None:
        """401 without the operator's key; every request passes when no key is configured."""
        expected = self._operator.digest()
        if (expected or self._tenants) and not _same(_given(headers), expected):
            raise _unauthorized()

    def require_user(self, headers: Mapping[bytes, bytes]) -> Holder:
        """Whose key it is; 401 for an unknown one."""
        given, expected = _given(headers), self._operator.digest()
        # All keys are compared, so that response times do not reveal a partial match.
        found = [tenant for tenant, source in self._tenants if _same(given, source.digest())]
        if _same(given, expected):
            return Holder(OPERATOR)
        if found:
            return Holder(found[0].name, found[0])
        if expected or self._tenants:
            raise _unauthorized()
        return Holder(ANONYMOUS)


def _given(headers: Mapping[bytes, bytes]) -> str:
    """The SHA-256 of the key in a request."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return hashlib.sha256(given).hexdigest() if scheme.lower() == b"bearer" and given else ""


def _same(given: str, expected: str) -> bool:
    return bool(expected) and hmac.compare_digest(given, expected)


def _unauthorized() -> Refusal:
    return Refusal(401, "invalid or missing API key; send it as 'Authorization: Bearer KEY'")

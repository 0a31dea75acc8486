"""Who is calling: from the metadata of a call to a name with rights."""

from __future__ import annotations

from collections.abc import Sequence

from fedlink.errors import FedlinkError, Reason
from fedlink.rpc import META_AUTHORIZATION, META_CLIENT, META_SESSION, metadata_value
from fedserver.runtime.access import Caller
from fedserver.runtime.sites import Site, SiteRegistry
from fedserver.services.certificates import Certificates
from fedserver.services.status import Context

_Metadata = Sequence[tuple[str, str | bytes]]

_BEARER = "Bearer "
_MAX_TOKEN = 256


class SiteIdentity:
    """Callers on the sites' listener.

    Args:
        sites: the registry.
        certificates: what judges the certificates of clients, if they are the proof of identity.
    """

    def __init__(self, sites: SiteRegistry, certificates: Certificates | None) -> None:
        self._sites = sites
        self._certificates = certificates

    def name(self, context: Context) -> str:
        """The name of the calling site, by its credential.

        Raises:
            FedlinkError: BAD_CREDENTIALS, BAD_NAME.
        """
        return self._name(context, _metadata(context))

    def _name(self, context: Context, metadata: _Metadata) -> str:
        if self._certificates:
            return self._by_certificate(self._certificates, context, metadata_value(metadata, META_CLIENT))
        name, authorization = metadata_value(metadata, META_CLIENT), metadata_value(metadata, META_AUTHORIZATION)
        if not isinstance(name, str) or not name:
            raise FedlinkError(Reason.BAD_CREDENTIALS, f"the call has no metadata {META_CLIENT!r} to say who calls")
        token = None
        if authorization is not None:
            text = str(authorization)
            if not text.startswith(_BEARER) or len(text) > _MAX_TOKEN:
                raise FedlinkError(Reason.BAD_CREDENTIALS, "authorization is not `Bearer TOKEN`")
            token = text.removeprefix(_BEARER)
        return self._sites.authenticate(name, token)

    def _by_certificate(self, certificates: Certificates, context: Context, says: str | bytes | None) -> str:
        name = certificates.client_name(context.auth_context())
        if says is not None and says != name:
            raise FedlinkError(
                Reason.BAD_CREDENTIALS,
                f"the certificate is that of {name!r}, but the call says that it comes from {says!r}; "
                "name in site.toml and the certificate's common name have to be the same",
            )
        return self._sites.admit(name)

    def site(self, context: Context) -> Site:
        """The calling site, by its credential and session; it is hereby seen.

        Raises:
            FedlinkError: BAD_CREDENTIALS, SESSION_UNKNOWN, SESSION_REPLACED.
        """
        metadata = _metadata(context)
        session = metadata_value(metadata, META_SESSION)
        return self._sites.check_session(self._name(context, metadata), session if isinstance(session, bytes) else b"")

    async def caller(self, context: Context) -> Caller:
        """The calling site, for the blob service."""
        return Caller(self.site(context).name, operator=False)

    async def admitted(self, context: Context) -> Caller:
        """The calling site by its credential alone; it does not count as seen.

        Raises:
            FedlinkError: BAD_CREDENTIALS, BAD_NAME.
        """
        return Caller(self.name(context), operator=False)


async def operator(context: Context) -> Caller:
    """The caller on the operators' listener, which the file system protects.

    Raises:
        FedlinkError: NOT_AN_OPERATOR for a call that carries a site's credential.
    """
    metadata = _metadata(context)
    if any(metadata_value(metadata, key) is not None for key in (META_AUTHORIZATION, META_CLIENT, META_SESSION)):
        raise FedlinkError(Reason.NOT_AN_OPERATOR, "a site's credential gives no right to operate the server")
    return Caller("operator", operator=True)


def _metadata(context: Context) -> _Metadata:
    return [(str(key), value) for key, value in context.invocation_metadata() or ()]

"""The sites: credentials, sessions, what they offer, and which are there."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection

from fedlink import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from fedlink import log as logs
from fedlink.config import check_name
from fedlink.errors import FedlinkError, Reason
from fedlink.settings_schema import parse_schema
from fedlink.v1 import coordination_service_pb2 as pb
from fedserver.rounds.selection import Offer
from fedserver.runtime.whole import whole
from fedserver.settings import Proof
from fedserver.store.database import Database
from fedserver.store.queries import clients as q
from fedserver.store.rows import ClientRow

TOKEN_PREFIX = "fedlink_"  # noqa: S105 - what tokens begin with, so that leaked ones can be found
_MAX_OFFERS = 64
_MAX_SITES = 100_000
_MAX_REGISTRATION = 1 << 20
_MAX_TEXT = 128
_ABILITIES = frozenset(("train", "gradient", "evaluate", "calibrate"))


@dataclass
class Site:
    """One site as the running server knows it."""

    row: ClientRow
    offers: Mapping[str, Offer] = field(default_factory=dict)
    registration: pb.RegisterClientRequest = field(default_factory=pb.RegisterClientRequest)
    last_seen: float = 0.0
    heard: float | None = None
    """When it was last heard of, on the monotonic clock; None if not since the server started."""
    polls: int = 0
    """Polls that are being held right now."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.row.name


def token_hash(token: str) -> bytes:
    """What is stored of a bearer token. Tokens have 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(token.encode()).digest()


class SiteRegistry:
    """Every site, in memory, written through to the database.

    Args:
        database: where sites are kept.
        lease_term: seconds without a sign after which a site counts as gone.
        proof: how a site proves who it is.
        changed: called when a site comes, goes or changes what it offers.
    """

    def __init__(self, database: Database, *, lease_term: float, proof: Proof, changed: Callable[[], None]) -> None:
        self._db = database
        self._lease_term = lease_term
        self._proof = proof
        self._changed = changed
        self._sites: dict[str, Site] = {}
        # On the monotonic clock: until then, sites that were there when the server stopped may come back.
        self._grace_ends = 0.0
        # Between looking at a site and writing it, nobody else may change it.
        self._changing = asyncio.Lock()
        self._log = logs.get("sites")

    async def load(self) -> None:
        """Read the sites known; sessions of before a restart stay good.

        Sites that were there when the server stopped have a lease term from now to come back.
        """
        for row in await self._db.run(q.all_clients):
            self._sites[row.name] = self._loaded(row)
        self._grace_ends = time.monotonic() + self._lease_term

    def _loaded(self, row: ClientRow) -> Site:
        seen = row.last_seen or 0.0
        if not row.registration:
            return Site(row, last_seen=seen)
        request = pb.RegisterClientRequest.FromString(row.registration)
        try:
            return Site(row, _read_offers(request), request, seen)
        except FedlinkError as e:
            # An older release took it; the site is asked to register again and is told then what is wrong.
            self._log.warning("registration not understood", client=row.name, error=e.message)
            return Site(replace(row, session=None), last_seen=seen)

    # --- Credentials

    @whole
    async def add(self, name: str, *, rotate: bool) -> str:
        """Make a credential.

        Returns:
            The bearer token, of which only a hash is kept; empty where certificates are the proof.

        Raises:
            FedlinkError: BAD_NAME, CLIENT_EXISTS.
        """
        try:
            check_name(name)
        except ValueError as e:
            raise FedlinkError(Reason.BAD_NAME, str(e)) from None
        async with self._changing:
            site = self._sites.get(name)
            by_certificate = self._proof is Proof.CERTIFICATE
            if site and (site.row.token_hash or site.row.revoked) and not rotate:
                what = "is revoked" if site.row.revoked else "is here" if by_certificate else "has a token"
                advice = "admit it again" if by_certificate else "replace its token"
                raise FedlinkError(Reason.CLIENT_EXISTS, f"client {name!r} {what} already; use --rotate to {advice}")
            token = TOKEN_PREFIX + secrets.token_urlsafe(32)
            await self._save(name, token_hash=token_hash(token), revoked=False, session=None, instance_id=None)
        # With certificates nobody gets to know the token; its hash is the mark of having been admitted.
        return "" if by_certificate else token

    @whole
    async def revoke(self, name: str) -> None:
        """Refuse a site from now on.

        Raises:
            FedlinkError: CLIENT_NOT_FOUND.
        """
        if name not in self._sites:
            raise FedlinkError(Reason.CLIENT_NOT_FOUND, f"there is no client {name!r}")
        async with self._changing:
            await self._save(name, revoked=True, session=None, instance_id=None, present=False)
        self._changed()

    def admit(self, name: str) -> str:
        """The name of the site that makes a call, which its certificate has proven.

        Raises:
            FedlinkError: BAD_CREDENTIALS if no operator has admitted it, or one has revoked it.
        """
        site = self._sites.get(name)
        if site and site.row.revoked:
            raise FedlinkError(Reason.BAD_CREDENTIALS, f"client {name!r} was revoked by the server's operator")
        # A name that was only ever taken on its word, on loopback, counts for nothing here.
        if site is None or site.row.token_hash is None:
            raise FedlinkError(
                Reason.BAD_CREDENTIALS,
                f"client {name!r} is not admitted; the server's operator does that with `fedserver client add {name}`",
            )
        return name

    def authenticate(self, name: str, token: str | None) -> str:
        """The name of the site that makes a call, by its token.

        Raises:
            FedlinkError: BAD_NAME; BAD_CREDENTIALS, in a sentence that does not say whether a name exists.
        """
        try:
            check_name(name)
        except ValueError as e:
            raise FedlinkError(Reason.BAD_NAME, str(e)) from None
        site = self._sites.get(name)
        if token is not None:
            good = site and site.row.token_hash and hmac.compare_digest(site.row.token_hash, token_hash(token))
            if not good or (site and site.row.revoked):
                raise FedlinkError(
                    Reason.BAD_CREDENTIALS,
                    f"the token is not one of client {name!r}, or it was revoked; "
                    "`fedserver client add --rotate` makes a new one",
                )
        elif self._proof is not Proof.NONE or (site and (site.row.token_hash or site.row.revoked)):
            raise FedlinkError(
                Reason.BAD_CREDENTIALS,
                f"client {name!r} needs a token: `fedserver client add {name}` prints one for its token_file",
            )
        return name

    # --- Sessions

    @whole
    async def register(self, name: str, request: pb.RegisterClientRequest) -> bytes:
        """Open a session, or find again that of the same process.

        Raises:
            FedlinkError: CLIENT_TOO_OLD, CLIENT_TOO_NEW, BAD_REGISTRATION; BAD_CREDENTIALS if it was revoked meanwhile.
        """
        _check_version(name, request)
        _check_size(request)
        offers = await asyncio.to_thread(_read_offers, request)
        async with self._changing:
            session, same = await self._open(name, request)
            site = self._sites[name]
            site.offers, site.registration = offers, request
            site.last_seen, site.heard = time.time(), time.monotonic()
        self._log.info("registered", client=name, workloads=sorted(offers), again=same)
        self._changed()
        return session

    async def _open(self, name: str, request: pb.RegisterClientRequest) -> tuple[bytes, bool]:
        old = self._sites.get(name)
        if old and old.row.revoked:
            raise FedlinkError(Reason.BAD_CREDENTIALS, f"client {name!r} was revoked")
        if old is None and len(self._sites) >= _MAX_SITES:
            raise FedlinkError(Reason.BUSY, f"this server knows {_MAX_SITES} clients and takes no further one")
        same = old is not None and old.row.session is not None and old.row.instance_id == request.instance_id
        session = old.row.session if old and same else None
        replaced = old.row.replaced_session if old and same else (old.row.session if old else None)
        session = session or secrets.token_bytes(16)
        await self._save(
            name,
            session=session,
            replaced_session=replaced,
            instance_id=request.instance_id,
            registration=request.SerializeToString(),
            last_seen=time.time(),
            present=True,
        )
        return session, same

    def check_session(self, name: str, session: bytes) -> Site:
        """The site of a call, which is hereby seen.

        Raises:
            FedlinkError: SESSION_UNKNOWN, SESSION_REPLACED.
        """
        site = self._sites.get(name)
        if site and site.row.session and hmac.compare_digest(site.row.session, session):
            self.seen(site)
            return site
        if site and session and session == site.row.replaced_session:
            raise FedlinkError(
                Reason.SESSION_REPLACED,
                f"a newer process registered as client {name!r}; this one is to stop. "
                "Two sites need two names, two daemons of a site two state directories and names",
            )
        raise FedlinkError(Reason.SESSION_UNKNOWN, f"no such session of client {name!r}; register again")

    @whole
    async def deregister(self, site: Site, session: bytes) -> bool:
        """End a session.

        Returns:
            Whether it was ended; not if a newer one has taken its place.
        """
        async with self._changing:
            if site.row.session != session:
                return False
            await self._save(site.name, session=None, instance_id=None, last_seen=time.time(), present=False)
        self._changed()
        self._log.info("left", client=site.name)
        return True

    def seen(self, site: Site) -> None:
        """Note a sign of life; one that had been away is back."""
        was_here = self.connected(site)
        site.last_seen, site.heard = time.time(), time.monotonic()
        if not was_here:
            self._changed()

    def connected(self, site: Site) -> bool:
        """Whether a site is there: it has a session, and holds a poll or was heard of within the lease term."""
        if site.row.session is None or site.heard is None:
            return False
        return site.polls > 0 or time.monotonic() - site.heard < self._lease_term

    def returning(self, site: Site) -> bool:
        """Whether a site that was there when the server stopped may yet come back: it has a lease term for that."""
        was_there = site.row.session is not None and site.row.present and site.heard is None
        return was_there and self.grace_left > 0

    @property
    def grace_left(self) -> float:
        """Seconds that sites which were there when the server stopped still have to come back."""
        return max(0.0, self._grace_ends - time.monotonic())

    async def look_round(self) -> None:
        """Write down which sites have come or gone since the last look, for the start after a crash."""
        # Who polls needs no further look.
        changed = [
            s
            for s in self._sites.values()
            if not (s.polls and s.row.present) and s.row.present is not (self.connected(s) or self.returning(s))
        ]
        if not changed:
            return
        async with self._changing:
            there = {s.name: self.connected(s) or self.returning(s) for s in changed}
            seen = {s.name: s.last_seen or None for s in changed}

            def work(c: Connection) -> None:
                for name, present in there.items():
                    q.save_client(c, name, time.time(), present=present, last_seen=seen[name])

            await self._db.run(work)
            for site in changed:
                site.row = replace(site.row, present=there[site.name], last_seen=seen[site.name])
        self._changed()

    # --- Views

    def find(self, name: str) -> Site | None:
        """One site."""
        return self._sites.get(name)

    def all(self) -> list[Site]:
        """Every site, in order of creation."""
        return sorted(self._sites.values(), key=lambda s: (s.row.created, s.name))

    def offers(self) -> dict[str, Mapping[str, Offer]]:
        """What each connected site offers."""
        return {s.name: s.offers for s in self._sites.values() if self.connected(s)}

    def absent(self) -> list[Site]:
        """Sites that have come before, are not connected and may come again."""
        return [s for s in self.all() if s.offers and not s.row.revoked and not self.connected(s)]

    async def _save(self, name: str, **values: Any) -> None:
        def work(c: Any) -> ClientRow:
            q.save_client(c, name, time.time(), **values)
            row = q.client(c, name)
            assert row is not None
            return row

        row = await self._db.run(work)
        site = self._sites.setdefault(name, Site(row))
        site.row = row


def _check_version(name: str, request: pb.RegisterClientRequest) -> None:
    theirs, software = request.protocol_version, request.software_version[:32]
    if theirs < MIN_PROTOCOL_VERSION:
        raise FedlinkError(
            Reason.CLIENT_TOO_OLD,
            f"client {name!r} (fedlink {software}) speaks protocol {theirs}, this server needs at least "
            f"{MIN_PROTOCOL_VERSION}: upgrade fedlink at the site",
        )
    if theirs > PROTOCOL_VERSION:
        raise FedlinkError(
            Reason.CLIENT_TOO_NEW,
            f"client {name!r} (fedlink {software}) speaks protocol {theirs}, this server only up to "
            f"{PROTOCOL_VERSION}: upgrade the server, or use an older fedlink at the site",
        )


def _check_size(request: pb.RegisterClientRequest) -> None:
    """What a site says of itself is kept in memory and shown in lists, so all of it is bounded.

    Raises:
        FedlinkError: BAD_REGISTRATION.
    """
    texts = [request.software_version, *request.features, *(t for d in request.devices for t in (d.name, d.model))]
    counts = (len(request.workloads), len(request.devices), len(request.features))
    if len(request.instance_id) != 16 or max(counts) > _MAX_OFFERS:
        raise FedlinkError(
            Reason.BAD_REGISTRATION,
            f"instance_id must have 16 bytes, and at most {_MAX_OFFERS} workloads, devices and features are named",
        )
    if request.ByteSize() > _MAX_REGISTRATION or any(len(t) > _MAX_TEXT for t in texts):
        raise FedlinkError(
            Reason.BAD_REGISTRATION,
            f"a registration may have {_MAX_REGISTRATION} bytes, and the name of a device, feature or release "
            f"{_MAX_TEXT} characters; describe the workloads' settings more shortly",
        )


def _read_offers(request: pb.RegisterClientRequest) -> dict[str, Offer]:
    offers: dict[str, Offer] = {}
    for offer in request.workloads:
        try:
            name = check_name(offer.name)
            schema = parse_schema(offer.settings_schema_json)
        except (ValueError, FedlinkError) as e:
            raise FedlinkError(Reason.BAD_REGISTRATION, f"workload {offer.name[:64]!r}: {e}") from None
        patterns = tuple(offer.allowed_runs)
        if name in offers or len(patterns) > _MAX_OFFERS or any(len(p) > 64 for p in patterns):
            raise FedlinkError(Reason.BAD_REGISTRATION, f"workload {name!r} is described twice or too long")
        offers[name] = Offer(schema, frozenset(offer.abilities) & _ABILITIES, patterns)
    return offers

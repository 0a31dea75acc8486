"""What a run would take here as things are, and whether it would be begun."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import Manifest
from fedlink.run_file import RunSpec
from fedserver.rounds.selection import refusal
from fedserver.runtime.footprint import Footprint, footprint, shortage
from fedserver.runtime.prediction import Prediction, predict
from fedserver.runtime.sites import SiteRegistry
from fedserver.store.disk import Disk


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would take."""

    takes: Footprint
    """On the server's disk, in its parts."""
    prediction: Prediction
    room: int
    """Bytes that may be taken of the server's disk now."""
    reserve: int
    """Bytes that stay free besides."""
    refusal: str
    """Why the run would be refused now; empty if it would not."""


class Planner:
    """Looks at the server before a run is begun.

    Args:
        sites: every site.
        disk: what the data directory lies on.
        bulk_streams: the setting.
    """

    def __init__(self, sites: SiteRegistry, disk: Disk, *, bulk_streams: int) -> None:
        self._sites = sites
        self._disk = disk
        self._bulk_streams = bulk_streams

    def known(self, spec: RunSpec) -> int:
        """How many sites, connected or not, offer a run's workload."""
        offers = [*self._sites.offers().values(), *(s.offers for s in self._sites.absent())]
        return sum(spec.workload in offered for offered in offers)

    async def plan(self, spec: RunSpec, model: Manifest, clients: int = 0) -> Plan:
        """What a run would take.

        Args:
            spec: its run file.
            model: what it would start from.
            clients: sites that could take part; 0 for those that are known.

        Raises:
            FedlinkError: BAD_RUN if every connected site refuses its settings.
        """
        self._check_offers(spec)
        sites = clients or self.known(spec)
        takes = footprint(model, spec, sites)
        # A model of 65,536 tensors takes some seconds.
        prediction = await asyncio.to_thread(predict, model, spec, sites, takes, bulk_streams=self._bulk_streams)
        room, reserve = self._disk.room, self._disk.reserve
        return Plan(takes, prediction, room, reserve, shortage(takes, room=room, reserve=reserve))

    def _check_offers(self, spec: RunSpec) -> None:
        """Refuse settings that every connected site with the workload refuses; a run may wait for other sites."""
        ability = "gradient" if spec.strategy == "fedsgd" else "train"
        sites = self._sites
        late = {s.name: s.offers for s in sites.absent() if sites.returning(s)}
        verdicts = {
            name: refusal(offers, run=spec.name or "", workload=spec.workload, ability=ability, settings=spec.settings)
            for name, offers in (sites.offers() | late).items()
            if spec.workload in offers
        }
        if verdicts and all(verdicts.values()):
            whys = "; ".join(f"{name} {why}" for name, why in sorted(verdicts.items()))
            raise FedlinkError(Reason.BAD_RUN, f"no connected site would take part: {whys}")

"""How long each side waits fits together, and nobody waits long for a server that is away."""

from __future__ import annotations

import random

from fedclient.patience import Patience
from fedclient.session import BACKOFF
from fedclient.settings import SiteSettings
from fedlink import rpc
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import AWAY_CAP, FOREVER


def test_no_client_asks_for_signs_more_often_than_a_server_allows() -> None:
    # Who does is hung up on, with "too many pings".
    allowed = dict(rpc.server_options())["grpc.http2.min_ping_interval_without_data_ms"] / 1000
    patience = Patience()
    for liveness in (patience.control, patience.bulk, rpc.QUICK, rpc.PATIENT):
        assert liveness.silence > 1.5 * allowed


def test_a_sign_is_waited_for_as_long_as_the_chunks_before_it_may_take() -> None:
    assert Patience.of(SiteSettings.model_fields["transfer_stall_after"].default) == Patience()
    assert Patience.of(300.0).stall == Patience.of(300.0).bulk.answer == 300.0
    assert Patience.of(1.0).bulk == Patience().bulk


def test_a_server_that_vanished_is_missed_before_its_leases_end() -> None:
    assert Patience().control.silence + Patience().control.answer <= 15


def test_a_server_that_is_away_is_looked_for_all_the_time() -> None:
    rng = random.Random(1)
    away, broken = (FedlinkError(reason, "said so") for reason in (Reason.UNREACHABLE, Reason.INTERNAL))
    for retry in (FOREVER, BACKOFF):
        waits = [retry.wait(away, 50, rng) for _ in range(200)]
        assert 0 < min(waits) < 0.1 * AWAY_CAP
        assert 0.9 * AWAY_CAP < max(waits) <= AWAY_CAP
        assert max(retry.wait(broken, 50, rng) for _ in range(200)) > AWAY_CAP

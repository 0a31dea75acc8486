"""The table: what is measured, and what is to be reached on two otherwise idle cores."""

from __future__ import annotations

from tests.bench.heartbeat import heartbeat
from tests.bench.idle import idle
from tests.bench.memory import memory
from tests.bench.netem import netem
from tests.bench.rounds import against_raw_tcp, growth, resnet18x8, tls, turnaround
from tests.bench.table import Row, Target

ROWS = (
    Row(
        "gpt2x4",
        "gpt2 x 4",
        against_raw_tcp,
        (
            Target("whole", "whole round / raw TCP of the same bytes", 4.0, 2.5, " x"),
            Target("untrained", "the same without the trainer", 2.5, 1.8, " x"),
            Target("cpu_per_gb", "CPU per GB moved, both sides", 2.0, 1.4, " s"),
        ),
    ),
    Row(
        "memory",
        "peak memory",
        memory,
        (
            Target("server_resnet18", "server, resnet18 x 2", 350, 200, " MB"),
            Target("server_gpt2", "server, gpt2 x 4", 350, 200, " MB"),
            Target("server_gpt2-medium", "server, gpt2-medium x 4", 350, 200, " MB"),
            Target("server_gpt2-xl", "server, gpt2-xl x 1", 350, 200, " MB"),
            Target("spread", "server, largest / smallest of these", 1.3, None, " x"),
            Target("daemon", "client daemon, the largest of these", 200, 120, " MB"),
            Target("trainer", "torch trainer over torch alone, gpt2, / model", 2.1, 1.6, " x"),
        ),
        repeat=1,
    ),
    Row("resnet18x8", "resnet18 x 8", resnet18x8, (Target("seconds", "whole round", 2.0, 1.0, " s"),)),
    Row(
        "turnaround",
        "1 MB model x 4",
        turnaround,
        (Target("milliseconds", "from commit to commit", 150, 50, " ms"),),
    ),
    Row(
        "idle1000",
        "1,000 idle clients",
        idle,
        (
            Target("memory", "added server memory", 60, None, " MB"),
            Target("cpu", "server's share of a core", 3.0, None, " %"),
            Target("told", "all told of a new task", 1.0, None, " s"),
        ),
    ),
    Row(
        "heartbeat",
        "8 clients uploading",
        heartbeat,
        (Target("p99", "heartbeat, 99th percentile", 100, 30, " ms"),),
    ),
    Row(
        "growth",
        "resnet18, 2 to 16 clients",
        growth,
        (Target("per_client", "round time per client, largest / that of 2", 1.2, None, " x"),),
    ),
    Row("tls", "gpt2 x 4, mutual TLS", tls, (Target("ratio", "whole round / without TLS", 1.8, 1.5, " x"),)),
    Row(
        "netem",
        "1 Gbit/s, 50 ms, 0.1 % loss",
        netem,
        (
            Target("down", "download's throughput / raw TCP's there", 80, 95, " %", at_least=True),
            Target("up", "upload's throughput / raw TCP's there", 80, 95, " %", at_least=True),
        ),
    ),
)

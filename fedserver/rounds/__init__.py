"""The round as a pure state machine: no I/O, no clock, no randomness of its own.

    SELECT ──enough sites──▶ COLLECT ──target, quorum or deadline──▶ AGGREGATE ──▶ COMMITTED
       ▲                        │                                        │
       │                        └────────────▶ FAILED ◀──────────────────┘
       └── the next attempt ──────────────────────┘

`machine.step` takes a `Round` and an event and gives the next `Round` and the actions that
`fedserver.runtime` performs. One file a phase; FAILED is a phase, not an exception.
"""

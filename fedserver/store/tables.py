"""The tables. Times are seconds since the epoch (UTC); digests and tokens are raw bytes; JSON is text.

`migrations/` holds how a database gets here; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
    comment="Single values: the boot under which the server last ran.",
)

clients = Table(
    "clients",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("token_hash", LargeBinary, unique=True, comment="SHA-256 of the bearer token; null on loopback's word"),
    Column("revoked", Boolean, nullable=False, default=False),
    Column("session", LargeBinary, unique=True),
    Column("replaced_session", LargeBinary, comment="the session that the present one replaced"),
    Column("instance_id", LargeBinary),
    Column("registration", LargeBinary, comment="serialized RegisterClientRequest"),
    Column("last_seen", Float),
    Column("present", Boolean, nullable=False, default=False, comment="was there when the server last looked"),
    Column("created", Float, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("digest", LargeBinary, nullable=False, comment="of the manifest"),
    Column("manifest_size", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False, comment="of all files"),
    Column("tensors", Integer, nullable=False),
    Column("created", Float, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("request_id", LargeBinary, nullable=False, unique=True),
    Column("spec", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("version", Integer, nullable=False, comment="newest committed"),
    Column("best_version", Integer),
    Column("best_value", Float),
    Column("reason", Text, nullable=False, default=""),
    Column("prediction", Text, comment="what it was to move and take, when it was created; null for older runs"),
    Column("created", Float, nullable=False),
    Column("ended", Float),
    Column("calibration", Text, comment="what sites measured for settings that are auto; null before, or if none is"),
)

versions = Table(
    "versions",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", LargeBinary, nullable=False, comment="of the manifest"),
    Column("manifest_size", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("tensors", Integer, nullable=False),
    Column("master_digest", LargeBinary, comment="manifest of the float32 master of a 16-bit model"),
    Column("metrics", Text, nullable=False, default="{}", comment="means over clients, once evaluated"),
    Column("evaluated", Boolean, nullable=False, default=False, comment="its evaluation is over"),
    Column("kept", Boolean, nullable=False, default=True, comment="its files are still here"),
    Column("pinned", Boolean, nullable=False, default=False, comment="kept whatever the retention says"),
    Column("created", Float, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("phase", String(16), nullable=False),
    Column("deadline_at", Float),
    Column("reason", Text, nullable=False, default=""),
    Column("used", Text, comment="what it moved and took, once it is committed"),
    Column("opened", Float, nullable=False),
    Column("closed", Float),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("token", LargeBinary, nullable=False, unique=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False),
    Column("kind", String(16), nullable=False, comment="train, evaluate or calibrate"),
    Column("round", Integer, nullable=False, comment="0 but for train"),
    Column("round_attempt", Integer, nullable=False, comment="0 but for train"),
    Column("version", Integer, nullable=False, comment="to start from, or to evaluate"),
    Column("client", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(64), nullable=False, default=""),
    Column("message", Text, nullable=False, default=""),
    Column("tensor", Text, nullable=False, default=""),
    Column("update_digest", LargeBinary),
    Column("num_examples", BigInteger, nullable=False, default=0),
    Column("steps", BigInteger, nullable=False, default=0),
    Column("compute_seconds", Float, nullable=False, default=0.0),
    Column("given_steps", BigInteger, comment="that it was limited to; null: it was not"),
    Column("examples_seen", BigInteger, nullable=False, default=0, comment="that its steps used; 0: not known"),
    Column("cut", String(32), nullable=False, default="", comment="which limit ended it early"),
    Column("metrics", Text, nullable=False, default="{}"),
    Column("bytes_down", BigInteger, nullable=False, default=0),
    Column("bytes_up", BigInteger, nullable=False, default=0),
    Column("issued", Float, nullable=False),
    Column("ended", Float),
    UniqueConstraint("run_id", "kind", "round", "round_attempt", "version", "client", "attempt"),
    Index("tasks_by_state", "state"),
)

speeds = Table(
    "speeds",
    metadata,
    Column("client", String(64), primary_key=True),
    Column("workload", String(64), primary_key=True),
    Column(
        "samples", Text, nullable=False, comment="[run's id, steps/s, examples/s] of its last trainings, newest last"
    ),
    comment="How fast each site trains.",
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", LargeBinary, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), index=True),
    Column("import_id", LargeBinary, index=True),
    Column("client", String(64), nullable=False, default="", comment="empty for an operator's import"),
    Column("digest", LargeBinary, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
)

blob_refs = Table(
    "blob_refs",
    metadata,
    Column("owner", String(128), primary_key=True, comment="model:NAME or version:RUN_ID:NUMBER"),
    Column("digest", LargeBinary, primary_key=True, index=True),
)

events = Table(
    "events",
    metadata,
    Column("sequence", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False, index=True),
    Column("time", Float, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("data", Text, nullable=False),
    sqlite_autoincrement=True,
)

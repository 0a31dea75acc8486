"""The first schema.

Revision ID: 0001
Revises: -
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "blob_refs",
        sa.Column("owner", sa.String(length=128), nullable=False, comment="model:NAME or version:RUN_ID:NUMBER"),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "digest"),
    )
    op.create_index(op.f("ix_blob_refs_digest"), "blob_refs", ["digest"], unique=False)
    op.create_table(
        "clients",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column(
            "token_hash",
            sa.LargeBinary(),
            nullable=True,
            comment="SHA-256 of the bearer token; null on loopback's word",
        ),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.Column("session", sa.LargeBinary(), nullable=True),
        sa.Column(
            "replaced_session", sa.LargeBinary(), nullable=True, comment="the session that the present one replaced"
        ),
        sa.Column("instance_id", sa.LargeBinary(), nullable=True),
        sa.Column("registration", sa.LargeBinary(), nullable=True, comment="serialized RegisterClientRequest"),
        sa.Column("last_seen", sa.Float(), nullable=True),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("session"),
        sa.UniqueConstraint("token_hash"),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
        comment="Single values: the boot under which the server last ran.",
    )
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="of the manifest"),
        sa.Column("manifest_size", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False, comment="of all files"),
        sa.Column("tensors", sa.Integer(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.LargeBinary(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, comment="newest committed"),
        sa.Column("best_version", sa.Integer(), nullable=True),
        sa.Column("best_value", sa.Float(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("ended", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("request_id"),
    )
    op.create_table(
        "events",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("sequence"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_events_run_id"), "events", ["run_id"], unique=False)
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("deadline_at", sa.Float(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("opened", sa.Float(), nullable=False),
        sa.Column("closed", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run_id", "number", "attempt"),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token", sa.LargeBinary(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False, comment="train or evaluate"),
        sa.Column("round", sa.Integer(), nullable=False, comment="evaluate: 0"),
        sa.Column("round_attempt", sa.Integer(), nullable=False, comment="evaluate: 0"),
        sa.Column("version", sa.Integer(), nullable=False, comment="to start from, or to evaluate"),
        sa.Column("client", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("tensor", sa.Text(), nullable=False),
        sa.Column("update_digest", sa.LargeBinary(), nullable=True),
        sa.Column("num_examples", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.Column("compute_seconds", sa.Float(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("issued", sa.Float(), nullable=False),
        sa.Column("ended", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("run_id", "kind", "round", "round_attempt", "version", "client", "attempt"),
        sa.UniqueConstraint("token"),
    )
    op.create_index("tasks_by_state", "tasks", ["state"], unique=False)
    op.create_table(
        "versions",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="of the manifest"),
        sa.Column("manifest_size", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("tensors", sa.Integer(), nullable=False),
        sa.Column(
            "master_digest", sa.LargeBinary(), nullable=True, comment="manifest of the float32 master of a 16-bit model"
        ),
        sa.Column("metrics", sa.Text(), nullable=False, comment="means over clients, once evaluated"),
        sa.Column("evaluated", sa.Boolean(), nullable=False, comment="its evaluation is over"),
        sa.Column("kept", sa.Boolean(), nullable=False, comment="its files are still here"),
        sa.Column("created", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run_id", "number"),
    )
    op.create_table(
        "uploads",
        sa.Column("id", sa.LargeBinary(), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=True),
        sa.Column("import_id", sa.LargeBinary(), nullable=True),
        sa.Column("client", sa.String(length=64), nullable=False, comment="empty for an operator's import"),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id"],
            ["tasks.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_uploads_import_id"), "uploads", ["import_id"], unique=False)
    op.create_index(op.f("ix_uploads_task_id"), "uploads", ["task_id"], unique=False)

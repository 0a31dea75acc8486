"""How much a task was limited to, what was done of it, and how fast each site trains.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns and the table; of what is there nothing was limited or measured."""
    op.add_column("tasks", sa.Column("given_steps", sa.BigInteger()))
    op.add_column("tasks", sa.Column("examples_seen", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("cut", sa.String(length=32), nullable=False, server_default=""))
    op.create_table(
        "speeds",
        sa.Column("client", sa.String(length=64), nullable=False),
        sa.Column("workload", sa.String(length=64), nullable=False),
        sa.Column("samples", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("client", "workload"),
    )

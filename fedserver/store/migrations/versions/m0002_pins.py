"""Versions that an operator pinned, and sites that were there when the server stopped.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the two columns; a site with a session counts as one that was there."""
    op.add_column("versions", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("clients", sa.Column("present", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE clients SET present = (session IS NOT NULL)")

"""What was predicted of a run, and what each of its rounds has used.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the two columns; of what is there nothing was predicted or recorded."""
    op.add_column("runs", sa.Column("prediction", sa.Text()))
    op.add_column("rounds", sa.Column("used", sa.Text()))

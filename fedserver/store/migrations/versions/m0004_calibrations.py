"""What sites have measured for the settings that a run gives as "auto".

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; the runs that are there have given numbers."""
    op.add_column("runs", sa.Column("calibration", sa.Text()))

"""What sites have measured for the settings that a run gives as "auto".

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column; the runs that are there have given numbers."""
    op.add_column("runs", sa.Column("calibration", sa.Text()))
